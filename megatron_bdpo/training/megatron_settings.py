"""What we read of Megatron's own arguments, as frozen dataclasses: the parts of ``Settings`` without flags of ours."""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bdpo.planning.layout import Layout


def _of(argument: str) -> Any:
    """A field that is one of Megatron's arguments under a shorter name."""
    return field(metadata={"argument": argument})


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """This process among the ranks."""

    rank: int
    local_rank: int
    ranks: int = _of("world_size")
    backend: str = _of("distributed_backend")
    timeout_minutes: int = _of("distributed_timeout_minutes")
    is_made_up: bool = _of("fake_process_group")
    """It plays one of ranks that do not exist: a dry run."""

    @property
    def is_last(self) -> bool:
        """Of the last pipeline stage, which has the metrics."""
        return self.rank == self.ranks - 1


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """Over how many ranks what is split."""

    ranks: int = _of("world_size")
    tensor: int = _of("tensor_model_parallel_size")
    pipeline: int = _of("pipeline_model_parallel_size")
    virtual: int | None = _of("virtual_pipeline_model_parallel_size")
    """Model chunks per rank, known once Megatron has validated its arguments; None: one."""
    layers_per_chunk: int | None = _of("num_layers_per_virtual_pipeline_stage")
    context: int = _of("context_parallel_size")
    expert: int = _of("expert_model_parallel_size")
    expert_tensor: int | None = _of("expert_tensor_parallel_size")
    sequence_parallel: bool
    tp_comm_overlap: bool
    first_layers: int | None = _of("decoder_first_pipeline_num_layers")
    last_layers: int | None = _of("decoder_last_pipeline_num_layers")
    embedding_as_layer: bool = _of("account_for_embedding_in_pipeline_split")
    loss_as_layer: bool = _of("account_for_loss_in_pipeline_split")
    pipeline_layout: object = _of("pipeline_model_parallel_layout")

    @property
    def chunks(self) -> int:
        """Model chunks per rank."""
        return self.virtual or 1

    @property
    def sizes(self) -> Layout:
        """Of the parallel groups."""
        return Layout(self.tensor, self.pipeline, self.context, self.expert)

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def position_shares(self) -> int:
        """Ranks that a pack's positions are split over: context parallelism, times tensor parallelism under SP."""
        return self.context * (self.tensor if self.sequence_parallel else 1)


@dataclass(frozen=True, kw_only=True)
class ArchitectureSettings:
    """The model."""

    layers: int = _of("num_layers")
    hidden: int = _of("hidden_size")
    heads: int = _of("num_attention_heads")
    grouped: bool = _of("group_query_attention")
    query_groups: int | None = _of("num_query_groups")
    kv_channels: int | None
    ffn: int | None = _of("ffn_hidden_size")
    experts: int | None = _of("num_experts")
    expert_ffn: int | None = _of("moe_ffn_hidden_size")
    swiglu: bool
    quick_geglu: bool
    window_size: tuple[int, int] | None
    window_attn_skip_freq: object
    softmax_type: str
    multi_latent: bool = _of("multi_latent_attention")
    value_size: int = _of("v_head_dim")
    query_latent: int | None = _of("q_lora_rank")
    latent: int = _of("kv_lora_rank")
    plain_part: int = _of("qk_head_dim")
    rotated_part: int = _of("qk_pos_emb_head_dim")
    clamp: float | None = _of("activation_func_clamp_value")
    biases: bool = _of("add_bias_linear")
    implementation: str = _of("transformer_impl")
    fused_swiglu: bool = _of("bias_swiglu_fusion")
    fused_dropout: bool = _of("bias_dropout_fusion")
    vocab_size: int | None
    vocab_multiple: int = _of("make_vocab_size_divisible_by")
    rope_scaling_factor: float

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return int(self.query_groups or 1) if self.grouped else self.heads

    @property
    def gated(self) -> bool:
        """MLPs have a gate projection."""
        return self.swiglu or self.quick_geglu

    @property
    def head_size(self) -> int:
        """Of queries and keys."""
        if self.multi_latent:
            return self.plain_part + self.rotated_part
        return self.kv_channels or self.hidden // self.heads

    @property
    def latents(self) -> dict[str, int]:
        """Rows of the matrices to the latents of multi-latent attention, by what they are."""
        if not self.multi_latent:
            return {}
        queries = {"latent of queries": self.query_latent} if self.query_latent else {}
        return {**queries, "latent of keys and values, and what is rotated": self.latent + self.rotated_part}


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Megatron's tokenizer."""

    type: str | None = _of("tokenizer_type")
    model: str | None = _of("tokenizer_model")


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What memory depends on besides model and layout."""

    optimizer: str
    optimizer_cpu_offload: bool
    use_precision_aware_optimizer: bool
    use_distributed_optimizer: bool
    fp32_gradients: bool = _of("accumulate_allreduce_grads_in_fp32")
    fp8_param_gather: bool
    fp4_param_gather: bool
    recompute_granularity: str | None
    recompute_modules: list[str] | None
    recompute_method: str | None
    recompute_num_layers: int | None


@dataclass(frozen=True, kw_only=True)
class DirectorySettings:
    """Checkpoints to start from and to write."""

    save: str | None
    load: str | None
    pretrained_checkpoint: str | None
    finetune: bool
    ckpt_step: int | None
    save_interval: int | None
    save_retain_interval: int | None

    @property
    def goes_on_in_place(self) -> bool:
        """The checkpoints that a run goes on from are its own: those of --save."""
        return bool(
            self.save and self.load and not self.finetune and Path(self.load).resolve() == Path(self.save).resolve()
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Steps, evaluations and logging."""

    train_iters: int | None
    """Optimizer steps; of a job whose plan is made: all of them."""
    seq_length: int
    """Most positions of a pack, as the user has set it."""
    max_position_embeddings: int | None
    lr: float | None
    seed: int
    eval_interval: int | None
    eval_iters: int | None
    """None or 1: evaluate; 0: do not."""
    log_interval: int
    num_workers: int
    exit_signal: signal.Signals
    exit_duration_in_mins: int | None
    check_finite: bool = _of("check_for_nan_in_loss_and_grad")
    deterministic_mode: bool

    @property
    def evaluates(self) -> bool:
        """Held-out pairs, if there are any, are evaluated."""
        return self.eval_iters != 0
