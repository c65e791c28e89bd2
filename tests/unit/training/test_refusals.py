"""Settings of Megatron that a preference run cannot honour are refused, each with its reason and flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.jobs import TINY_JOB, TINY_MODEL

ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"

OWN_LOSS = Path(__file__).parents[3] / "examples" / "own_loss" / "own_loss" / "__init__.py"

# Flags -> how the reason begins that they are refused with.
REFUSED = {
    "--pair-epochs 2": "give one of --train-iters",
    "--pair-epochs 0": "give one of --train-iters",
    "--pair-epochs -3": "give one of --train-iters",
    "--eval-pair-data held.jsonl --eval-share 0.1": "--eval-pair-data and --eval-share",
    "--eval-seed 7": "--eval-seed, at least 0, draws what --eval-share holds out",
    "--eval-share 0.1 --eval-seed -1": "--eval-seed, at least 0, draws what --eval-share holds out",
    "--save run": "--save DIR goes together with --save-interval",
    "--save-interval 5": "--save DIR goes together with --save-interval",
    "--save-every 5m": "--save DIR goes together with --save-interval",
    "--save-retain-interval 50": "--keep-checkpoints and --save-retain-interval",
    "--keep-checkpoints 0": "--keep-checkpoints and --save-retain-interval",
    "--async-save": "--async-save needs --use-persistent-ckpt-worker",
    "--async-save --use-persistent-ckpt-worker": "--async-save needs --use-persistent-ckpt-worker",
    f"{ASYNC} --optimizer-cpu-offload": "--async-save needs --use-persistent-ckpt-worker",
    f"--loss-file {OWN_LOSS} --preference-loss dpo": "--loss-file: --preference-loss names",
    "--push-to-hub me/model": "--push-to-hub sends what --save-hf has written",
    "--eval-prompt-tokens 9": "--eval-prompt-tokens: at least 1",
    "--eval-prompts ask.jsonl --eval-prompt-tokens 0": "--eval-prompt-tokens: at least 1",
    "--wandb-project p": "--wandb-project needs wandb",
    "--mlflow-experiment e": "--mlflow-experiment needs MLflow",
    "--swanlab-project p": "--swanlab-project needs SwanLab",
    "--gpu-memory 80": "--gpus-per-node, --gpu-memory",
    "--fake-process-group": "--fake-process-group",
    "--micro-batch-size 2": "--micro-batch-size: a microbatch is one pack",
    "--global-batch-size 8": "--global-batch-size (and --eval-...-batch-size) count packs",
    "--eval-global-batch-size 8": "--global-batch-size (and --eval-...-batch-size) count packs",
    "--eval-micro-batch-size 1": "--global-batch-size (and --eval-...-batch-size) count packs",
    "--step-batch-size-schedule 0:8": "the batch-size schedule flags",
    "--decrease-batch-size-if-needed": "the batch-size schedule flags",
    "--rampup-batch-size 4 4 16": "the batch-size schedule flags",
    "--train-samples 100": "--train-samples counts packs",
    "--eval-iters 5": "--eval-iters: every evaluation covers all held-out pairs",
    "--dataloader-type cyclic": "--dataloader-type: the step plan is the data loader",
    "--full-validation": "--full-validation, --multiple-validation-sets and --start-eval-at-iter",
    "--multiple-validation-sets": "--full-validation, --multiple-validation-sets and --start-eval-at-iter",
    "--start-eval-at-iter 3": "--full-validation, --multiple-validation-sets and --start-eval-at-iter",
    "--data-path tokens": "Megatron's token data flags",
    "--train-data-path tokens": "Megatron's token data flags",
    "--valid-data-path tokens": "Megatron's token data flags",
    "--test-data-path tokens": "Megatron's token data flags",
    "--mock-data": "Megatron's token data flags",
    "--sft": "Megatron's token data flags",
    "--data-args-path flags.txt": "--data-args-path, --per-split-data-args-path",
    "--per-split-data-args-path x.json": "--data-args-path, --per-split-data-args-path",
    "--fim-data": "--data-args-path, --per-split-data-args-path",
    "--phase-transition-iterations 5": "--data-args-path, --per-split-data-args-path",
    "--reset-position-ids": "--reset-position-ids, --reset-attention-mask and --eod-mask-loss",
    "--reset-attention-mask": "--reset-position-ids, --reset-attention-mask and --eod-mask-loss",
    "--eod-mask-loss": "--reset-position-ids, --reset-attention-mask and --eod-mask-loss",
    "--iterations-to-skip 2": "--iterations-to-skip",
    "--seed 0": "--seed: Megatron takes positive seeds only",
    "--batch-invariant-mode": "--batch-invariant-mode replaces kernels",
    "--hidden-dropout 0.1": "dropout: the policy would differ from its own reference",
    "--attention-dropout 0.1": "dropout: the policy would differ from its own reference",
    "--lora-rank 4 --use-transformer-engine-op-fuser": "--use-transformer-engine-op-fuser: adapters stand beside",
    "--lora-rank 4 --fp8-param-gather": "--fp8-param-gather, --init-model-with-meta-device: the weights",
    "--lora-rank 4 --tensor-model-parallel-size 2 --moe-shared-expert-overlap": "--moe-shared-expert-overlap with",
    "--lora-rank 4 --moe-mlp-glu-interleave-size 8": "--moe-single-grouped-weight, --moe-mlp-glu-interleave-size",
    "--lora-rank 4 --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3": (
        "--moe-router-bias-update-rate changes the frozen model"
    ),
    "--moe-input-jitter-eps 0.01": "--moe-input-jitter-eps",
    "--moe-router-force-load-balancing": "--moe-input-jitter-eps",
    "--moe-router-force-biased 1.0": "--moe-input-jitter-eps",
    "--moe-enable-routing-replay": "--moe-input-jitter-eps",
    "--moe-router-load-balancing-type sinkhorn": "--moe-router-load-balancing-type",
    "--moe-router-load-balancing-type aux_loss global_aux_loss": "--moe-router-load-balancing-type",
    "--moe-router-load-balancing-type seq_aux_loss --recompute-granularity selective --recompute-modules moe": (
        "--moe-router-load-balancing-type"
    ),
    "--moe-freeze-router": "--moe-freeze-router",
    "--num-experts 4 --moe-freeze-router --moe-z-loss-coeff 0.1": "--moe-freeze-router",
    "--lora-rank 4 --num-experts 4 --moe-freeze-router": "--moe-freeze-router",
    "--moe-expert-capacity-factor 1.5": "--moe-expert-capacity-factor",
    "--moe-expert-rank-capacity-factor 1.5": "--moe-expert-capacity-factor",
    "--logit-softcap 0": "--attention-scale, --attention-softcap",
    "--use-transformer-engine-op-fuser --layer-norms after": "--use-transformer-engine-op-fuser has its norm",
    "--recompute-granularity selective --recompute-modules layernorm": "--recompute-modules layernorm",
    "--recompute-granularity selective --recompute-modules core_attn moe_act": "--recompute-modules layernorm",
    "--parallel-layers --recompute-granularity selective --recompute-modules layernorm": (
        "--parallel-layers with --recompute-modules layernorm"
    ),
    "--overlap-moe-expert-parallel-comm": "--overlap-moe-expert-parallel-comm",
    "--cp-comm-type a2a": "--cp-comm-type",
    "--hierarchical-context-parallel-sizes 2 2": "--cp-comm-type",
    "--hybrid-context-parallel": "--hybrid-context-parallel",
    "--attention-backend fused": "--attention-backend",
    "--attention-backend unfused": "--attention-backend",
    "--attention-backend local": "--attention-backend",
    "--use-kitchen-attention": "--attention-backend",
    "--position-embedding-type mrope": "--position-embedding-type",
    "--position-embedding-type relative": "--position-embedding-type",
    "--multi-latent-attention --mla-down-proj-fusion": "--mla-down-proj-fusion, --cache-mla-latents",
    "--multi-latent-attention --cache-mla-latents": "--mla-down-proj-fusion, --cache-mla-latents",
    "--mtp-num-layers 1": "--mtp-num-layers",
    "--hybrid-layer-pattern M*M*": "--spec, --hybrid-layer-pattern, heterogeneous layers",
    "--hybrid-override-pattern M*M*": "--spec, --hybrid-layer-pattern, heterogeneous layers",
    "--spec local": "--spec, --hybrid-layer-pattern, heterogeneous layers",
    "--heterogeneous-layers-config-path x.json": "--spec, --hybrid-layer-pattern, heterogeneous layers",
    "--heterogeneous-layers-config-encoded-json {}": "--spec, --hybrid-layer-pattern, heterogeneous layers",
    "--experimental-attention-variant dsa": "--spec, --hybrid-layer-pattern, heterogeneous layers",
    "--linear-attention-freq 2": "--spec, --hybrid-layer-pattern, heterogeneous layers",
    "--cross-entropy-loss-fusion": "--cross-entropy-loss-fusion, --fp16-lm-cross-entropy",
    "--fp16-lm-cross-entropy": "--cross-entropy-loss-fusion, --fp16-lm-cross-entropy",
    "--defer-embedding-wgrad-compute": "--cross-entropy-loss-fusion, --fp16-lm-cross-entropy",
    "--use-mup": "--cross-entropy-loss-fusion, --fp16-lm-cross-entropy",
    "--tensor-parallel-num-weight-shards 3": "--tensor-parallel-num-weight-shards",
    "--log-prob-chunk-size 0": "--log-prob-chunk-size",
    "--log-probs plain --log-prob-chunk-size 8": "--log-prob-chunk-size",
    "--log-prob-kept-mib -1": "--log-prob-kept-mib",
    "--log-probs plain --log-prob-kept-mib 8": "--log-prob-kept-mib",
    "--cuda-graph-impl local": "CUDA graphs",
    "--enable-cuda-graph": "CUDA graphs",
    "--external-cuda-graph": "CUDA graphs",
    "--use-megatron-fsdp": "FSDP",
    "--use-torch-fsdp2": "FSDP",
    "--logits-save-dir logits": "--logits-save-dir and --logits-load-dir",
    "--logits-load-dir logits": "--logits-save-dir and --logits-load-dir",
    "--freeze-all-layers": "--freeze-all-layers",
    "--perform-rl-step": "--perform-rl-step",
    "--reference resident --reference-cache d": "--reference-cache",
    "--sync-reference-mix 0.5": "--sync-reference-every",
    "--sync-reference-every 2": "--sync-reference-every",
    "--sync-reference-every 2 --reference resident --lora-rank 2": "--sync-reference-every",
    "--sync-reference-every 0 --reference resident": "--sync-reference-every",
    "--sync-reference-mix 1.5 --sync-reference-every 2 --reference resident": "--sync-reference-every",
    "--sync-reference-mix 0 --sync-reference-every 2 --reference resident": "--sync-reference-every",
    "--tp-comm-overlap": "--tp-comm-overlap",
    "--tp-comm-overlap --dry-run 2": "--tp-comm-overlap",
    "--tp-comm-overlap --fixed-pack-length": "--tp-comm-overlap",
    "--fp8-output-proj": "--fp8-output-proj",
    "--fp4-format e2m1": "--fp4-format",
    "--exit-signal-handler-for-training": "--exit-signal-handler-for-training",
    "--exit-signal-handler-for-dataloader": "--exit-signal-handler-for-training",
    "--ckpt-format torch": "--ckpt-format",
    "--ckpt-format fsdp_dtensor": "--ckpt-format",
}

ALLOWED = [
    "",
    "--save run --save-interval 5",
    "--save run --save-every 30m --keep-checkpoints 2",
    "--save run --save-every 30m --save-interval 50 --save-retain-interval 100",
    "--dry-run --gpu-memory 80",
    "--micro-batch-size 1",
    "--eval-iters 0",
    "--dataloader-type external",
    "--hidden-dropout 0 --attention-dropout 0",
    "--lora-rank 4 --moe-grouped-gemm",
    "--attention-backend flash",
    "--position-embedding-type yarn",
    "--position-embedding-type none",
    "--position-embedding-type learned_absolute",
    "--sequence-parallel --tensor-model-parallel-size 2",
    "--context-parallel-size 2 --cp-comm-type all_gather",
    "--num-experts 4 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001",
    "--num-experts 4 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01",
    "--num-experts 4 --moe-freeze-router",
    "--num-experts 4 --moe-router-load-balancing-type none",
    "--use-distributed-optimizer --overlap-grad-reduce",
    "--recompute-granularity selective --recompute-modules core_attn mlp moe",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--window-size 64,0 --bf16",
    "--log-probs plain --log-entropy",
    "--log-prob-chunk-size 8",
    "--log-prob-kept-mib 0",
    "--eval-share 0.1 --eval-every 5m",
    "--eval-share 0.1 --eval-prompts ask.jsonl --eval-prompt-tokens 16",
    "--exit-signal-handler --exit-signal SIGUSR2",
    "--stop-file a b",
    "--fp8-format hybrid --fp8-recipe tensorwise --bf16",
    "--pair-attention sdpa",
    "--fixed-pack-length",
    "--softmax-type learnable",
    "--multi-latent-attention",
    "--dry-run 2 --tp-comm-overlap --fixed-pack-length",
    ASYNC,
]


def command_lines() -> list[dict[str, str]]:
    """REFUSED, dealt out so that every reason comes once in a command line: building Megatron's parser takes 0.1 s."""
    dealt: list[dict[str, str]] = []
    for flags, reason in REFUSED.items():
        line = next((line for line in dealt if reason not in line.values()), None)
        if line is None:
            dealt.append(line := {})
        line[flags] = reason
    return dealt


