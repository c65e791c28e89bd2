"""Megatron's options that trade compute, memory or communication: the same numbers with them as without."""

from __future__ import annotations

import pytest

from tests.harness.parity import beyond, deviations, gradient_distance
from tests.parity.matrix import ALLOWED, CP2, EP2, MODELS, PP2, TP2_SP, VPP2

DISTRIBUTED = "--use-distributed-optimizer"
FULL = "--recompute-granularity full"
SELECTIVE = "--recompute-granularity selective --recompute-modules"

#: Name -> (model, ranks, flags). Compared with one process without them.
OPTIONS = {
    "recompute all, uniform": ("dense", 2, f"{TP2_SP} {FULL} --recompute-method uniform --recompute-num-layers 1"),
    "recompute all, uniform, CP": ("dense", 2, f"{CP2} {FULL} --recompute-method uniform --recompute-num-layers 2"),
    "recompute all, block, PP": ("dense", 2, f"{PP2} {FULL} --recompute-method block --recompute-num-layers 1"),
    "recompute attention": ("dense", 2, f"{CP2} {SELECTIVE} core_attn"),
    "recompute MLP and attention": ("dense", 2, f"{TP2_SP} {SELECTIVE} mlp core_attn"),
    "recompute all, experts": ("experts", 2, f"{EP2} {FULL} --recompute-method uniform --recompute-num-layers 1"),
    "recompute experts": ("experts", 2, f"{EP2} {SELECTIVE} moe"),
    "overlap of gradient reduction": ("dense", 2, "--overlap-grad-reduce --ddp-bucket-size 5000"),
    "overlap of gradient reduction, PP": ("tied, qkv biases, q/k norms", 4, f"{PP2} --overlap-grad-reduce"),
    "overlap of both": (
        "dense",
        2,
        f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000",
    ),
    "overlap of both, VPP": ("dense", 4, f"{VPP2} {DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"),
    "overlap of both, experts": ("experts", 2, f"{EP2} {DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"),
    "allgather of tokens": ("experts", 2, f"{EP2} --moe-token-dispatcher-type allgather"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_changes_nothing(run, one_process, name):
    model, ranks, flags = OPTIONS[name]
    overrides = MODELS[model].overrides
    found = deviations(run(ranks, flags.split(), overrides), one_process([], overrides))
    assert beyond(found, ALLOWED) == {}


#: What families of models add to layers and logits, all of it that goes together.
AROUND = (
    "--layer-norms around --window-size 20,0 --window-attn-skip-freq 2 --local-rotary-base 1000 --attention-scale 0.2 "
    "--residual-multiplier 0.7 --embedding-multiplier 3 --logit-scale 0.8 --logit-softcap 3"
)
#: At the usual epsilon the outputs of this model's first layers, which are small, are divided by their own rounding.
AFTER = "--layer-norms after --qk-layernorm --qk-norm-over-heads --norm-epsilon 1e-2"
PARALLEL = "--parallel-layers --normalization LayerNorm --norms-without-bias --rotary-interleaved"
AGAIN = f"{FULL} --recompute-method uniform --recompute-num-layers 1"

#: Options that do change the numbers: compared with one process that has them too.
CHANGING = {
    # A hundredth of the gradient's norm: the norm over all ranks is in every weight.
    "clipping, TP PP": ("dense", 4, f"{TP2_SP} {PP2}", "--clip-grad 0.01"),
    "clipping, tied PP": ("tied, qkv biases, q/k norms", 2, PP2, "--clip-grad 0.01"),
    "clipping, distributed optimizer": ("dense", 2, DISTRIBUTED, "--clip-grad 0.01"),
    "clipping, experts": ("experts", 4, f"{TP2_SP} {EP2}", "--clip-grad 0.01"),
    "clipping, CP": ("dense", 2, CP2, "--clip-grad 0.01"),
    "no packing, no sharing, CP": ("dense", 2, CP2, "--no-pack-pairs --no-share-prompts"),
    "resident reference, CP PP": ("dense", 4, f"{CP2} {PP2}", "--reference resident"),
    "window, CP": ("dense", 2, CP2, "--window-size 20,0"),
    "learned positions, CP": ("dense", 2, CP2, "--position-embedding-type learned_absolute"),
    "yarn, CP": ("dense", 2, CP2, "--position-embedding-type yarn"),
    "norms around, TP PP": ("dense", 4, f"{TP2_SP} {PP2}", AROUND),
    "norms around, VPP, recomputed": ("dense", 2, f"{VPP2} {AGAIN}", AROUND),
    "norms around, tied, CP": ("tied, qkv biases, q/k norms", 2, CP2, AROUND),
    "norms after, TP CP": ("dense", 4, f"{TP2_SP} {CP2}", AFTER),
    "norms after, fewer groups than ranks": ("dense", 4, "--tensor-model-parallel-size 4", AFTER),
    "norms after, recomputed": ("dense", 2, f"{TP2_SP} {SELECTIVE} mlp core_attn", AFTER),
    "norms after, distributed optimizer": ("dense", 4, f"{TP2_SP} {DISTRIBUTED}", f"{AFTER} --clip-grad 0.01"),
    "parallel layers, TP PP": ("dense", 4, f"{TP2_SP} {PP2}", PARALLEL),
    "parallel layers, recomputed": ("dense", 2, f"{TP2_SP} {AGAIN}", PARALLEL),
    "LayerNorm, CP": ("dense", 4, f"{TP2_SP} {CP2}", "--normalization LayerNorm"),
    "bias per expert": (
        "experts",
        2,
        TP2_SP,
        "--moe-aux-loss-coeff 0 --moe-router-enable-expert-bias --moe-router-score-function sigmoid "
        "--moe-router-bias-update-rate 1e-3",
    ),
    "balance by pair": ("experts", 4, f"{TP2_SP} {CP2}", "--moe-router-load-balancing-type seq_aux_loss"),
    "balance by pair, recomputed": (
        "experts",
        4,
        f"{PP2} {EP2} {FULL} --recompute-method uniform --recompute-num-layers 1",
        "--moe-router-load-balancing-type seq_aux_loss",
    ),
    "routers frozen": (
        "experts",
        4,
        f"{TP2_SP} {EP2}",
        "--moe-freeze-router --moe-aux-loss-coeff 0 --moe-z-loss-coeff 0",
    ),
    "shared experts": ("experts", 2, TP2_SP, "--moe-shared-expert-intermediate-size 32"),
    "every second layer dense": ("experts", 4, f"{PP2} {EP2}", "--moe-layer-freq 2"),
}


@pytest.mark.parametrize("name", CHANGING)
def test_option_works_in_the_layout(run, one_process, name):
    model, ranks, layout, option = CHANGING[name]
    overrides = MODELS[model].overrides
    found = run(ranks, f"{layout} {option}".split(), overrides)
    assert beyond(deviations(found, one_process(option.split(), overrides)), ALLOWED) == {}


# bf16 -----------------------------------------------------------------------------------------------------------------

#: Layouts round other partial sums to the 8 bits of bf16: 4e-3 of a hidden state or a gradient, in many places.
ALLOWED_BF16 = {"log-probs": 1e-3, "loss": 1e-2, "gradients": 2e-2}


@pytest.mark.parametrize(
    "flags",
    [TP2_SP, PP2, CP2, DISTRIBUTED, f"{DISTRIBUTED} {FULL} --recompute-method uniform --recompute-num-layers 1"],
)
def test_bf16(run, one_process, flags):
    """Experts are left out: a token near a tie goes to another expert, and nothing is near then."""
    overrides = MODELS["dense"].overrides | {"bf16": True}
    expected, found = one_process([], overrides), run(2, flags.split(), overrides)
    off = deviations(found, expected) | {"gradients": gradient_distance(found, expected)}
    del off["weights"]  # rounded to bf16, they are a whole unit apart or not at all
    assert beyond(off, ALLOWED_BF16) == {}
