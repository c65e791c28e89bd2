"""What a job is told, as frozen dataclasses: our flags, made from their fields, and what we read of Megatron's.

``flags.arguments.Arguments`` reads all of it from Megatron's parsed arguments at once. Below that nobody sees those: a
function takes ``Settings``, or the part of it that concerns it.
"""

# Field types are evaluated: Megatron makes flags of them. So no ``from __future__ import annotations`` here.

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, Self

import torch

from megatron_bdpo.logprobs import KERNELS
from megatron_bdpo.losses import LossFunction, registry
from megatron_bdpo.model.attention_backends import BACKENDS
from megatron_bdpo.model.layer_options import LayerOptions
from megatron_bdpo.model.lora.lora_config import KINDS, SCALINGS
from megatron_bdpo.model.precision import Precision
from megatron_bdpo.training.flag_fields import finite, flag, minutes, switch
from megatron_bdpo.training.megatron_settings import (
    ArchitectureSettings,
    DirectorySettings,
    LayoutSettings,
    MemorySettings,
    ProcessSettings,
    ScheduleSettings,
    TokenizerSettings,
)
from megatron_bdpo.training.objective import ObjectiveSettings
from megatron_bdpo.training.pair_settings import PairSettings

# Our flags ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSettings:
    """How pairs make up optimizer steps, and steps packs."""

    pairs_per_step: int | None = None
    """preference pairs per optimizer step, over all ranks; exact. Of rows with several pairs (--pairs-from), rows"""
    mean_over: str | None = flag(choices=("groups", "pairs"))
    """of rows with several pairs, a step's loss is the mean over its rows of the mean over a row's pairs, or the mean
    over all its pairs (default: groups)"""
    pair_epochs: float | None = flag(type=finite)
    """train for this many passes over the pairs instead of --train-iters"""
    pack_pairs: bool = switch("pack-pairs", True)
    """several pairs in one pack"""
    fixed_pack_length: bool = False
    """pad every pack to --seq-length, in scoring and evaluation too; --tp-comm-overlap needs it"""
    share_prompts: bool = switch("share-prompts", True)
    """encode each prompt once for both answers"""


@dataclass(frozen=True)
class ModelSettings:
    """Where the policy comes from and goes to, and what computes its layers."""

    hf_model: str | None = flag(metavar="PATH_OR_NAME")
    """Hugging Face model (directory or hub name) that the policy starts from and the reference is: sets the model's
    arguments and the tokenizer, and is read into each rank's part directly"""
    hf_revision: str | None = flag(metavar="REVISION")
    """branch, tag or commit of --hf-model, where that is a name on the hub: of weights, configuration and tokenizer
    (default: its newest)"""
    save_hf: str | None = flag(metavar="DIR")
    """at the end of training, write the policy as a Hugging Face model"""
    push_to_hub: str | None = flag(metavar="NAME")
    """send what --save-hf has written to this repository on the Hugging Face hub, made private; the token is the
    environment's HF_TOKEN"""
    pair_attention: str = flag("auto", choices=("auto", *BACKENDS))
    """what computes attention; auto: on a GPU in half precision varlen, te where torch has none; else sdpa"""
    fuse_local_layers: bool | None = switch("fuse-local-layers", None)
    """torch.compile the small functions of layers that are not Transformer Engine's: rotary embedding, SwiGLU, dropout
    and residual. Default: on a GPU"""
    moe_freeze_router: bool = False
    """leave the routers of experts as they are: no gradients, no optimizer state, no updates of experts' biases"""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters in the place of the whole model's weights. All but --lora-rank and --lora-start need one of
    these."""

    lora_rank: int | None = flag(metavar="R")
    """train adapters of this rank beside the policy's linear layers; the base model is frozen, and the reference"""
    lora_alpha: float | None = flag(type=finite, metavar="A")
    """adapters are scaled by A / R (default: 2 R)"""
    lora_dropout: float | None = flag(type=finite, metavar="D")
    """dropout of the adapters' inputs (default: 0)"""
    lora_targets: str | None = flag(metavar="NAMES")
    """projections with adapters, with commas between them: attention, mlp, all-linear, or q_proj, k_proj, v_proj,
    o_proj, gate_proj, up_proj, down_proj (default: all-linear)"""
    lora_scaling: str | None = flag(choices=SCALINGS)
    """scale by A / R, or by A over the square root of R (rsLoRA) (default: rank)"""
    lora_type: str | None = flag(choices=KINDS)
    """lora, or dora: the norms of the weights' rows learn apart from their directions (default: lora)"""
    lora_start: str | None = flag(metavar="DIR")
    """adapters to start from, as PEFT writes them; rank, alpha and targets are theirs"""
    save_hf_merged: str | None = flag(metavar="DIR")
    """at the end of training, write the policy with its adapters merged in as a Hugging Face model; --save-hf then
    writes the adapters, as PEFT does"""

    @property
    def is_wanted(self) -> bool:
        return self.lora_rank is not None or self.lora_start is not None


