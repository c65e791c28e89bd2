"""Flags that follow from other flags."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

import pytest

from megatron_bdpo.training.flags import arguments
from megatron_bdpo.training.flags.arguments import Arguments


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"wandb_project": "p", "save": "run"}, "run/tensorboard"),
        ({"wandb_project": "p", "wandb_save_dir": "wb"}, "wb/tensorboard"),
        ({"wandb_project": "p", "save": "run", "tensorboard_dir": "tb"}, "tb"),
        ({"save": "run"}, None),
    ],
)
def test_wandb_gets_metrics_without_a_tensorboard_directory(given, expected):
    """Megatron logs to W&B only where it logs to TensorBoard."""
    told = {"wandb_project": "", "save": None, "wandb_save_dir": None, "tensorboard_dir": None, "seq_length": None}
    arguments = Arguments(Namespace(**told | given), {}, {})
    arguments.log_to_wandb_too()
    assert arguments.megatron.tensorboard_dir == expected


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
