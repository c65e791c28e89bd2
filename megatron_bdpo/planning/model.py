"""A model's shape, and the parameters that a rank of each pipeline stage holds of it: exact numbers.

| part of a layer   | parameters on a rank                                                                   |
|-------------------|----------------------------------------------------------------------------------------|
| query, key, value | H (n + 2 g) d / tp, and with biases (n + 2 g) d / tp                                    |
| projection        | n d H / tp, and a bias H; learned sinks n / tp                                          |
| with latents      | query H r_q / tp, r_q, r_q n d / tp; key and value H (r + rope) / tp, r, r n (nope + v) / tp; |
|                   | projection n v H / tp. Transformer Engine's layers hold the matrices to latents whole     |
| norms             | 1, 2 or 4 of H; of queries and keys 2 of d, or of n d and g d over all heads.           |
|                   | RMSNorm has one vector, LayerNorm two                                                   |
| MLP               | 3 H F / tp with a gate, 2 H F / tp without; biases                                      |
| experts           | router H E; each of the rank's E / ep experts 3 H F_e / etp; a shared expert as an MLP  |

The first stage has the embedding (V / tp rows), the last one the final norm and the output layer: V / tp rows, which
for tied embeddings are a copy of the first stage's, unless that is the same stage. V is padded to 128 tp rows.

Symbols: H hidden, F MLP, n query heads, g groups of keys and values, d head, E experts, V vocabulary; tp, ep, etp
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.planning.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Multi-latent attention."""

    queries: int
    """Width of the queries' latent; 0: they have none."""
    keys: int
    """Width of the latent of keys and values."""
    rotated: int
    """Part of a head of queries and keys."""
    value: int
    """A head of values."""
    are_divided: bool
    """The matrices to latents are divided over tensor-parallel ranks, as in Megatron's local layers."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes that decide memory; named as in the field, not as Megatron's flags."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocab: int
    """Entries before padding."""
    gated: bool = True
    biases: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """Behind attention's projection."""
    mlp_bias: bool = False
    norm_vectors: int = 1
    """Of RMSNorm one, of LayerNorm two, or one without a bias."""
    rms_norm: bool = True
    norms: int = 2
    """Of hidden states in a layer: before or after attention and MLP, around them 4, before both together 1."""
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    """It is one norm over all heads of the queries, and one over those of the keys."""
    latents: Latents | None = None
    """Where it has multi-latent attention; a head of queries and keys is ``head`` wide."""
    sinks: bool = False
    quick_gelu: bool = False
    """The gate's activation is x sigmoid(1.702 x), whose two factors are kept."""
    clamped: bool = False
    """Gate and up projection are clamped, which keeps them as they were before too."""
    tied: bool = False
    learned_positions: int = 0
    vocab_multiple: int = 128
    experts: int = 0
    expert_ffn: int = 0
    expert_top_k: int = 2
    shared_expert_ffn: int = 0
    shared_expert_gate: bool = False
    expert_layers: tuple[bool, ...] = field(default=())
    """Which layers have experts; empty: all, if there are any."""

    windows: tuple[int | None, ...] = field(default=())
    """How many keys back each layer sees; empty: all layers see all."""

    def keys_seen(self, layer: int, keys: float) -> float:
        """Keys that a query sees in this layer, on average, where it sees ``keys`` in one that sees all.

        Of sequences of one length L = 2 keys: the first w = window + 1 queries see 1 ... w, the others w.
        """
        window = self.windows[layer] if self.windows else None
        width = None if window is None else window + 1
        return keys if width is None or 2 * keys <= width else width - width**2 / (4 * keys)

    def attended_share(self, keys: float) -> float:
        """Of the work of attention without windows, what they leave, over all layers."""
        return sum(self.keys_seen(layer, keys) for layer in range(self.layers)) / (self.layers * keys)

    @property
    def value(self) -> int:
        """Width of a head of values, and of what a head puts out."""
        return self.latents.value if self.latents else self.head

    def has_experts(self, layer: int) -> bool:
        """Whether this layer's MLP is one of experts."""
        return bool(self.experts) and (not self.expert_layers or self.expert_layers[layer])

    def padded_vocab(self, tensor: int) -> int:
        """Rows of the embedding over all ranks."""
        multiple = self.vocab_multiple * tensor
        return -(-self.vocab // multiple) * multiple

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], vocab: int) -> ModelShape:
        """From Megatron's arguments by name, as far as they are there; absent ones have Megatron's defaults.

        Raises:
            UserError: a kind of layer that is not counted here.
        """
        get: Callable[..., Any] = arguments.get
        for name in ("mtp_num_layers", "moe_latent_size"):
            if get(name):
                raise UserError(f"memory is not estimated for models with --{name.replace('_', '-')}.")
        heads, hidden, layers = get("num_attention_heads"), get("hidden_size"), get("num_layers")
        gated = bool(get("swiglu") or get("quick_geglu"))
        ffn = get("ffn_hidden_size") or (int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
        learned = get("position_embedding_type", "learned_absolute") == "learned_absolute"
        return cls(
            layers=layers,
            hidden=hidden,
            ffn=ffn,
            heads=heads,
            groups=(get("num_query_groups") if get("group_query_attention") else None) or heads,
            head=(get("qk_head_dim") or 128) + (get("qk_pos_emb_head_dim") or 64)
            if get("multi_latent_attention")
            else get("kv_channels") or hidden // heads,
            vocab=vocab,
            gated=gated,
            biases=bool(get("add_bias_linear", True)),
            qkv_bias=bool(get("add_qkv_bias")),
            output_bias=bool(get("attention_output_bias")),
            mlp_bias=bool(get("mlp_bias")),
            rms_norm=get("normalization") == "RMSNorm",
            norm_vectors=1 if get("normalization") == "RMSNorm" or get("norms_without_bias") else 2,
            qk_norm=bool(get("qk_layernorm")) and not get("qk_l2_norm") and not get("multi_latent_attention"),
            norms=1 if get("parallel_layers") else 4 if get("layer_norms") == "around" else 2,
            qk_norm_over_heads=bool(get("qk_norm_over_heads")),
            latents=_latents(get) if get("multi_latent_attention") else None,
            sinks=get("softmax_type") == "learnable",
            quick_gelu=bool(get("quick_geglu")),
            clamped=get("activation_func_clamp_value") is not None,
            tied=not get("untie_embeddings_and_output_weights"),
            learned_positions=(get("max_position_embeddings") or 0) if learned else 0,
            vocab_multiple=get("make_vocab_size_divisible_by") or 128,
            experts=get("num_experts") or 0,
            expert_ffn=get("moe_ffn_hidden_size") or ffn,
            expert_top_k=get("moe_router_topk") or 2,
            shared_expert_ffn=get("moe_shared_expert_intermediate_size") or 0,
            shared_expert_gate=bool(get("moe_shared_expert_gate")),
            expert_layers=_expert_layers(get("moe_layer_freq") or 1, layers) if get("num_experts") else (),
            windows=_windows(get("window_size"), get("window_attn_skip_freq"), layers),
        )


def _windows(window: tuple[int, int] | None, skip: int | Sequence[int] | None, layers: int) -> tuple[int | None, ...]:
    """As Megatron's ``is_layer_window_attention`` has it."""
    if not window or window[0] < 0:
        return ()
    if skip is None:
        return (window[0],) * layers
    if isinstance(skip, int):
        return tuple(window[0] if (layer + 1) % skip else None for layer in range(layers))
    return tuple(window[0] if has_window else None for has_window in skip)


def _latents(get: Callable[..., Any]) -> Latents:
    return Latents(
        queries=get("q_lora_rank", None) or 0,
        keys=get("kv_lora_rank") or 512,
        rotated=get("qk_pos_emb_head_dim") or 64,
        value=get("v_head_dim") or 128,
        are_divided=get("transformer_impl") == "local",
    )


def _expert_layers(frequency: int | Sequence[int], layers: int) -> tuple[bool, ...]:
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(layers))
    return tuple(map(bool, frequency))


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a model is divided over ranks: a layout, and what refines it."""

    layout: Layout
    chunks: int = 1
    """Virtual pipeline stages of a rank."""
    first_layers: int | None = None
    last_layers: int | None = None
    """Layers of the first and the last stage, where they differ from the others'."""
    loss_as_layer: bool = False
    """The last chunk of the last stage has a layer less than the others: ``--account-for-loss-in-pipeline-split``."""
    expert_tensor: int = 0
    """Tensor-parallel ranks of an expert; 0: as of the other layers."""

    def expert_tensor_size(self) -> int:
        """Tensor-parallel ranks of an expert."""
        return self.expert_tensor or self.layout.tensor

    def stage_layers(self, layers: int, stage: int) -> list[list[int]]:
        """Numbers of the layers of each chunk of a stage, in Megatron's order."""
        counts = self._layers_of_stages(layers + self.loss_as_layer)
        per_chunk = [count // self.chunks for count in counts]
        total = sum(per_chunk)
        first = sum(per_chunk[:stage])
        starts = [chunk * total + first for chunk in range(self.chunks)]
        return [list(range(start, min(layers, start + per_chunk[stage]))) for start in starts]

    def _layers_of_stages(self, layers: int) -> list[int]:
        stages = self.layout.pipeline
        counts: list[int | None] = [None] * stages
        if self.first_layers is not None:
            counts[0] = self.first_layers
        if self.last_layers is not None:
            counts[-1] = self.last_layers
        others = counts.count(None)
        left = layers - sum(count or 0 for count in counts)
        assert left % max(1, others) == 0, "checked before, see Divisible"
        return [left // others if count is None else count for count in counts]


@dataclass(frozen=True)
class Parameters:
    """Of one rank of one stage, by part."""

    embedding: int
    layers: int
    """Without experts: attention, norms, MLPs, routers, shared experts."""
    experts: int
    """Their gradients and optimizer are shared by other data-parallel ranks than those of the rest."""
    output: int
    """Output layer and final norm."""

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.experts + self.output


def stage_parameters(model: ModelShape, split: Split, stage: int) -> Parameters:
    """What each rank of a pipeline stage holds."""
    tensor, last = split.layout.tensor, split.layout.pipeline - 1
    numbers = [layer for chunk in split.stage_layers(model.layers, stage) for layer in chunk]
    rows = model.padded_vocab(tensor) // tensor * model.hidden
    embedding = (rows + model.learned_positions * model.hidden) if stage == 0 else 0
    output = 0
    if stage == last:
        is_shared = model.tied and last == 0
        output = model.norm_vectors * model.hidden + (0 if is_shared else rows)
    return Parameters(
        embedding=embedding,
        layers=sum(layer_parameters(model, tensor, model.has_experts(layer)) for layer in numbers),
        experts=sum(expert_parameters(model, split) for layer in numbers if model.has_experts(layer)),
        output=output,
    )


def layer_parameters(model: ModelShape, tensor: int, has_experts: bool) -> int:
    """Of one layer on one rank, but for its experts."""
    hidden, queries = model.hidden, model.heads * model.value
    projected = (model.heads + 2 * model.groups) * model.head // tensor
    into = latent_parameters(model, tensor) if model.latents else hidden * projected
    attention = into + hidden * queries // tensor
    attention += (model.biases or model.qkv_bias) * projected + (model.biases or model.output_bias) * hidden
    attention += model.heads // tensor if model.sinks else 0
    norms = model.norms * hidden
    if model.qk_norm:  # whole on every rank
        norms += (model.heads + model.groups if model.qk_norm_over_heads else 2) * model.head
    norms *= model.norm_vectors
    if not has_experts:
        return attention + norms + mlp_parameters(model, model.ffn, tensor)
    router = hidden * model.experts + model.biases * model.experts
    shared = mlp_parameters(model, model.shared_expert_ffn, tensor) if model.shared_expert_ffn else 0
    return attention + norms + router + shared + (hidden if model.shared_expert_gate and shared else 0)


def latent_parameters(model: ModelShape, tensor: int) -> int:
    """Of what multi-latent attention makes queries, keys and values with, on one rank."""
    latents, hidden = model.latents, model.hidden
    assert latents is not None
    shares = tensor if latents.are_divided else 1
    queries = model.heads * model.head // tensor
    if latents.queries:
        queries_made = hidden * latents.queries // shares + latents.queries + latents.queries * queries
    else:
        queries_made = hidden * queries
    made = model.heads * (model.head - latents.rotated + latents.value) // tensor
    keys_made = hidden * (latents.keys + latents.rotated) // shares + latents.keys + latents.keys * made
    return queries_made + keys_made


def expert_parameters(model: ModelShape, split: Split) -> int:
    """Of one layer's experts on one rank."""
    own = model.experts // split.layout.expert
    return own * mlp_parameters(model, model.expert_ffn, split.expert_tensor_size())


def mlp_parameters(model: ModelShape, ffn: int, tensor: int) -> int:
    """Of one MLP on one rank."""
    inner = ffn // tensor
    into = inner * (2 if model.gated else 1)
    return model.hidden * (into + inner) + (model.biases or model.mlp_bias) * (into + model.hidden)