@dataclass(frozen=True)
class ReferenceSettings:
    """The frozen model that the policy is measured against."""

    reference: Literal["precomputed", "resident", "columns", "base"] = "precomputed"
    """score the reference once before training, keep a frozen copy beside the policy, or take the rows' own columns
    ref_chosen_logps and ref_rejected_logps; with --lora-rank, precomputed is also called base, and resident keeps no
    copy: the reference is the model without its adapters"""
    reference_model: str | None = flag(metavar="PATH_OR_NAME")
    """weights of the reference where they are not those that the policy starts from: a Hugging Face model (directory or
    hub name) or a torch_dist checkpoint, of the policy's architecture"""
    reference_cache: str | None = flag(metavar="DIR")
    """where the reference scores of this data and model are kept"""
    sync_reference_every: int | None = flag(metavar="STEPS")
    """after every so many steps, move a resident reference towards the policy (TR-DPO)"""
    sync_reference_mix: float | None = flag(type=finite, metavar="ALPHA")
    """how far: the reference becomes ALPHA parts policy and 1 - ALPHA parts of itself (default: 1, the policy)"""
    step_zero_check: bool = switch("step-zero-check", True)
    """check at the first step that the policy equals its reference"""

    @property
    def is_resident(self) -> bool:
        return self.reference == "resident"

    @property
    def is_in_columns(self) -> bool:
        return self.reference == "columns"


@dataclass(frozen=True)
class LogProbSettings:
    """How log-probs are computed."""

    log_probs: str = flag("fused", choices=tuple(KERNELS))
    """fused: output layer and log-softmax in one, a chunk of the vocabulary at a time, so that the logits never exist
    as a whole; plain: make the logits of the scored positions, for Megatron's cross entropy"""
    log_prob_chunk_size: int | None = flag(metavar="N")
    """vocabulary rows in a chunk of the fused log-probs (default: as many as fill 64 MiB of fp32 logits)"""
    log_prob_kept_mib: int | None = flag(metavar="N")
    """most memory for the softmax of a pack's scored positions, in the model's precision, that the fused log-probs keep
    for the backward pass; where it is more, the logits are made a second time (default: 2560)"""
    log_entropy: bool = False
    """report the policy's entropy per response token, of chosen and rejected"""

    @property
    def kept_bytes(self) -> int | None:
        return None if self.log_prob_kept_mib is None else self.log_prob_kept_mib * 2**20


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints, beside Megatron's own settings, and when to stop."""

    save_every_minutes: float | None = flag(
        type=minutes, metavar="TIME", arg_names=["--save-every", "--save-every-minutes"]
    )
    """save a checkpoint when the last one began this long ago (90s, 20m, 2h; a number alone is minutes): beside
    --save-interval, or in its place"""
    keep_checkpoints: int | None = flag(metavar="N")
    """keep this many of the newest checkpoints and the multiples of --save-retain-interval, delete older ones (default:
    keep all; with --save-retain-interval: 1)"""
    overwrite: bool = False
    """begin again in a --save that holds a run. Without it and without --load, the same run goes on from its newest
    checkpoint there, and another one is refused"""
    checkpoint_checksums: bool = switch("checkpoint-checksums", True)
    """write the digests of a checkpoint's files beside them, and compare them before a checkpoint is used"""
    stop_file: list[str] | None = flag(metavar="PATH")
    """when one of these files appears, save a checkpoint after the current step and end, as SIGTERM does"""


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluations, beside Megatron's own settings."""

    eval_every_minutes: float | None = flag(
        type=minutes, metavar="TIME", arg_names=["--eval-every", "--eval-every-minutes"]
    )
    """evaluate when the last evaluation is this long ago (as --save-every): beside --eval-interval, or in its place"""
    eval_at_start: bool = False
    """evaluate the held-out pairs before the first step, too"""
    eval_prompts: str | None = flag(metavar="FILE")
    """prompts (rows as in --pair-data, without answers) that the policy answers greedily at every evaluation; kept in
    generations.jsonl in the directory of --save"""
    eval_prompt_tokens: int | None = flag(metavar="N")
    """longest answer to them, in tokens (default: 64)"""


@dataclass(frozen=True)
class OutputSettings:
    """What goes to the terminal."""

    megatron_output: Literal["file", "terminal"] = "file"
    """where Megatron's own lines go: megatron.log in the directory of --save (without one they are dropped), or between
    ours"""
    log_wide: bool = False
    """show all metrics in the lines of steps and evaluations, however long that makes them: tokens/s, rewards,
    log-probs, and what the loss adds. They are in metrics.jsonl, TensorBoard and W&B in any case"""
    mlflow_experiment: str | None = flag(metavar="NAME")
    """log all metrics to a run of this experiment of MLflow, where MLFLOW_TRACKING_URI says"""
    swanlab_project: str | None = flag(metavar="NAME")
    """log all metrics to this project of SwanLab; SWANLAB_API_KEY and SWANLAB_MODE are SwanLab's own"""


@dataclass(frozen=True)
class WatchSettings:
    """When a rank counts as hung."""

    phase_limit: list[str] | None = flag(metavar="[PHASE=]SECONDS")
    """end the job, to be started again, when a rank has not gone on for this long in a phase (set-up, tokenizing,
    weights, scoring, step, evaluation, save, export) or in any; off: never (default: 5 times the longest so far, at
    least minutes)"""


