"""Megatron settings that a preference run cannot honour. Each is refused at start, with the reason and the way out."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import registry
from megatron_bdpo.training.reporting.loggers.optional import is_installed

#: Without these there is no run. What Megatron itself requires is named here too: it would say so much later.
_REQUIRED = (
    "pair_data", "pairs_per_step", "seq_length", "tokenizer_type", "lr", "num_layers", "hidden_size",
    "num_attention_heads",
)  # fmt: skip


class _Refusal(NamedTuple):
    applies: Callable[[argparse.Namespace], object]
    message: str


_REFUSALS = (
    # What contradicts itself, or lacks something.
    _Refusal(
        lambda a: (
            (a.train_iters is None) == (a.pair_epochs is None) or (a.pair_epochs is not None and a.pair_epochs <= 0)
        ),
        "give one of --train-iters (optimizer steps) and --pair-epochs (passes over the pairs, above 0).",
    ),
    _Refusal(
        lambda a: a.eval_pair_data and a.eval_share,
        "--eval-pair-data and --eval-share both name held-out pairs. Give one.",
    ),
    _Refusal(
        lambda a: a.eval_seed is not None and (a.eval_pair_data or not a.eval_share or a.eval_seed < 0),
        "--eval-seed, at least 0, draws what --eval-share holds out. Give both, or neither.",
    ),
    _Refusal(
        lambda a: a.loss_file and not registry.file_of(a.preference_loss),
        "--loss-file: --preference-loss names a loss that is not the file's. Give one of the two.",
    ),
    _Refusal(
        lambda a: a.push_to_hub and not a.save_hf,
        "--push-to-hub sends what --save-hf has written, which is not given. Give both.",
    ),
    _Refusal(
        lambda a: a.eval_prompt_tokens is not None and (not a.eval_prompts or a.eval_prompt_tokens < 1),
        "--eval-prompt-tokens: at least 1, the longest answer to the prompts of --eval-prompts. Give both.",
    ),
    _Refusal(
        lambda a: a.reference not in ("precomputed", "base") and a.reference_cache,
        "--reference-cache keeps the values of a precomputed reference; one that is resident or in columns has none. "
        "Leave it out.",
    ),
    _Refusal(
        lambda a: a.sync_reference_mix is not None and a.sync_reference_every is None,
        "--sync-reference-every says when --sync-reference-mix moves the reference. Give both.",
    ),
    _Refusal(
        lambda a: (
            (a.sync_reference_every is not None and a.sync_reference_every < 1)
            or (a.sync_reference_mix is not None and not 0 < a.sync_reference_mix <= 1)
        ),
        "--sync-reference-every is at least 1 step, --sync-reference-mix above 0 and at most 1: the policy's share.",
    ),
    _Refusal(
        lambda a: a.sync_reference_every is not None and a.reference != "resident",
        "--sync-reference-every moves a copy that stands beside the policy. Add --reference resident.",
    ),
    _Refusal(
        lambda a: a.sync_reference_every is not None and _has_adapters(a),
        "--sync-reference-every: with adapters the reference is their frozen model, which does not move. Leave it out.",
    ),
    _Refusal(
        lambda a: bool(a.save) != (a.save_interval is not None or a.save_every_minutes is not None),
        "--save DIR goes together with --save-interval STEPS or --save-every TIME, or both: where a checkpoint is "
        "written, and how often.",
    ),
    _Refusal(
        lambda a: (
            (a.keep_checkpoints is not None and (a.keep_checkpoints < 1 or not a.save))
            or (a.save_retain_interval is not None and a.save_interval is None)
        ),
        "--keep-checkpoints and --save-retain-interval say which checkpoints of --save stay: at least one of the "
        "newest, and those of steps that --save-interval writes and the retain interval divides. Give --save, and "
        "--save-interval with --save-retain-interval.",
    ),
    _Refusal(
        lambda a: (
            a.async_save
            and (
                not a.use_persistent_ckpt_worker
                or (a.async_strategy == "nvrx" and importlib.util.find_spec("nvidia_resiliency_ext") is None)
                or a.optimizer_cpu_offload
            )
        ),
        "--async-save needs --use-persistent-ckpt-worker (without it Megatron lets training wait all the same), and "
        "--async-strategy mcore or, for nvrx, NVIDIA's nvidia-resiliency-ext. Not with --optimizer-cpu-offload: the "
        "writer would share the state on the host with the next step.",
    ),
    _Refusal(
        lambda a: a.wandb_project and not is_installed("wandb"), "--wandb-project needs wandb: pip install wandb."
    ),
    _Refusal(
        lambda a: a.mlflow_experiment and not is_installed("mlflow"),
        "--mlflow-experiment needs MLflow: pip install mlflow.",
    ),
    _Refusal(
        lambda a: a.swanlab_project and not is_installed("swanlab"),
        "--swanlab-project needs SwanLab: pip install swanlab.",
    ),
    _Refusal(
        lambda a: a.dry_run is None and any((a.gpus_per_node, a.gpu_memory, a.gpu_tflops, a.assumed_mfu)),
        "--gpus-per-node, --gpu-memory, --gpu-tflops and --assumed-mfu are for a --dry-run's report.",
    ),
    _Refusal(
        lambda a: a.fake_process_group and a.dry_run is None,
        "--fake-process-group: ranks that are made up cannot train. Use --dry-run RANKS.",
    ),
    # Set by the step plan.
    _Refusal(
        lambda a: a.micro_batch_size not in (None, 1),
        "--micro-batch-size: a microbatch is one pack of pairs. Size it with --seq-length.",
    ),
    _Refusal(
        lambda a: (
            a.global_batch_size is not None
            or a.eval_global_batch_size is not None
            or a.eval_micro_batch_size is not None
        ),
        "--global-batch-size (and --eval-...-batch-size) count packs here and follow from the step plan. "
        "Set the pairs per optimizer step: --pairs-per-step.",
    ),
    _Refusal(
        lambda a: a.step_batch_size_schedule is not None or a.decrease_batch_size_if_needed or a.rampup_batch_size,
        "the batch-size schedule flags: every step has exactly --pairs-per-step pairs.",
    ),
    _Refusal(
        lambda a: a.train_samples is not None,
        "--train-samples counts packs here. Use --train-iters or --pair-epochs.",
    ),
    _Refusal(
        lambda a: a.eval_iters not in (None, 0),
        "--eval-iters: every evaluation covers all held-out pairs. Use --eval-iters 0 to switch evaluation off, "
        "or hold fewer pairs out.",
    ),
    _Refusal(
        lambda a: a.dataloader_type not in (None, "external"), "--dataloader-type: the step plan is the data loader."
    ),
    _Refusal(
        lambda a: a.full_validation or a.multiple_validation_sets or a.start_eval_at_iter is not None,
        "--full-validation, --multiple-validation-sets and --start-eval-at-iter: evaluation always covers all of "
        "--eval-pair-data, every --eval-interval steps.",
    ),
    _Refusal(
        lambda a: a.data_path or a.train_data_path or a.valid_data_path or a.test_data_path or a.mock_data or a.sft,
        "Megatron's token data flags (--data-path, --train-data-path, --mock-data, --sft ...): "
        "preference pairs come from --pair-data.",
    ),
    _Refusal(
        lambda a: a.data_args_path or a.per_split_data_args_path or a.fim_data or a.phase_transition_iterations,
        "--data-args-path, --per-split-data-args-path, --fim-data and --phase-transition-iterations: "
        "preference pairs come from --pair-data.",
    ),
    _Refusal(
        lambda a: a.reset_position_ids or a.reset_attention_mask or a.eod_mask_loss,
        "--reset-position-ids, --reset-attention-mask and --eod-mask-loss are for streams of documents: answers are "
        "kept apart in any case, and all their tokens are scored.",
    ),
    _Refusal(lambda a: a.iterations_to_skip, "--iterations-to-skip: steps are planned, none can be skipped."),
    # What would make policy and reference differ, or the normalisation wrong.
    _Refusal(
        lambda a: a.hidden_dropout or a.attention_dropout,
        "dropout: the policy would differ from its own reference at the first step. "
        "Leave --hidden-dropout and --attention-dropout at 0.",
    ),
    _Refusal(
        lambda a: (
            a.moe_input_jitter_eps is not None
            or a.moe_router_force_load_balancing
            or a.moe_router_force_biased is not None
            or a.moe_enable_routing_replay
        ),
        "--moe-input-jitter-eps, --moe-router-force-load-balancing, --moe-router-force-biased and "
        "--moe-enable-routing-replay: the policy's tokens would go to other experts than the reference's.",
    ),
    _Refusal(
        lambda a: not set(np.atleast_1d(a.moe_router_load_balancing_type)) <= {"aux_loss", "seq_aux_loss", "none"},
        "--moe-router-load-balancing-type: use aux_loss, a mean over the tokens of a pack, seq_aux_loss, a mean over "
        "pairs, or none. sinkhorn and quantile_balancing route otherwise in training than in scoring, and "
        "global_aux_loss depends on the order of the packs.",
    ),
    _Refusal(
        lambda a: (
            "seq_aux_loss" in np.atleast_1d(a.moe_router_load_balancing_type)
            and (getattr(a, "moe_layer_recompute", False) or "moe" in (a.recompute_modules or ()))
        ),
        "--moe-router-load-balancing-type seq_aux_loss: a layer tells its router which pair a token is of, and one "
        "that is computed again by itself is not told. Leave moe out of --recompute-modules, or recompute whole "
        "layers: --recompute-granularity full.",
    ),
    _Refusal(
        lambda a: (
            a.moe_freeze_router
            and (
                a.num_experts is None
                or _has_adapters(a)
                or np.any(np.atleast_1d(a.moe_aux_loss_coeff))
                or a.moe_z_loss_coeff
                or (a.moe_router_enable_expert_bias and a.moe_router_bias_update_rate)
            )
        ),
        "--moe-freeze-router: the model needs experts, and routers that learn nothing have no losses and no updates of "
        "their own: no --moe-aux-loss-coeff, --moe-z-loss-coeff, --moe-router-bias-update-rate. With adapters "
        "leave it out itself: beside them all of the model is frozen.",
    ),
    _Refusal(
        lambda a: a.moe_expert_capacity_factor is not None or a.moe_expert_rank_capacity_factor is not None,
        "--moe-expert-capacity-factor, --moe-expert-rank-capacity-factor: which tokens an expert drops would depend on "
        "the other pairs of the pack. Leave them out: no token is dropped.",
    ),
    _Refusal(
        lambda a: (
            {"layernorm", "moe_act"} & set(a.recompute_modules or ())
            and importlib.util.find_spec("transformer_engine") is None
        ),
        "--recompute-modules layernorm, moe_act: Megatron recomputes these with Transformer Engine only, which is not "
        "installed here. Recompute core_attn, mlp or moe, or all with --recompute-granularity full.",
    ),
    _Refusal(
        lambda a: a.parallel_layers and "layernorm" in (a.recompute_modules or ()),
        "--parallel-layers with --recompute-modules layernorm: Megatron lets go of the norm's output behind attention, "
        "and the MLP reads it, too. Leave layernorm out.",
    ),
    _Refusal(
        lambda a: a.overlap_moe_expert_parallel_comm,
        "--overlap-moe-expert-parallel-comm builds its own schedule of the model, without scored positions.",
    ),
    _Refusal(
        lambda a: a.cp_comm_type not in (["p2p"], ["all_gather"]) or a.hierarchical_context_parallel_sizes,
        "--cp-comm-type, --hierarchical-context-parallel-sizes: keys and values of pairs are all-gathered over the "
        "context-parallel ranks. Leave them out.",
    ),
    _Refusal(
        lambda a: a.hybrid_context_parallel,
        "--hybrid-context-parallel: every pack is split over all context-parallel ranks.",
    ),
    _Refusal(
        lambda a: (
            a.tp_comm_overlap
            and not (a.fixed_pack_length and (a.dry_run is not None or importlib.util.find_spec("transformer_engine")))
        ),
        "--tp-comm-overlap: its buffers, Transformer Engine's, are of one size, and packs are not. Add "
        "--fixed-pack-length, and have Transformer Engine installed.",
    ),
    # What adapters do not stand beside, or would change under them.
    _Refusal(
        lambda a: _has_adapters(a) and a.use_transformer_engine_op_fuser,
        "--use-transformer-engine-op-fuser: adapters stand beside linear layers, which it does not have. Leave it out.",
    ),
    _Refusal(
        lambda a: _has_adapters(a) and (a.fp8_param_gather or a.init_model_with_meta_device),
        "--fp8-param-gather, --init-model-with-meta-device: the weights that adapters stand beside are in half or full "
        "precision, and read as the model is built. --fp8-format computes with them in FP8 all the same.",
    ),
    _Refusal(
        lambda a: _has_adapters(a) and a.moe_router_enable_expert_bias and a.moe_router_bias_update_rate,
        "--moe-router-bias-update-rate changes the frozen model that adapters stand beside. Leave it out.",
    ),
    _Refusal(
        lambda a: _has_adapters(a) and a.moe_shared_expert_overlap and a.tensor_model_parallel_size > 1,
        "--moe-shared-expert-overlap with tensor parallelism moves the shared expert's inputs and outputs outside of "
        "the layers that adapters stand beside. Leave it out.",
    ),
    _Refusal(
        lambda a: (
            _has_adapters(a)
            and (getattr(a, "moe_single_grouped_weight", False) or getattr(a, "moe_mlp_glu_interleave_size", None))
        ),
        "--moe-single-grouped-weight, --moe-mlp-glu-interleave-size: adapters are of each expert's own weights, gate "
        "and up in two blocks. Leave them out.",
    ),
    _Refusal(
        lambda a: (
            a.use_transformer_engine_op_fuser
            and (a.layer_norms == "after" or a.parallel_layers or a.norms_without_bias)
        ),
        "--use-transformer-engine-op-fuser has its norm in front of the MLP, where --layer-norms after, "
        "--parallel-layers and --norms-without-bias leave none. Leave it out.",
    ),
    _Refusal(
        lambda a: any(
            value is not None and value <= 0
            for value in (
                *(a.attention_scale, a.attention_softcap, a.local_rotary_base, a.embedding_multiplier),
                *(a.residual_multiplier, a.logit_scale, a.logit_softcap),
            )
        ),
        "--attention-scale, --attention-softcap, --local-rotary-base, --embedding-multiplier, --residual-multiplier, "
        "--logit-scale and --logit-softcap are above 0. Leave out what the model does not have.",
    ),
    # What our attention or log-probs replace.
    _Refusal(
        lambda a: a.attention_backend.name not in ("auto", "flash") or a.use_kitchen_attention,
        "--attention-backend: it chooses among kernels for plain sequences. Leave it at auto; attention over pairs is "
        "chosen with --pair-attention.",
    ),
    _Refusal(
        lambda a: a.position_embedding_type not in ("rope", "yarn", "learned_absolute", "none"),
        "--position-embedding-type: pairs need rope, yarn, learned_absolute or none.",
    ),
    _Refusal(
        lambda a: a.fp8_output_proj,
        "--fp8-output-proj: the output layer, where the log-probs come from, stays out of FP8.",
    ),
    _Refusal(lambda a: a.fp4, "--fp4-format: FP4 is not supported. FP8 is: --fp8-format."),
    _Refusal(
        lambda a: a.multi_latent_attention and (a.mla_down_proj_fusion or a.cache_mla_latents),
        "--mla-down-proj-fusion, --cache-mla-latents: multi-latent attention over pairs has its projections apart, and "
        "keeps keys. Leave them out.",
    ),
    _Refusal(lambda a: a.mtp_num_layers, "--mtp-num-layers: multi-token prediction has no meaning for scored pairs."),
    _Refusal(
        lambda a: (
            a.hybrid_layer_pattern
            or a.hybrid_override_pattern
            or a.spec
            or a.heterogeneous_layers_config_path
            or a.heterogeneous_layers_config_encoded_json
            or a.experimental_attention_variant
            or a.linear_attention_freq
        ),
        "--spec, --hybrid-layer-pattern, heterogeneous layers and attention variants: pairs need their own attention "
        "in every layer, which these specs do not have.",
    ),
    _Refusal(
        lambda a: (
            a.cross_entropy_loss_fusion or a.fp16_lm_cross_entropy or a.defer_embedding_wgrad_compute or a.use_mup
        ),
        "--cross-entropy-loss-fusion, --fp16-lm-cross-entropy, --defer-embedding-wgrad-compute and --use-mup act on an "
        "output layer that scored positions do not pass through.",
    ),
    _Refusal(
        lambda a: a.tensor_parallel_num_weight_shards not in (None, a.tensor_model_parallel_size),
        "--tensor-parallel-num-weight-shards: log-probs need this rank's rows of the output layer whole.",
    ),
    _Refusal(
        lambda a: a.log_prob_chunk_size is not None and (a.log_probs != "fused" or a.log_prob_chunk_size < 1),
        "--log-prob-chunk-size: a positive number of vocabulary rows, and only the fused log-probs work in chunks.",
    ),
    _Refusal(
        lambda a: a.log_prob_kept_mib is not None and (a.log_probs != "fused" or a.log_prob_kept_mib < 0),
        "--log-prob-kept-mib: MiB, 0 or more, and only the fused log-probs have the choice.",
    ),
    _Refusal(
        lambda a: a.cuda_graph_impl != "none" or a.enable_cuda_graph or a.external_cuda_graph,
        "CUDA graphs: every pack has another attention plan.",
    ),
    _Refusal(
        lambda a: a.use_megatron_fsdp or a.use_torch_fsdp2,
        "FSDP: the reference and the weights' fingerprint need Megatron's own data parallelism. "
        "Use --use-distributed-optimizer.",
    ),
    _Refusal(
        lambda a: a.logits_save_dir or a.logits_load_dir,
        "--logits-save-dir and --logits-load-dir: a preference run makes no logits of whole sequences.",
    ),
    _Refusal(
        lambda a: a.exit_signal_handler_for_training or a.exit_signal_handler_for_dataloader,
        "--exit-signal-handler-for-training would end a run without a checkpoint, and --exit-signal-handler-for-"
        "dataloader is for loaders that pairs do not use. SIGTERM, --exit-signal and --stop-file save one first.",
    ),
    _Refusal(lambda a: a.seed < 1, "--seed: Megatron takes positive seeds only."),
    _Refusal(
        lambda a: a.batch_invariant_mode,
        "--batch-invariant-mode replaces kernels that attention over pairs does not use.",
    ),
    _Refusal(lambda a: a.freeze_all_layers, "--freeze-all-layers: nothing would be trained."),
    _Refusal(lambda a: a.perform_rl_step, "--perform-rl-step: this is a preference run."),
    _Refusal(lambda a: a.ckpt_format != "torch_dist", "--ckpt-format: checkpoints are torch_dist."),
)


def _has_adapters(args: argparse.Namespace) -> bool:
    return args.lora_rank is not None or args.lora_start is not None


def refuse_what_cannot_be_honoured(args: argparse.Namespace) -> None:
    """Raise UserError naming every flag that is missing, or every setting that a preference run cannot honour."""
    missing = [f"--{name.replace('_', '-')}" for name in _REQUIRED if getattr(args, name) is None]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}.")
    problems = [refusal.message for refusal in _REFUSALS if refusal.applies(args)]
    if problems:
        raise UserError("\n".join(["these settings cannot be honoured:", *(f"  {problem}" for problem in problems)]))
