"""What a microbatch leaves behind for the backward pass, in bytes.

Counted are the tensors that autograd keeps on a rank: s positions (a pack's T over the cp ranks), e bytes an element.
"/ sp" marks what sequence parallelism divides by tp.

| kept of a layer                                | bytes                                            |
|------------------------------------------------|--------------------------------------------------|
| inputs and outputs of the two norms            | 4 s H e / sp                                     |
| attention: queries and outputs                 | 2 s n d e / tp, and 4 s n / tp of log-sum-exps   |
| attention: keys and values, gathered           | 2 k T g d e / tp                                 |
| projection: its input                          | s n d e / tp                                     |
| MLP: gate and up projection, activation        | 3 s F e / tp (2 s F e / tp without a gate)       |

k is how often a position's key is gathered: a prompt's once for itself and once for each of its two answers, so 1 for
plain sequences and nearly 3 for long prompts with short answers. With context parallelism that is an upper bound.

This is what Transformer Engine's layers and flash attention keep. Megatron's local layers keep more, ``fused=False``:
an RMSNorm's input and normalised input in fp32, the SiLU of the gate and the up projection once more, and rotary
tables, 4 s d e.
With --fp8 the inputs of matrix products are kept in one byte; they are counted in two.

Beside a frozen model adapters keep the same inputs, and some more (``planning.adapters``).

Recomputation. full: the layer's input only, s H e / sp, and a layer whole while it is recomputed. selective: core_attn
keeps queries, keys and values as they come from their projection, and as they are after the rotation; mlp (moe) keeps
its input only; layernorm drops what the norms put out.

A stage holds as many microbatches as its schedule has forward passes ahead of the first backward one. 1F1B: stage i of
p holds min(M, p - i). Interleaved, with v chunks: min(v M, 2 (p - i - 1) + (v - 1) p + 1) chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.adapters import Adapters, Linear, attention_linears, mlp_linears
from megatron_bdpo.planning.model import ModelShape, Split

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Megatron's ``--recompute-...`` flags."""

    granularity: str | None = None
    """None, 'selective' or 'full'."""
    modules: frozenset[str] = field(default=frozenset())
    """Of 'selective'."""
    method: str = "uniform"
    """Of 'full': 'uniform', or 'block': only the first layers of each chunk."""
    layers: int = 1
    """Of 'full': layers recomputed from one kept input; with 'block' how many of a chunk are recomputed."""

    def of_mlp(self, *, has_experts: bool) -> bool:
        """Whether 'selective' names the MLP of a layer of this kind."""
        return ("moe" if has_experts else "mlp") in self.modules

    def __str__(self) -> str:
        if self.granularity == "selective":
            return f"selective ({', '.join(sorted(self.modules))})"
        if self.granularity == "full" and self.method == "block":
            return f"full, {self.layers} layers of each chunk"
        return self.granularity or "none"


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A microbatch on a rank: what activations depend on beside the model and its split."""

    length: int
    """Positions, over all context-parallel ranks."""
    bytes: int
    """Of an activation's element."""
    sequence_parallel: bool
    fused: bool = True
    """Layers of Transformer Engine and flash attention, or Megatron's local ones."""
    keys: float = 1.5
    """Keys attended to per position: see above."""
    adapters: Adapters | None = None
    """Those that are trained; None: the whole model is."""


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps of one microbatch."""

    input: float
    """Of these, the hidden states that come in."""
    norms: float
    norm_outputs: float
    """Of these, what the norms put out."""
    core_attention: float
    projection: float
    mlp: float
    core_attention_input: float
    """What is kept in the place of core attention that is recomputed."""
    has_experts: bool

    @property
    def total(self) -> float:
        return self.norms + self.core_attention + self.projection + self.mlp


def layer_bytes(model: ModelShape, split: Split, pack: Pack, *, has_experts: bool) -> LayerBytes:
    """Without recomputation."""
    tensor, positions = split.layout.tensor, pack.length / split.layout.context
    residual = positions * model.hidden * pack.bytes / _narrow(tensor, pack)
    queries = positions * model.heads * model.head * pack.bytes / tensor
    # With fewer groups than tensor-parallel ranks, ranks share a group.
    groups_of_pack = pack.length * max(model.groups / tensor, 1) * pack.bytes
    keys_of_pack, values_of_pack = groups_of_pack * model.head, groups_of_pack * model.value
    outputs_of_heads = positions * model.heads * model.value * pack.bytes / tensor
    qkv, projection = attention_linears(model)
    into, _ = mlp_linears(model, model.ffn)
    # A router reads the second norm's output too.
    read = (_keeps_input(qkv, pack), has_experts or _keeps_input(into, pack))
    # Where norms are behind attention and MLP, these keep their inputs all the same.
    outputs = residual * (max(read) if model.norms == 1 else sum(read))
    return LayerBytes(
        input=residual,
        norms=model.norms * _norm(model, pack, residual) + outputs,
        norm_outputs=outputs,
        core_attention=queries
        + outputs_of_heads
        + positions * model.heads * _FP32 / tensor
        + pack.keys * (keys_of_pack + values_of_pack),
        projection=_keeps_input(projection, pack) * outputs_of_heads
        + (_latents(model, split, pack) if model.latents else 0)
        + (0 if pack.fused else 4 * positions * _rotated(model) * pack.bytes)
        + _qk_norm(model, split, pack)
        + _adapters((qkv, projection), positions, tensor, pack),
        mlp=_experts(model, split, pack) if has_experts else _mlp(model, split, pack, model.ffn),
        core_attention_input=queries + outputs_of_heads + (2 * keys_of_pack + values_of_pack) / split.layout.context,
        has_experts=has_experts,
    )


def norm_bytes(model: ModelShape, layer: LayerBytes) -> float:
    """What one of a layer's norms keeps, but for its output."""
    return (layer.norms - layer.norm_outputs) / model.norms


