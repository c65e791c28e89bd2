"""Seconds of a step by arithmetic: products, bytes between GPUs, waiting. Nothing of it is measured.

A layer on a rank, s = T / cp positions of a pack, e bytes an element; a collective of w bytes takes
w (n - 1) / n / bandwidth + latency (``planning.machine``):

| what                          | forward                               | backward                                     |
|-------------------------------|---------------------------------------|----------------------------------------------|
| products                      | 2 s parameters / tp                   | twice that                                   |
| attention                     | 4 s K n d / tp, K keys a query sees:  | twice that and a half                        |
|                               | in a layer with a window fewer        |                                              |
| tensor parallelism, exposed   | 2 all-gathers, 2 reduce-scatters of   | 2 all-gathers (gradients of what the         |
|                               | s H e                                 | reduce-scatters put out)                     |
| ... behind the products of    |                                       | 2 all-gathers (inputs, once more), 2 reduce- |
| query-key-value and the MLP   |                                       | scatters of s H e: what is longer than those |
| context parallelism           | all-gather of keys and values,        | reduce-scatter of their gradients            |
|                               | 2 T g d e / tp                        |                                              |
| expert parallelism            | 2 all-to-alls of s k H e / tp         | the same                                     |

Without sequence parallelism two all-reduces take the place of the four forward, and two behind products of all
backward. k is the router's choice of experts. Recomputation does the forward part of what it recomputes once more. On
the last stage log-probs do three products of N H V / tp (four where the fused ones do not keep the softmax and make the
logits a second time), with an all-gather and a reduce-scatter of s H e.

Beside a frozen model adapters do their own products, forward and twice that backward, and send u = A x, s n r e, once
each way beside each layer. The model's products have no gradients of weights: backward is as long as forward, log-probs
do one product less, the inputs of query-key-value and the MLP are not gathered once more, and nothing hides the
reduce-scatters (all-reduces) of their gradients.

    step = M x slowest stage + (p - 1) / v x mean stage + sends + gradients and weights + optimizer

Sends: s H e / tp to the next stage and back, for each microbatch and chunk. 1F1B waits for them. Interleaved ones are
behind half a chunk's work (Megatron's default), but for those of the first microbatch. dp x cp ranks share gradients (a
reduce-scatter, behind the last backward passes: --overlap-grad-reduce) and weights (an all-gather, behind the first
forward passes: --overlap-param-gather). A chunk's gradients are complete with its own last microbatch, p microbatches
before those of the chunk before it; what is longer than these, or the last chunk's than its one, is counted. The
optimizer reads and writes 30 bytes for each of its parameters.

Ranks are neighbours in Megatron's order: tensor, context, expert, data, pipeline. Not counted: embeddings, kernels'
launches, the data loader, ranks that wait for another's longer pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_bdpo.planning.adapters import Adapters, Linear, attention_linears, dense_mlp_linears, mlp_linears
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.machine import Machine
from megatron_bdpo.planning.memory import JobShape, kept_softmax, trained_parameters
from megatron_bdpo.planning.model import ModelShape, Split, latent_parameters

#: Bytes that Adam reads and writes a parameter: fp32 gradient, weight and two moments read, the last three written,
#: bf16 weight written.
_OPTIMIZER_BYTES = 4 + 12 + 12 + 2

_ALONE = Layout(1, 1, 1)


@dataclass(frozen=True)
class Pass:
    """Seconds of one microbatch's way through a part of the model, forward or backward."""

    products: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            self.products + other.products,
            self.tensor + other.tensor,
            self.context + other.context,
            self.expert + other.expert,
        )

    @property
    def seconds(self) -> float:
        return self.products + self.tensor + self.context + self.expert