LINES = {" ".join(line): line for line in command_lines()}


def refusals(all_flags: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The reasons each command line is refused with, and the messages of all refusals that there are."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.flags import refusals as module
    from megatron_bdpo.training.flags.arguments import Arguments

    found = {}
    for flags in all_flags:
        arguments = Arguments.parse(flags.split(), TINY_MODEL | TINY_JOB)
        try:
            module.refuse_what_cannot_be_honoured(arguments.megatron)
            found[flags] = []
        except UserError as error:
            title, *lines = str(error).split("\n")
            assert title == "these settings cannot be honoured:"
            found[flags] = [line.removeprefix("  ") for line in lines]
    return found, [refusal.message for refusal in module._REFUSALS]


@pytest.fixture(scope="module")
def outcome(ranks) -> tuple[dict[str, list[str]], list[str]]:
    return ranks(1)(refusals, [*LINES, *ALLOWED])[0]


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_with_its_reason(outcome, flags):
    (line,) = [line for line in LINES if flags in LINES[line]]
    assert [reason.startswith(REFUSED[flags]) for reason in outcome[0][line]].count(True) == 1


@pytest.mark.parametrize("line", LINES)
def test_every_reason_is_named_and_no_other(outcome, line):
    assert len(outcome[0][line]) == len(LINES[line])


@pytest.mark.parametrize("flags", ALLOWED)
def test_allowed(outcome, flags):
    assert outcome[0][flags] == []


def test_every_refusal_is_tested_here(outcome):
    found, messages = outcome
    assert {reason for line in LINES for reason in found[line]} == set(messages)