def _rotated(model: ModelShape) -> int:
    """Part of a head."""
    return model.latents.rotated if model.latents else model.head


def _latents(model: ModelShape, split: Split, pack: Pack) -> float:
    """Of multi-latent attention: what its norms and matrices read, and the latents themselves."""
    assert model.latents is not None
    narrow = pack.length / split.layout.context / _narrow(split.layout.tensor, pack) * pack.bytes
    normed = model.latents.queries + model.latents.keys
    # A norm keeps its input, in local layers normalised too, and the layer behind it what comes out.
    return narrow * normed * (2 if pack.fused else 2 + _FP32 / pack.bytes)


def _norm(model: ModelShape, pack: Pack, residual: float) -> float:
    """A norm, but for its output."""
    if not model.rms_norm or pack.fused:
        return residual
    # The normalised input is for the gradient of the norm's weight.
    return residual * (1 if pack.adapters else 2) * _FP32 / pack.bytes


def _narrow(ranks: int, pack: Pack) -> int:
    """Ranks that share the positions where a layer is not split."""
    return ranks if pack.sequence_parallel else 1


def _keeps_input(linear: Linear, pack: Pack) -> bool:
    """For the gradient of its weight, or of its adapters'."""
    return not pack.adapters or bool(linear.adapted(pack.adapters))


def _adapters(linears: tuple[Linear, ...], positions: float, ranks: int, pack: Pack) -> float:
    """Of a layer's linear layers, but for their inputs."""
    if not pack.adapters:
        return 0.0
    return sum(each.kept(pack.adapters, positions, pack.bytes, ranks, _narrow(ranks, pack)) for each in linears)


def _qk_norm(model: ModelShape, split: Split, pack: Pack) -> float:
    """Norms of queries and keys: all that comes from their projection, and the queries copied out of it."""
    if not model.qk_norm:
        return 0.0
    heads, groups = model.heads / split.layout.tensor, max(model.groups / split.layout.tensor, 1)
    copied = heads if groups > 1 else 0  # the queries of one group lie together as they are
    if model.qk_norm_over_heads:  # in fp32: its input and its normalised input
        both = 2 * (heads + groups) * _FP32
        if pack.bytes == _FP32:  # the input is what comes from the projection
            both += (groups + copied) * _FP32
        return pack.length / split.layout.context * both * model.head
    kept = heads + 2 * groups + copied + (0 if pack.fused else heads + groups)
    return pack.length / split.layout.context * kept * model.head * pack.bytes


def _mlp(model: ModelShape, split: Split, pack: Pack, ffn: int) -> float:
    """But for its input, which is a norm's output."""
    tensor, positions = split.layout.tensor, pack.length / split.layout.context
    into, down = mlp_linears(model, ffn)
    kept = (2 if model.gated else 1) + _keeps_input(down, pack)
    if not pack.fused and model.gated:
        kept += 2
    kept += _of_activation(model)
    return positions * kept * ffn * pack.bytes / tensor + _adapters((into, down), positions, tensor, pack)


def _of_activation(model: ModelShape) -> int:
    """What else than SiLU's: in units of a position's inner values."""
    return model.quick_gelu + model.clamped