@dataclass(frozen=True)
class StepTime:
    """A step, by part: the parts of the slowest stage, and what comes beside them. In seconds."""

    parts: Mapping[str, float]
    tokens: float
    """Of all ranks."""
    gpus: int
    operations: float
    """Of the model and its adapters, of the tokens: without recomputation and padding."""
    peak: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_gpu(self) -> float:
        """In a second."""
        return self.tokens / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Share of the GPUs' peak that goes into the model's own arithmetic: what training it takes, and no more."""
        return self.operations / self.seconds / self.gpus / self.peak

    @property
    def waiting(self) -> float:
        """Share of the step in which stages wait: for their first and after their last microbatch."""
        return self.parts["waiting"] / self.seconds


def step_time(model: ModelShape, job: JobShape, machine: Machine, tokens: float, keys: float) -> StepTime:
    """Of one optimizer step.

    Args:
        tokens: of a step, over all ranks; the other positions of its packs are padding.
        keys: that a query sees, on average.
    """
    split, stages = job.split, job.split.layout.pipeline
    ways = [_stage(model, job, machine, keys, stage) for stage in range(stages)]
    totals = [forward.seconds + backward.seconds for forward, backward in ways]
    slowest = max(range(stages), key=lambda stage: totals[stage])
    forward, backward = ways[slowest]
    both = forward + backward
    parts = {
        "products": job.microbatches * both.products,
        "tensor parallelism": job.microbatches * both.tensor,
        "context parallelism": job.microbatches * both.context,
        "expert parallelism": job.microbatches * both.expert,
        "waiting": (stages - 1) / split.chunks * sum(totals) / stages,
        "sends": _sends(model, job, machine, totals[slowest]),
        **_data_parallel(model, job, machine, slowest, forward.seconds, backward.seconds),
    }
    per_token = operations(model, keys, job.scored_share, job.adapters)
    return StepTime(parts, tokens, job.ranks, tokens * per_token, machine.peaks[job.precision])


def operations(model: ModelShape, keys: float, scored_share: float, adapters: Adapters | None = None) -> float:
    """Floating-point operations of a token, forward and backward: the usual 6 a parameter, and attention.

    Beside adapters, 4 a frozen parameter: its own gradient is not computed.
    """
    whole = Split(layout=_ALONE)
    layers = [
        _forward_operations(model, whole, 1, model.keys_seen(layer, keys), model.has_experts(layer))
        for layer in range(model.layers)
    ]
    attention = sum(each[1] for each in layers)
    products = sum(map(sum, layers)) - attention + 2 * scored_share * model.hidden * model.vocab
    if not adapters:
        return 3 * (products + attention)
    added = [
        _adapter_operations(model, whole, adapters, 1, model.has_experts(layer), sequence_parallel=False)
        for layer in range(model.layers)
    ]
    return 2 * products + 3 * (attention + sum(map(sum, added)))


# Layers --------------------------------------------------------------------------------------------------------------


def _forward_operations(
    model: ModelShape, split: Split, positions: float, keys: float, has_experts: bool
) -> tuple[float, float, float, float]:
    """Of one layer on a rank: query-key-value, attention, projection, MLP."""
    tensor, hidden = split.layout.tensor, model.hidden
    projected = (model.heads / tensor + 2 * max(model.groups / tensor, 1)) * model.head
    inner = (3 if model.gated else 2) * hidden
    mlp = inner * model.ffn / tensor
    if has_experts:
        shared = inner * model.shared_expert_ffn / tensor
        mlp = inner * model.expert_top_k * model.expert_ffn / tensor + shared + hidden * model.experts / tensor
    into = latent_parameters(model, tensor) if model.latents else hidden * projected  # norms are next to nothing
    return (
        2 * positions * into,
        2 * positions * keys * model.heads * (model.head + model.value) / tensor,
        2 * positions * hidden * model.heads * model.value / tensor,
        2 * positions * mlp,
    )


def _adapter_operations(
    model: ModelShape, split: Split, adapters: Adapters, positions: float, has_experts: bool, *, sequence_parallel: bool
) -> tuple[float, float]:
    """Forward, of one layer's adapters on a rank: beside attention, and in the MLP."""

    def of(linears: tuple[Linear, ...], positions: float, ranks: int, *, narrow: bool) -> float:
        return sum(each.operations(adapters, positions, ranks, sequence_parallel=narrow) for each in linears)

    tensor, within = split.layout.tensor, split.expert_tensor_size()
    attention, mlp = attention_linears(model), dense_mlp_linears(model, has_experts=has_experts)
    routed = 0.0
    if has_experts:
        own = positions / (tensor if sequence_parallel else 1) * model.expert_top_k * within
        routed = of(mlp_linears(model, model.expert_ffn), own, within, narrow=False)
    return (
        of(attention, positions, tensor, narrow=sequence_parallel),
        of(mlp, positions, tensor, narrow=sequence_parallel) + routed,
    )


