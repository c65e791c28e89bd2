"""Flags that follow from other flags."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_bdpo.training.arguments import log_to_wandb_too


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
    args = Namespace(**{"wandb_project": "", "save": None, "wandb_save_dir": None, "tensorboard_dir": None} | given)
    log_to_wandb_too(args)
    assert args.tensorboard_dir == expected
