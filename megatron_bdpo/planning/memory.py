"""Memory of a GPU by part: an estimate from exact parameters and counted activations, and what it leaves out.

| part          | bytes                                                                                       |
|---------------|---------------------------------------------------------------------------------------------|
| weights       | 2 a parameter, fp32 4; with --fp8 2 more for the copies of the layers' that are multiplied  |
| gradients     | 4 a parameter, in DDP's buffers                                                             |
| optimizer     | Adam: 12 a parameter (fp32 weight and two moments), fp32 8; distributed: / (dp cp)          |
| reference     | resident: its weights; precomputed: nothing                                                 |
| activations   | see ``planning.activations``                                                                |
| log-probs     | last stage: scored hidden states and their gradient; fused: a chunk of logits, plain: all   |
| working space | the largest of what exists only while a layer is computed, beyond the log-probs' part       |
| reserve       | an assumption: CUDA context and NCCL's buffers, and a share for fragmentation               |

With adapters, gradients and optimizer are theirs alone, a frozen weight is its 2 (4) bytes, and a resident reference is
the model without them, at no cost.

A GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_bdpo.planning.activations import Pack, Recompute, layer_bytes, norm_bytes, stage_bytes
from megatron_bdpo.planning.adapters import Adapters, adapter_parameters
from megatron_bdpo.planning.model import ModelShape, Parameters, Split, stage_parameters

GB = 10**9

#: Assumed: a CUDA context takes about half a GB, NCCL a few hundred MB for each of a handful of communicators.
FIXED_RESERVE = 3 * GB
#: Assumed, of everything else: what the allocator cannot use.
FRAGMENTATION = 0.05

#: Of one chunk of the fused log-probs' logits, and the largest softmax they keep: see logprobs.fused_linear.
CHUNK_BYTES = 64 * 2**20
KEPT_BYTES = 5 * 2**29


@dataclass(frozen=True, kw_only=True)
class JobShape:
    """What memory depends on beside the model."""

    ranks: int
    split: Split
    pack_length: int
    microbatches: int
    """Of a data-parallel rank in a step."""
    precision: str = "bf16"
    """bf16, fp16, fp32 or fp8."""
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    gradient_bytes: int = 4
    recompute: Recompute = field(default_factory=Recompute)
    resident: bool = False
    """A second model is kept as the reference."""
    adapters: Adapters | None = None
    """Trained beside the frozen model; None: the whole model is trained."""
    fused_log_probs: bool = True
    kept_softmax_bytes: float = KEPT_BYTES
    """The largest softmax that the fused log-probs keep for backward."""
    fused_layers: bool = True
    """Transformer Engine's layers, or Megatron's local ones."""
    keys: float = 1.5
    """Keys attended to per position, see ``planning.activations``."""
    scored_share: float = 1.0
    """Positions of a pack that are scored; prompts and padding are not."""

    @property
    def weight_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def data_parallel(self) -> int:
        tensor, pipeline, context, _ = self.split.layout.sizes()
        return self.ranks // (tensor * pipeline * context)

    def pack(self) -> Pack:
        """A microbatch of it."""
        return Pack(
            length=self.pack_length,
            bytes=self.weight_bytes,
            sequence_parallel=self.sequence_parallel,
            fused=self.fused_layers,
            keys=self.keys,
            adapters=self.adapters,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank of one pipeline stage, by part."""

    stage: int
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def fullest(model: ModelShape, job: JobShape) -> Memory:
    """The stage that needs most."""
    return max((stage_memory(model, job, stage) for stage in range(job.split.layout.pipeline)), key=lambda m: m.total)


def stage_memory(model: ModelShape, job: JobShape, stage: int) -> Memory:
    """What each rank of a pipeline stage needs."""
    is_last = stage == job.split.layout.pipeline - 1
    kept, recomputed = stage_bytes(model, job.split, job.pack(), job.recompute, stage, job.microbatches)
    log_probs = _log_probs(model, job) if is_last else 0.0
    parts = {
        **state(model, job, stage),
        "activations": kept,
        "log-probs": log_probs,
        # The backward pass is done with the log-probs before it comes to the layers.
        "working space": max(0.0, recomputed + _working_space(model, job) - log_probs),
    }
    parts["reserve"] = FIXED_RESERVE + FRAGMENTATION * sum(parts.values())
    return Memory(stage, parts)