@dataclass(frozen=True)
class DryRunSettings:
    """A dry run. All but --dry-run are refused without it."""

    dry_run: int | None = flag(nargs="?", type=int, const=0, metavar="RANKS")
    """check the whole job as one process on a CPU, for this many ranks (default: WORLD_SIZE), without weights: flags,
    layout, data, steps; and estimate time and memory"""
    gpus_per_node: int | None = None
    """for the report: which ranks share a node"""
    gpu_memory: float | None = flag(metavar="GB")
    """refuse a job that is estimated to need more"""
    gpu_tflops: float | None = None
    """peak of a GPU for the estimated time (default: 989, an H100)"""
    assumed_mfu: float | None = None
    """share of that peak to assume (default: 0.35)"""

    @property
    def is_wanted(self) -> bool:
        return self.dry_run is not None


#: Title in the help text -> flags.
FLAG_GROUPS: Mapping[str, type] = {
    "objective": ObjectiveSettings,
    "preference pairs": PairSettings,
    "steps and packs": StepSettings,
    "policy": ModelSettings,
    "layers beyond Megatron's": LayerOptions,
    "LoRA": LoraSettings,
    "reference": ReferenceSettings,
    "log-probs": LogProbSettings,
    "checkpoints": CheckpointSettings,
    "evaluation": EvaluationSettings,
    "output": OutputSettings,
    "watch": WatchSettings,
    "dry run": DryRunSettings,
}


@dataclass(frozen=True)
class LossSettings:
    """Which loss, and those of its options that were given; their flags are the losses' own (``losses.options``)."""

    name: str
    options: Mapping[str, object]
    digest: str = ""
    """SHA-256 of the file that the loss is from; empty where it is from a package."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Those among all arguments."""
        values = {name: arguments[name] for name in registry.option_fields()}
        file = registry.file_of(arguments["preference_loss"])
        return cls(
            arguments["preference_loss"],
            MappingProxyType({name: value for name, value in values.items() if value is not None}),
            file.digest if file else "",
        )

    def build(self) -> tuple[registry.AnyLossSpec, Any]:
        """The loss and its options, defaults filled in.

        Raises:
            UserError: there is no such loss, or an option is not its own or out of range.
        """
        return registry.get(self.name), registry.build_options(self.name, self.options)


# All ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a preference job is told."""

    objective: ObjectiveSettings
    pairs: PairSettings
    steps: StepSettings
    model: ModelSettings
    layers: LayerOptions
    loss: LossSettings
    lora: LoraSettings
    reference: ReferenceSettings
    log_probs: LogProbSettings
    checkpoints: CheckpointSettings
    evaluation: EvaluationSettings
    output: OutputSettings
    watch: WatchSettings
    dry_run: DryRunSettings
    process: ProcessSettings
    layout: LayoutSettings
    architecture: ArchitectureSettings
    precision: Precision
    tokenizer: TokenizerSettings
    memory: MemorySettings
    directories: DirectorySettings
    schedule: ScheduleSettings
    given: Mapping[str, str]
    """Argument name -> flag, of what the command line and the recipes have."""

    def build_loss(self) -> LossFunction:
        """The loss of the objective.

        Raises:
            UserError: there is no such loss, or an option is not its own or out of range.
        """
        return self.objective.reward_loss() if self.objective.is_reward else LossFunction(*self.loss.build())

    @property
    def compares_groups(self) -> bool:
        """Whether the loss is of all answers to a prompt.

        Raises:
            UserError: there is no such loss.
        """
        return not self.objective.is_reward and registry.get(self.loss.name).takes == "groups"

    @property
    def length_unit(self) -> int:
        """Packs are multiples of this many positions long, so that each rank's part suits the kernels."""
        return self.precision.row_multiple * self.layout.position_shares


def read_settings(arguments: Mapping[str, Any], given: Mapping[str, str]) -> Settings:
    """All of it, from Megatron's arguments and ours by name.

    Args:
        given: see ``Settings.given``.
    """
    groups: dict[str, Any] = {
        "loss": LossSettings.of(arguments),
        "precision": _precision(arguments),
        "given": MappingProxyType(dict(given)),
    }
    for each in fields(Settings):
        if each.name not in groups:
            kind: Any = each.type
            groups[each.name] = kind(
                **{own.name: arguments[own.metadata.get("argument", own.name)] for own in fields(kind)}
            )
    return Settings(**groups)


def _precision(arguments: Mapping[str, Any]) -> Precision:
    """Before or after Megatron's validation, which makes an enumeration of the FP8 recipe."""
    dtype = torch.bfloat16 if arguments["bf16"] else torch.float16 if arguments["fp16"] else torch.float32
    recipe = arguments["fp8_recipe"]
    tf32 = dtype == torch.float32 and arguments["transformer_impl"] == "transformer_engine"
    return Precision(dtype, str(getattr(recipe, "value", recipe)) if arguments["fp8"] else None, tf32)
