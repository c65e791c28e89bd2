"""Flags of LoRA that contradict each other, and adapters of PEFT's that are none of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.harness.jobs import refusals

CHECK = "megatron_bdpo.training.lora.lora_config"
ACCEPTED = [
    "--lora-rank 4",
    "--lora-rank 4 --reference base",
    "--lora-rank 4 --lora-targets q_proj,v_proj --lora-scaling sqrt-rank --lora-dropout 0.1",
    "",
]
REFUSED = {
    "--lora-alpha 8": "--lora-alpha: only with adapters. Add --lora-rank.",
    "--reference base": "--reference base: only with adapters",
    "--save-hf-merged x": "--save-hf writes the whole model",
    "--lora-rank 0": "--lora-rank 0",
    "--lora-rank 4 --lora-alpha 0": "--lora-alpha 0: must be greater than 0",
    "--lora-rank 4 --lora-targets q_porj": "--lora-targets q_porj: no such projection. Possible: attention, mlp",
    "--lora-rank 4 --lora-targets ,": "--lora-targets names no projection",
    "--lora-rank 4 --lora-type dora --lora-dropout 0.1": "dropout of DoRA's inputs",
    "--lora-start x": "--lora-start is read by the names of --hf-model",
    "--lora-start nowhere --hf-model x": "adapter_config.json cannot be read",
}


def test_flags(ranks):
    (found,) = ranks(1)(refusals, CHECK, [(flags, 1) for flags in [*ACCEPTED, *REFUSED]])
    for flags, message in zip([*ACCEPTED, *REFUSED], found, strict=True):
        expected = REFUSED.get(flags, "")
        assert expected in message and bool(expected) == bool(message), f"{flags}: {message}"


CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
STARTS = [
    ({}, "", ""),
    ({"target_modules": "all-linear", "use_rslora": True, "layers_to_transform": None, "bias": "none"}, "", ""),
    ({}, "--lora-rank 4 --lora-targets v_proj,q_proj", ""),
    ({"use_dora": True, "lora_dropout": 0.1}, "", "--lora-dropout 0 where --lora-start has one"),
    ({"use_dora": True, "lora_dropout": 0.1}, "--lora-dropout 0", ""),
    ({}, "--lora-rank 8", "rank: 4 instead of 8. Leave these flags out"),
    ({}, "--lora-targets mlp", "targets: "),
    ({"r": "four"}, "", "r is 'four'"),
    ({"peft_type": "IA3"}, "", "peft_type is 'IA3', which is not supported"),
    ({"rank_pattern": {"q_proj": 8}}, "", "rank_pattern is"),
    ({"modules_to_save": ["lm_head"]}, "", "modules_to_save is"),
    ({"init_lora_weights": "pissa"}, "", "init_lora_weights is 'pissa'"),
    ({"bias": "all"}, "", "bias is 'all'"),
    ({"target_modules": r".*\.(q|v)_proj"}, "", "target_modules names"),
    ({"target_modules": ["q_proj", "lm_head"]}, "", "target_modules names lm_head"),
]


def test_adapters_to_start_from(ranks, tmp_path: Path):
    lines = []
    for number, (changes, flags, _) in enumerate(STARTS):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
        lines.append((f"--hf-model x --lora-start {directory} {flags}", 1))
    (found,) = ranks(1)(refusals, CHECK, lines)
    for (changes, flags, expected), message in zip(STARTS, found, strict=True):
        assert expected in message and bool(expected) == bool(message), f"{changes} {flags}: {message}"