def state(model: ModelShape, job: JobShape, stage: int) -> dict[str, float]:
    """Weights, gradients, optimizer and reference of a stage's rank: what is there between steps."""
    own, trained = stage_parameters(model, job.split, stage), trained_parameters(model, job, stage)
    moments = 8 if job.precision == "fp32" else 12
    weights = float(own.total * job.weight_bytes)
    copies = 2 * (own.layers + own.experts) if job.precision == "fp8" else 0
    shared = trained.total - trained.experts
    return {
        "weights": weights + copies + (trained.total * job.weight_bytes if job.adapters else 0),
        "gradients": float(trained.total * job.gradient_bytes),
        "optimizer": moments * (shared / _optimizer_ranks(job) + trained.experts / _expert_optimizer_ranks(job)),
        "reference": weights if job.resident else 0.0,
    }


def trained_parameters(model: ModelShape, job: JobShape, stage: int) -> Parameters:
    """Those of a stage's rank that have gradients."""
    if job.adapters:
        return adapter_parameters(model, job.split, job.adapters, stage)
    return stage_parameters(model, job.split, stage)


def _optimizer_ranks(job: JobShape) -> int:
    return job.data_parallel * job.split.layout.context if job.distributed_optimizer else 1


def _expert_optimizer_ranks(job: JobShape) -> int:
    layout = job.split.layout
    return (
        job.ranks // (job.split.expert_tensor_size() * layout.expert * layout.pipeline)
        if job.distributed_optimizer
        else 1
    )


def kept_of_output(model: ModelShape, job: JobShape) -> float:
    """What the last stage keeps beside its layers of the one microbatch that is there."""
    layer = layer_bytes(model, job.split, job.pack(), has_experts=False)
    final_norm = norm_bytes(model, layer)  # of its output, the scored positions
    return final_norm + _scored(job) * model.hidden * job.weight_bytes + kept_softmax(model, job)


def kept_softmax(model: ModelShape, job: JobShape) -> float:
    """Bytes of the softmax that the last stage keeps for backward; 0 where it makes the logits a second time."""
    tensor = job.split.layout.tensor
    size = _scored(job) * model.padded_vocab(tensor) / tensor * job.weight_bytes
    return size if job.fused_log_probs and size <= job.kept_softmax_bytes else 0.0


def _scored(job: JobShape) -> float:
    """Scored positions of a rank."""
    return job.scored_share * job.pack_length / job.split.layout.context


def _log_probs(model: ModelShape, job: JobShape) -> float:
    kept, scored, tensor = kept_of_output(model, job), _scored(job), job.split.layout.tensor
    rows = model.padded_vocab(tensor) / tensor
    # Returned to autograd; where it is added to main_grad, a stand-in of its size.
    weight_gradient = 0 if job.adapters else rows * model.hidden * job.weight_bytes
    if job.fused_log_probs:
        hidden_gradient = 4 * scored * model.hidden
        chunk = min(CHUNK_BYTES, 4 * scored * rows)
        made_again = 0 if kept_softmax(model, job) else chunk / 2  # its gradient, in half precision
        return kept + hidden_gradient + chunk + made_again + weight_gradient
    # Logits, their softmax in fp32 for the backward pass, and the gradient of both.
    return kept + scored * rows * (job.weight_bytes + 4 + 4 + job.weight_bytes) + weight_gradient


def _working_space(model: ModelShape, job: JobShape) -> float:
    """While an MLP is computed backwards: its gathered input and that input's gradient, and two inner gradients.

    With adapters also the scaled gradient of what they add to gate and up; for DoRA with its products in fp32.
    """
    tensor, context = job.split.layout.tensor, job.split.layout.context
    positions = job.pack_length / context
    kinds = {*map(model.has_experts, range(model.layers))}
    ffn = max(model.expert_ffn * model.expert_top_k if has_experts else model.ffn for has_experts in kinds)
    into = 2 if model.gated else 1
    inner = (into + 1) * ffn / tensor
    if job.adapters:
        inner += into * ffn / tensor * (1 + job.adapters.dora * 2 * 4 / job.weight_bytes)
    return positions * job.weight_bytes * (2 * model.hidden + inner)