def _experts(model: ModelShape, split: Split, pack: Pack) -> float:
    """Each position goes to the router's choice of experts, as many to each rank on average.

    Kept: the experts' inputs, what an MLP keeps (in local layers also times the router's probabilities), and the
    router's logits and probabilities.
    """
    shared = _mlp(model, split, pack, model.shared_expert_ffn) if model.shared_expert_ffn else 0.0
    positions = pack.length / split.layout.context / _narrow(split.layout.tensor, pack)
    # The tensor-parallel ranks of an expert see the positions of all of them, each its part of the inner ones.
    ranks = split.expert_tensor_size()
    routed = positions * model.expert_top_k * ranks
    into, down = mlp_linears(model, model.expert_ffn)
    inner = (2 if model.gated else 1) + _keeps_input(down, pack) + (0 if pack.fused else 1 + 2 * model.gated)
    inner += _of_activation(model)
    per_position = _keeps_input(into, pack) * model.hidden + inner * model.expert_ffn / ranks
    own = model.experts // split.layout.expert
    added = 0.0
    if pack.adapters:
        # Megatron sums over the ranks what experts give: they have whole positions on both sides.
        parts = (each.kept(pack.adapters, routed, pack.bytes, ranks, 1, copies=own) for each in (into, down))
        added = sum(parts)
    return routed * per_position * pack.bytes + 3 * positions * model.experts * _FP32 + shared + added


# Stages --------------------------------------------------------------------------------------------------------------


def stage_bytes(
    model: ModelShape, split: Split, pack: Pack, recompute: Recompute, stage: int, microbatches: int
) -> tuple[float, float]:
    """What a stage's layers keep of all microbatches in flight, and beside it what is being recomputed, at most."""
    chunks = split.stage_layers(model.layers, stage)
    held = in_flight(split, stage, microbatches)
    total, recomputed = 0.0, 0.0
    for index, numbers in enumerate(chunks):
        layers = [layer_bytes(model, split, pack, has_experts=model.has_experts(number)) for number in numbers]
        if pack.adapters and stage == index == 0 and not recompute.granularity:
            layers[0] = _without_gradient_of_input(layers[0], model, pack)
        kept, transient = _kept(layers, recompute)
        # Microbatches run through the chunks in groups: earlier chunks are ahead of later ones.
        total += kept * (held // len(chunks) + (index < held % len(chunks)))
        recomputed = max(recomputed, transient)
    return total, recomputed


def _without_gradient_of_input(layer: LayerBytes, model: ModelShape, pack: Pack) -> LayerBytes:
    """The model's first layer where embeddings are frozen: nothing in front of its first adapter is kept.

    Recomputed, it has that gradient: see ``model.lora.attach``.
    """
    behind_adapters = _keeps_input(attention_linears(model)[0], pack)
    norms, attention = layer.norms - _norm(model, pack, layer.input), layer.core_attention
    return replace(layer, norms=norms, core_attention=attention if behind_adapters else 0.0)


def in_flight(split: Split, stage: int, microbatches: int) -> int:
    """Forward passes of a chunk that a stage is ahead of its backward passes, at most."""
    stages, chunks = split.layout.pipeline, split.chunks
    if chunks == 1:
        return min(microbatches, stages - stage)
    return min(chunks * microbatches, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)


def _kept(layers: list[LayerBytes], recompute: Recompute) -> tuple[float, float]:
    """Bytes that a chunk keeps of a microbatch, and those that are there only while it is recomputed."""
    if recompute.granularity is None:
        return sum(layer.total for layer in layers), 0.0
    if recompute.granularity == "full":
        return _kept_by_full(layers, recompute)
    return _kept_by_selective(layers, recompute)


def _kept_by_full(layers: list[LayerBytes], recompute: Recompute) -> tuple[float, float]:
    if recompute.method == "block":
        again, whole = layers[: recompute.layers], layers[recompute.layers :]
        kept = sum(layer.input for layer in again) + sum(layer.total for layer in whole)
        # These are recomputed last, when what the other layers of the chunk have kept is gone.
        return kept, max(0.0, _most(again) - sum(layer.total for layer in whole))
    groups = [layers[start : start + recompute.layers] for start in range(0, len(layers), recompute.layers)]
    return (
        sum(group[0].input for group in groups),
        max((sum(layer.total for layer in group) - group[0].input for group in groups), default=0.0),
    )


def _most(layers: list[LayerBytes]) -> float:
    return max((layer.total - layer.input for layer in layers), default=0.0)


def _kept_by_selective(layers: list[LayerBytes], recompute: Recompute) -> tuple[float, float]:
    unknown = recompute.modules - {"core_attn", "mlp", "moe", "layernorm"}
    if unknown:
        raise UserError(f"memory is not estimated with --recompute-modules {' '.join(sorted(unknown))}.")
    dropped, transient = 0.0, 0.0
    for layer in layers:
        parts = []
        if "core_attn" in recompute.modules:
            parts.append(layer.core_attention - layer.core_attention_input)
        if recompute.of_mlp(has_experts=layer.has_experts):
            parts.append(layer.mlp)
        if "layernorm" in recompute.modules:
            parts.append(layer.norm_outputs)
        dropped += sum(parts)
        transient = max([transient, *parts])
    return sum(layer.total for layer in layers) - dropped, transient
