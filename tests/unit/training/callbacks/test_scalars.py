"""What TensorBoard and W&B get beside what Megatron sends."""

from __future__ import annotations

from unittest import mock

from tests.harness.moments import evaluation, steps_record

QUARTILES = {"loss/imbalance_q1": 0.25, "pairs/imbalance_q1": float("nan")}


def sent() -> tuple[list[tuple[str, float, int]], list[tuple[dict[str, float], int]]]:
    from megatron_bdpo.training.callbacks import scalars

    tensorboard, wandb = mock.Mock(), mock.Mock()
    with (
        mock.patch.object(scalars, "get_tensorboard_writer", lambda: tensorboard),
        mock.patch.object(scalars, "get_wandb_writer", lambda: wandb),
    ):
        for record in (steps_record(3, **QUARTILES), evaluation(3, **QUARTILES)):
            scalars.Scalars().after_record(record)
    return [call.args for call in tensorboard.add_scalar.call_args_list], [
        call.args for call in wandb.log.call_args_list
    ]


def without_writers() -> None:
    from megatron_bdpo.training.callbacks.scalars import Scalars

    Scalars().after_record(steps_record(1))


def test_rates_and_quartiles(ranks):
    ((tensorboard, wandb),) = ranks(1)(sent)
    assert tensorboard == [
        ("throughput/pairs_per_second", 4.0, 3),
        ("throughput/tokens_per_second", 50.0, 3),
        ("loss/imbalance_q1", 0.25, 3),
        ("loss/imbalance_q1 validation", 0.25, 3),
    ], "a value that is not finite is left out"
    assert [(*values, step) for values, step in wandb] == [
        ("throughput/pairs_per_second", 3),
        ("throughput/tokens_per_second", 3),
        ("loss/imbalance_q1", 3),
        ("pairs/imbalance_q1", 3),
        ("loss/imbalance_q1 validation", 3),
        ("pairs/imbalance_q1 validation", 3),
    ]


def test_a_run_without_them(ranks):
    ranks(1)(without_writers)