def layer_passes(model: ModelShape, job: JobShape, machine: Machine, keys: float, *, has_experts: bool) -> list[Pass]:
    """One layer and one microbatch: forward and backward, with what the backward recomputes."""
    layout, rate = job.split.layout, machine.rate(job.precision)
    positions = job.pack_length / layout.context
    qkv, attention, projection, mlp = (
        each / rate for each in _forward_operations(model, job.split, positions, keys, has_experts)
    )
    one = machine.collective(positions * model.hidden * job.weight_bytes, 1, layout.tensor)
    context = _context(model, job, machine)
    expert = _experts(model, job, machine) if has_experts else 0.0
    products = qkv + attention + projection + mlp
    forward = Pass(products, 4 * one, context, expert)
    if job.adapters:
        beside, within = _adapters(model, job, machine, job.adapters, has_experts=has_experts)
        backward = Pass(products + 1.5 * attention, 4 * one, context, expert)
        for each in (beside, within):
            forward, backward = forward + each, backward + Pass(2 * each.products, each.tensor)
        mlp_again = Pass(mlp, 2 * one, 0.0, expert) + within
        return [forward, backward + _recomputed(job, forward, attention, mlp_again, has_experts=has_experts)]
    hidden = [one - qkv, one - qkv, one - mlp, one - mlp] if job.sequence_parallel else [2 * one - qkv, 2 * one - mlp]
    backward = Pass(
        2 * products + attention / 2,
        (2 * one if job.sequence_parallel else 0.0) + sum(max(0.0, each) for each in hidden),
        context,
        expert,
    )
    again = _recomputed(job, forward, attention, Pass(mlp, 2 * one, 0.0, expert), has_experts=has_experts)
    return [forward, backward + again]


def _adapters(
    model: ModelShape, job: JobShape, machine: Machine, adapters: Adapters, *, has_experts: bool
) -> tuple[Pass, Pass]:
    """The forward pass of one layer's adapters: of those beside attention, and of the MLP's."""
    layout = job.split.layout
    positions = job.pack_length / layout.context
    products = _adapter_operations(
        model, job.split, adapters, positions, has_experts, sequence_parallel=job.sequence_parallel
    )

    def sent(linears: tuple[Linear, ...]) -> float:
        low = [positions * len(each.adapted(adapters)) * adapters.rank * job.weight_bytes for each in linears]
        return sum(machine.collective(size, 1, layout.tensor) for size in low)

    linears = attention_linears(model), dense_mlp_linears(model, has_experts=has_experts)
    beside, within = (
        Pass(each / machine.rate(_outside_fp8(job)), sent(own)) for each, own in zip(products, linears, strict=True)
    )
    return beside, within


def _recomputed(job: JobShape, forward: Pass, attention: float, mlp: Pass, *, has_experts: bool) -> Pass:
    recompute = job.recompute
    if recompute.granularity == "full":
        return forward
    again = Pass()
    if recompute.granularity == "selective":
        again += mlp if recompute.of_mlp(has_experts=has_experts) else Pass()
        again += Pass(attention) if "core_attn" in recompute.modules else Pass()
    return again


def _context(model: ModelShape, job: JobShape, machine: Machine) -> float:
    """One all-gather of keys and values, or the reduce-scatter of their gradients."""
    layout = job.split.layout
    groups = max(model.groups / layout.tensor, 1)
    return machine.collective(
        job.pack_length * groups * (model.head + model.value) * job.weight_bytes, layout.tensor, layout.context
    )


def _experts(model: ModelShape, job: JobShape, machine: Machine) -> float:
    """To the experts and back, and within an expert's tensor-parallel ranks to all of them and back."""
    layout, within = job.split.layout, job.split.expert_tensor_size()
    own = job.pack_length / layout.context / (layout.tensor if job.sequence_parallel else 1)
    routed = own * model.expert_top_k * model.hidden * job.weight_bytes
    across = machine.collective(routed, within, layout.expert)
    return 2 * (across + machine.collective(routed * within, 1, within))


