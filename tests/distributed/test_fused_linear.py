"""The fused log-probs under Megatron's data parallelism, and in whole jobs beside the plain ones."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bdpo.logprobs import OneRank
from tests.harness.jobs import FEW_HELD_OUT, last_stage, train, whole_weights
from tests.harness.log_probs import PADDED_VOCABULARY, PROBLEMS, tensor_parallel_group
from tests.harness.parity import assert_same_steps, assert_same_weights

MICROBATCHES = 2


@pytest.mark.parametrize("tied", [False, True])
def test_overlapped_gradient_reduction_gets_what_is_added_to_main_grad(ranks, tied):
    """Hooks of Megatron's DDP start the reduction when a gradient arrives; the values are in main_grad by then."""
    for rank_gradients in ranks(2)(reduced_gradients, tied):
        expected = rank_gradients["returned"]
        assert np.abs(expected).max() > 0
        found = rank_gradients["added to main_grad"]
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()  # fp32, added in another order


def reduced_gradients(tied: bool) -> dict[str, np.ndarray]:
    """The weight's gradient over two ranks and two microbatches, by either way."""
    from megatron.core import parallel_state

    with tensor_parallel_group(1):
        parallel_state.initialize_model_parallel()
        try:
            fusion = {"returned": False, "added to main_grad": True}
            return {name: accumulated_gradient(tied, fused) for name, fused in fusion.items()}
        finally:
            parallel_state.destroy_model_parallel()


def accumulated_gradient(tied: bool, fused: bool) -> np.ndarray:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
    overlap = DistributedDataParallelConfig(overlap_grad_reduce=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, overlap, Head(tied, fused))
    model.zero_grad_buffer()
    for microbatch in range(MICROBATCHES):
        model.is_last_microbatch = microbatch == MICROBATCHES - 1
        with model.no_sync() if microbatch < MICROBATCHES - 1 else torch.enable_grad():
            model(microbatch).backward()
    model.finish_grad_sync()
    return model.module.weight.main_grad.double().numpy().copy()


class Head(torch.nn.Module):
    """An output layer; ``tied``, the hidden states come from the same weight."""

    def __init__(self, tied: bool, fused: bool) -> None:
        super().__init__()
        self.problem, self.tied, self.fused = PROBLEMS["no padding"], tied, fused
        self.weight = torch.nn.Parameter(torch.tensor(self.problem.weight, dtype=torch.float32))
        if tied:
            self.weight.zero_out_wgrad = True  # as Megatron marks it

    def forward(self, microbatch: int) -> Any:
        from megatron_bdpo.logprobs import TokenScoring

        shift = int(os.environ["RANK"]) * MICROBATCHES + microbatch
        hidden = torch.tensor(self.problem.hidden, dtype=torch.float32) * (1 + shift)
        if self.tied:
            hidden = hidden + torch.nn.functional.embedding(torch.arange(len(hidden)) % PADDED_VOCABULARY, self.weight)
        scores = TokenScoring(self.problem.vocab_size)(
            hidden[:, None],
            self.weight,
            None,
            self.problem.scored(),
            tp_group=OneRank(),
            sequence_parallel=False,
            gradient_accumulation_fusion=self.fused,
        )
        return scores.log_probs.sum()


# Whole jobs

TP2_SP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
JOBS = {
    "untied, TP2 SP PP2": (4, [*TP2_SP, "--pipeline-model-parallel-size", "2"], {}),
    "tied, TP2 SP": (2, TP2_SP, {"untie_embeddings_and_output_weights": False}),
    "tied, PP2": (2, ["--pipeline-model-parallel-size", "2"], {"untie_embeddings_and_output_weights": False}),
}
HELD_OUT = ["--eval-pair-data", str(FEW_HELD_OUT), "--eval-interval", "2", "--log-entropy"]


@pytest.mark.parametrize("name", JOBS)
def test_job_trains_as_with_plain_log_probs(ranks, tmp_path, name):
    """Step by step, on the held-out pairs, and in the weights; chunks of 7 rows do not divide a shard."""
    world_size, flags, model = JOBS[name]
    chosen = {"fused": ["--log-prob-chunk-size", "7"], "plain": ["--log-probs", "plain"]}
    runs = {
        kernel: ranks(world_size)(train, [*HELD_OUT, *flags, *own], pair_cache_dir=str(tmp_path / kernel), **model)
        for kernel, own in chosen.items()
    }
    fused, plain = last_stage(runs["fused"]), last_stage(runs["plain"])
    assert_same_steps(fused.steps, plain.steps)
    assert_same_steps(fused.evaluations, plain.evaluations)
    assert_same_weights(whole_weights(runs["fused"]), whole_weights(runs["plain"]))
    for record in fused.steps + fused.evaluations:
        for answer in ("chosen", "rejected"):
            assert 0 < record[f"entropy/{answer}"] <= np.log(1024), "at most that of a uniform distribution"


def test_entropy_is_the_mean_over_tokens(ranks, tmp_path):
    """Of a model that has just been made: nearly uniform over the 1024 tokens, on every layout the same."""
    flags = ["--log-entropy", "--pairs-per-step", "6"]
    (one,) = ranks(1)(train, flags, pair_cache_dir=str(tmp_path / "one"))
    four = last_stage(
        ranks(4)(train, [*flags, "--tensor-model-parallel-size", "2"], pair_cache_dir=str(tmp_path / "4"))
    )
    assert_same_steps(four.steps, one.steps)
    assert one.steps[0]["entropy/chosen"] == pytest.approx(np.log(1024), abs=0.05)


def test_other_kernel_means_other_reference_values(ranks, tmp_path):
    """Their rounding differs, so a cache that one has filled is not the other's."""
    for kernel in ("fused", "plain"):
        ranks(1)(train, ["--log-probs", kernel, "--train-iters", "1"], pair_cache_dir=str(tmp_path))
    assert len(list(tmp_path.glob("reference-*"))) == 2
