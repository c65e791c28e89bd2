"""Flags that follow from other flags."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

import pytest

from megatron_bdpo.training.flags import arguments
from megatron_bdpo.training.flags.arguments import Arguments


@pytest.mark.parametrize(
    ("given", "tensorboard", "name", "place"),
    [
        ({"wandb_project": "p", "save": "a/run"}, "a/run/tensorboard", "run", None),
        ({"wandb_project": "p", "wandb_save_dir": "wb"}, "wb/tensorboard", None, "wb"),
        ({"wandb_project": "p", "save": "run", "tensorboard_dir": "tb", "wandb_exp_name": "e"}, "tb", "e", None),
        ({"wandb_project": "p"}, "runs/wandb/tensorboard", None, "runs/wandb"),
        ({"save": "run"}, None, "", None),
    ],
    ids=["saved", "place", "all-given", "alone", "not-wanted"],
)
def test_a_project_of_wandb_is_enough(given, tensorboard, name, place):
    """Megatron logs to W&B only where it logs to TensorBoard, and wants a name and a place. None: the time."""
    told = {"wandb_project": "", "wandb_exp_name": "", "save": None, "wandb_save_dir": None, "tensorboard_dir": None}
    arguments = Arguments(Namespace(**told | {"seq_length": None} | given), {}, {})
    arguments.log_to_wandb_too()
    found = arguments.megatron
    assert (found.tensorboard_dir, found.wandb_save_dir) == (tensorboard, place)
    assert found.wandb_exp_name == name if name is not None else found.wandb_exp_name.startswith("20")


@pytest.mark.parametrize(
    ("installed", "expected_impl", "expected_fusion"),
    [
        (set(), "local", False),
        ({"transformer_engine"}, None, None),
    ],
)
def test_defaults_follow_what_is_installed(monkeypatch, installed, expected_impl, expected_fusion):
    """None: Megatron's own default, which is Transformer Engine's layers and the fusion."""
    find = importlib.util.find_spec
    absent = {"transformer_engine"} - installed
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: object() if name in installed else None if name in absent else find(name),
    )
    merged = {name: value for group in arguments._default_groups({}) for name, value in group.items()}
    assert merged.get("transformer_impl") == expected_impl
    assert merged.get("gradient_accumulation_fusion") == expected_fusion