# Stages --------------------------------------------------------------------------------------------------------------


def _stage(model: ModelShape, job: JobShape, machine: Machine, keys: float, stage: int) -> tuple[Pass, Pass]:
    """One microbatch through all chunks of a stage."""
    numbers = [number for chunk in job.split.stage_layers(model.layers, stage) for number in chunk]
    kinds = {number: (model.keys_seen(number, keys), model.has_experts(number)) for number in numbers}
    passes = {
        kind: layer_passes(model, job, machine, kind[0], has_experts=kind[1]) for kind in dict.fromkeys(kinds.values())
    }
    forward = backward = Pass()
    for number in numbers:
        there, back = passes[kinds[number]]
        forward, backward = forward + there, backward + back
    if stage == job.split.layout.pipeline - 1:
        there, back = log_prob_passes(model, job, machine)
        forward, backward = forward + there, backward + back
    return forward, backward


def log_prob_passes(model: ModelShape, job: JobShape, machine: Machine) -> tuple[Pass, Pass]:
    """The output layer and the log-probs of one microbatch. Never in FP8."""
    layout = job.split.layout
    positions = job.pack_length / layout.context
    rows = model.padded_vocab(layout.tensor) / layout.tensor
    product = 2 * job.scored_share * positions * model.hidden * rows / machine.rate(_outside_fp8(job))
    one = machine.collective(positions * model.hidden * job.weight_bytes, 1, layout.tensor)
    makes_logits_again = job.fused_log_probs and not kept_softmax(model, job)
    backward = 1 + makes_logits_again + (not job.adapters)
    return Pass(product, one), Pass(backward * product, one)


def _outside_fp8(job: JobShape) -> str:
    return "bf16" if job.precision == "fp8" else job.precision


def _sends(model: ModelShape, job: JobShape, machine: Machine, stage: float) -> float:
    layout, chunks = job.split.layout, job.split.chunks
    if layout.pipeline == 1:
        return 0.0
    size = job.pack_length / layout.context * model.hidden * job.weight_bytes
    size /= layout.tensor if job.sequence_parallel else 1
    one = machine.send(size, layout.tensor * layout.context * job.data_parallel, layout.pipeline)
    exposed = one if chunks == 1 else max(0.0, one - stage / chunks / 2)
    return 2 * (job.microbatches * chunks * exposed + (layout.pipeline - 1) * one)


def _data_parallel(
    model: ModelShape, job: JobShape, machine: Machine, stage: int, forward: float, backward: float
) -> dict[str, float]:
    """Gradients and weights beyond what the last backward and the first forward pass cover, and the optimizer."""
    layout, parameters = job.split.layout, trained_parameters(model, job, stage)
    shared, replicas = parameters.total - parameters.experts, job.data_parallel * layout.context
    own = layout.expert * job.split.expert_tensor_size()
    expert_replicas = job.ranks // (own * layout.pipeline)
    gradients = machine.collective(shared * job.gradient_bytes, layout.tensor, replicas)
    gradients += machine.collective(parameters.experts * job.gradient_bytes, own, expert_replicas)
    if job.distributed_optimizer:
        weights = gradients * job.weight_bytes / job.gradient_bytes
        mine = shared / replicas + parameters.experts / expert_replicas
    else:  # an all-reduce
        weights, gradients, mine = 0.0, 2 * gradients, float(parameters.total)
    return {
        "data parallelism": _beyond(gradients, backward, job) + _beyond(weights, forward, job),
        "optimizer": _OPTIMIZER_BYTES * mine / (machine.memory * machine.memory_share),
    }


def _beyond(collective: float, microbatch: float, job: JobShape) -> float:
    """Of a collective over the weights of all chunks, what the passes of ``microbatch`` seconds do not cover."""
    chunks = job.split.chunks
    covered = microbatch / chunks * (1 + job.split.layout.pipeline * (chunks - 1))
    return max(0.0, collective - covered, (collective - microbatch) / chunks)
