"""Reference log-probs: scored over whole data sets before training, or beside it, and looked up by pair id."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from tqdm import tqdm

from megatron_bdpo.data.plan import pack_all
from megatron_bdpo.logprobs import TokenScoring
from megatron_bdpo.losses import Requirements
from megatron_bdpo.model.reference import evaluating, weights_at_rest
from megatron_bdpo.training.batches import IntArray, PackBatch, PackMaker
from megatron_bdpo.training.distributed import is_rank_zero, sum_over_ranks
from megatron_bdpo.training.forward import ScoringStep
from megatron_bdpo.training.job import PairJob
from megatron_bdpo.training.quartiles import IMBALANCE, quartile_edges

FloatArray = npt.NDArray[np.float64]

_PACKS_PER_CALL = 8  # times the pipeline stages: long enough to fill the pipeline, short enough for a progress bar


@dataclass
class ReferenceTable:
    """Reference log-probs of all pairs of a run, in nats, summed over response tokens. P pairs.

    Attributes:
        conditional: [P, 2] log pi_ref(y|x) of chosen and rejected.
        unconditional: [P, 2] log pi_ref(y) after the empty prompt, or None where the loss does not need it.
    """

    conditional: FloatArray
    unconditional: FloatArray | None

    def imbalance_edges(self, job: PairJob) -> Tensor | None:
        """[3] between the quartiles of the training pairs' imbalance; None where the loss does not read it."""
        if self.unconditional is None:
            return None
        ids = job.train.ids
        conditional, unconditional, tokens = (
            torch.from_numpy(np.ascontiguousarray(values[ids])).flatten()
            for values in (self.conditional, self.unconditional, job.pool.lengths[:, 1:])
        )
        unsafe = torch.from_numpy(job.pool.unsafe[ids])
        _, losses = job.loss.of_sequences(tokens, unsafe, conditional, conditional, unconditional)
        return quartile_edges(losses.metrics[IMBALANCE].numpy()) if IMBALANCE in losses.metrics else None

    def lookup(self, batch: PackBatch) -> tuple[Tensor | None, Tensor | None]:
        """See ``forward.ReferenceValues``."""
        device = batch.sequence_tokens.device
        return tuple(  # type: ignore[return-value]
            None if values is None else torch.from_numpy(values[batch.pair_ids]).flatten().to(device)
            for values in (self.conditional, self.unconditional)
        )


class NoReference:
    """For losses that read no reference."""

    def lookup(self, batch: PackBatch) -> tuple[None, None]:
        """See ``forward.ReferenceValues``."""
        return None, None


class ResidentReference:
    """A frozen model beside the policy that scores each step's microbatches just before the policy's own pass."""

    def __init__(self, model: list[Any], requirements: Requirements, scoring: TokenScoring) -> None:
        self.model = model
        self.requirements = requirements
        self.scoring = scoring
        self._values: dict[bytes, tuple[Tensor | None, Tensor | None]] = {}

    def lookup(self, batch: PackBatch) -> tuple[Tensor | None, Tensor | None]:
        """See ``forward.ReferenceValues``."""
        return self._values[_batch_key(batch)]

    def wrap(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """A schedule that first scores its microbatches with the reference, then runs as before.

        The reference's pass is a schedule of its own, before the policy's: started inside a forward step it would
        dead-lock pipeline stages.
        """

        def run(*args: Any, data_iterator: Any, num_microbatches: int, **kwargs: Any) -> Any:
            iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
            batches = [[next(iterator) for _ in range(num_microbatches)] for iterator in iterators]
            self._score(batches, num_microbatches)
            again = [iter(chunk) for chunk in batches]
            data_iterator = again if isinstance(data_iterator, list) else again[0]
            return schedule(*args, data_iterator=data_iterator, num_microbatches=num_microbatches, **kwargs)

        return run

    def _score(self, batches: list[list[PackBatch]], count: int) -> None:
        passes = [False, True] if self.requirements.comprehension else [False]
        scores = [
            score_batches(self.model, [iter(chunk) for chunk in batches], count, self.scoring, unconditional=which)
            for which in passes
        ]
        # Only the last stage has scores, and only it looks them up; its last chunk's batches are the ones it uses.
        self._values = {
            _batch_key(batch): (values[0], values[1] if len(values) > 1 else None)
            for batch, *values in zip(batches[-1], *scores, strict=False)
        }


def _batch_key(batch: PackBatch) -> bytes:
    """All pair ids: a pair may come twice in a step, in packs with other pairs. Equal packs have equal values."""
    return batch.pair_ids.tobytes()


@torch.no_grad()
def score_batches(
    model: list[Any],
    iterators: list[Iterator[PackBatch]],
    count: int,
    scoring: TokenScoring,
    *,
    unconditional: bool = False,
) -> list[Tensor]:
    """Run ``count`` microbatches forward only. Collective over the model's ranks.

    Args:
        model: this rank's chunks; DDP is stepped around, its hooks are for training.
        iterators: one per chunk.

    Returns:
        On the last pipeline stage: per microbatch [S] float64. Elsewhere: an empty list.
    """
    chunks = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in model]
    batch_length = _pack_length()
    schedule = get_forward_backward_func()
    with evaluating(chunks), weights_at_rest(model):
        scores: list[Tensor] = schedule(
            forward_step_func=ScoringStep(scoring, unconditional),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=count,
            seq_length=batch_length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return scores


def _pack_length() -> int:
    from megatron.training import get_args

    return int(get_args().seq_length)


def score_pairs(
    model: list[Any],
    ids: IntArray,
    sizes: IntArray,
    make: PackMaker,
    scoring: TokenScoring,
    *,
    unconditional: bool,
) -> FloatArray:
    """Score every pair once with ``model``, packed as tightly as they go. Collective over all ranks.

    Args:
        ids: [n] pairs to score; sizes: [n] pack positions each takes.
        unconditional: score the answers after the empty prompt.

    Returns:
        [n, 2] log-probs of chosen and rejected, in nats, on every rank.
    """
    ranks = parallel_state.get_data_parallel_world_size()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    packs = pack_all(ids, sizes, make.length, ranks * stages)  # interleaved stages take microbatches in groups
    own = packs[parallel_state.get_data_parallel_rank() :: ranks]
    place = np.full(int(ids.max()) + 1, -1)
    place[ids] = np.arange(len(ids))
    result = np.zeros((len(ids), 2))
    writes = _is_one_of_each_replica()
    per_call = _PACKS_PER_CALL * stages
    label = "scoring answers after the empty prompt" if unconditional else "scoring the reference"
    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file needs no animation
    quiet = not is_rank_zero()
    with tqdm(
        total=len(ids), desc=label, unit=" pairs", disable=quiet, mininterval=interval, maxinterval=interval
    ) as bar:
        for start in range(0, len(own), per_call):
            part = own[start : start + per_call]
            iterators = [_packs_of(part, make, unconditional) for _ in model]
            scores = score_batches(model, iterators, len(part), scoring)
            if writes:
                for pack, score in zip(part, scores, strict=True):
                    result[place[pack]] = score.reshape(-1, 2).cpu().numpy()
            bar.update(sum(map(len, packs[start * ranks : (start + len(part)) * ranks])))
    return sum_over_ranks(torch.from_numpy(result)).numpy()


def _packs_of(packs: Sequence[IntArray], make: PackMaker, unconditional: bool) -> Iterator[PackBatch]:
    for pack in packs:
        yield make(pack, unconditional=unconditional)


def _is_one_of_each_replica() -> bool:
    """Of the ranks that hold the same scores, exactly one counts them."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )
