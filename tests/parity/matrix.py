"""What is compared: layouts, models, losses, optimizers; and the table of how far they were apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TP2 = "--tensor-model-parallel-size 2"
SP = "--sequence-parallel"
TP2_SP = f"{TP2} {SP}"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
CP2 = "--context-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"

#: Name -> (ranks, flags). Ranks beyond the product of the sizes are data-parallel.
DENSE_LAYOUTS = {
    "DP2": (2, ""),
    "TP2": (2, TP2),
    "TP2 SP": (2, TP2_SP),
    "PP2": (2, PP2),
    "PP2, 1 + 3 layers": (2, f"{PP2} --decoder-first-pipeline-num-layers 1"),
    "PP2 VPP2": (2, VPP2),
    "CP2": (2, CP2),
    "DP4": (4, ""),
    "TP4 SP": (4, f"--tensor-model-parallel-size 4 {SP}"),
    "PP4": (4, "--pipeline-model-parallel-size 4"),
    "CP4": (4, "--context-parallel-size 4"),
    "TP2 DP2": (4, TP2),
    "TP2 SP DP2": (4, TP2_SP),
    "TP2 SP PP2": (4, f"{TP2_SP} {PP2}"),
    "TP2 SP PP2 VPP2": (4, f"{TP2_SP} {VPP2}"),
    "TP2 CP2": (4, f"{TP2} {CP2}"),
    "TP2 SP CP2": (4, f"{TP2_SP} {CP2}"),
    "PP2 DP2": (4, PP2),
    "PP2 CP2": (4, f"{PP2} {CP2}"),
    "PP2 VPP2 CP2": (4, f"{VPP2} {CP2}"),
    "CP2 DP2": (4, CP2),
    "TP2 SP PP2 CP2": (8, f"{TP2_SP} {PP2} {CP2}"),
    "TP2 SP PP2 VPP2 DP2": (8, f"{TP2_SP} {VPP2}"),
    "TP2 SP CP2 DP2": (8, f"{TP2_SP} {CP2}"),
}

#: Where the first and the last stage share the embedding, and biases and norms of queries and keys have gradients too.
TIED_LAYOUTS = {
    name: DENSE_LAYOUTS[name] for name in ("TP2 SP", "PP2", "PP2 VPP2", "CP2", "TP2 SP PP2", "PP2 CP2", "PP2 DP2")
}

#: Tensor parallelism without SP is not for experts: Megatron refuses to train them so.
MOE_LAYOUTS = {
    "DP2": (2, ""),
    "EP2": (2, EP2),
    "TP2 SP": (2, TP2_SP),
    "TP2 SP EP2, experts whole": (2, f"{TP2_SP} {EP2} --expert-tensor-parallel-size 1"),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
    "TP2 SP EP2": (4, f"{TP2_SP} {EP2}"),
    "PP2 EP2": (4, f"{PP2} {EP2}"),
    "PP2 VPP2 EP2": (4, f"{VPP2} {EP2}"),
    "CP2 EP2": (4, f"{CP2} {EP2}"),
    "TP2 SP CP2": (4, f"{TP2_SP} {CP2}"),
    "TP2 SP PP2 EP2": (8, f"{TP2_SP} {PP2} {EP2}"),
    "TP2 SP CP2 EP2": (8, f"{TP2_SP} {CP2} {EP2}"),
}


@dataclass(frozen=True)
class Model:
    """A tiny model and its layouts. ``overrides`` are Megatron's arguments by name, over ``jobs.TINY_MODEL``."""

    layouts: dict[str, tuple[int, str]]
    overrides: dict[str, Any]


#: A step, and one on what it has left. A dense model's packs may differ between layouts: 1, 2 or 4 for a step.
_DENSE_JOB = {"max_pairs": 16, "pairs_per_step": 8, "train_iters": 2, "seq_length": 1024}

#: In the place of these with --full-matrix, for the table; and always of adapters, whose B has moved too little before.
FULL_JOB = {"max_pairs": 24, "pairs_per_step": 8, "train_iters": 3}

MODELS = {
    "dense": Model(DENSE_LAYOUTS, _DENSE_JOB),
    "tied, qkv biases, q/k norms": Model(
        TIED_LAYOUTS,
        {
            **_DENSE_JOB,
            "untie_embeddings_and_output_weights": False,
            "add_qkv_bias": True,
            "qk_layernorm": True,
        },
    ),
    # The load-balancing loss is a mean over a pack, not linear in its tokens: here packs are the same in every layout,
    # a pair each. Its coefficients are large, so that the routers' gradients are its.
    "experts": Model(
        MOE_LAYOUTS,
        {
            "max_pairs": 8,
            "pairs_per_step": 4,
            "train_iters": 2,
            "seq_length": 512,
            "pack_pairs": False,
            "num_experts": 4,
            "moe_router_topk": 2,
            "moe_aux_loss_coeff": 0.1,
            "moe_z_loss_coeff": 0.01,
            "moe_token_dispatcher_type": "alltoall",
        },
    ),
}

MODELS["LoRA"] = Model(
    {
        name: DENSE_LAYOUTS[name]
        for name in (
            "DP2", "TP2", "TP2 SP", "PP2", "PP2 VPP2", "CP2", "TP2 SP PP2", "TP2 CP2", "TP2 SP CP2", "PP2 CP2",
        )
    },
    {**_DENSE_JOB, **FULL_JOB, "lora_rank": 4, "lora_alpha": 32.0},
)  # fmt: skip
MODELS["DoRA, experts"] = Model(
    {name: MOE_LAYOUTS[name] for name in ("EP2", "TP2 SP", "PP2 EP2", "CP2 EP2", "TP2 SP EP2")},
    {**MODELS["experts"].overrides, **FULL_JOB, "lora_rank": 4, "lora_alpha": 32.0, "lora_type": "dora"},
)

ADAPTERS = ("LoRA", "DoRA, experts")

LOSSES = ("dpo", "bdpo", "simpo")

OPTIMIZERS = {"plain": "", "distributed": "--use-distributed-optimizer"}

#: fp32. Log-probs are sums of some hundred terms, each rounded to 6e-8 of itself; a gradient element adds up a thousand
#: products in another order; a weight has taken up to three steps along such gradients.
ALLOWED = {"log-probs": 1e-6, "loss": 2e-6, "gradients": 1e-5, "weights": 3e-6}

#: Of adapters, B begins at zero: all of it is steps along gradients.
ALLOWED_ADAPTERS = ALLOWED | {"weights": ALLOWED["gradients"]}


@dataclass(frozen=True)
class Case:
    """One comparison with one process."""

    model: str
    layout: str
    loss: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.model}-{self.layout}-{self.loss}-{self.optimizer}"

    @property
    def allowed(self) -> dict[str, float]:
        return ALLOWED_ADAPTERS if self.model in ADAPTERS else ALLOWED

    @property
    def ranks(self) -> int:
        return MODELS[self.model].layouts[self.layout][0]

    @property
    def flags(self) -> list[str]:
        layout = MODELS[self.model].layouts[self.layout][1]
        return f"{layout} {OPTIMIZERS[self.optimizer]} --preference-loss {self.loss}".split()


CASES = [
    Case(name, layout, loss, optimizer)
    for name, model in MODELS.items()
    for layout in model.layouts
    for loss in LOSSES
    for optimizer in OPTIMIZERS
]


def _cover() -> set[Case]:
    """Every layout with B-DPO, whose scores are of both kinds, and with one of the losses that need fewer of them.

    One with each optimizer; from layout to layout they take turns, so that all four combinations come in each model.
    Adapters are below any loss: there every layout comes once.
    """
    cases = set()
    for name, model in MODELS.items():
        turns = itertools.product(("dpo", "simpo"), itertools.permutations(OPTIMIZERS))
        for layout, (other, (first, second)) in zip(model.layouts, itertools.cycle(turns), strict=False):
            cases |= {Case(name, layout, "bdpo", first)}
            if name not in ADAPTERS:
                cases |= {Case(name, layout, other, second)}
    return cases


COVER = _cover()
"""What every test run compares; the other cases need --full-matrix."""

TABLE_HEAD = """\
# Parity of layouts

This page shows that a parallel layout does not change what a model learns: every layout below is compared with one
process. Each row is the worst of {runs} runs of three optimizer steps: {losses}, each with the {optimizers} optimizer,
fp32, tiny models, real gloo ranks. The comparison covers the log-probs (log-probabilities) of every sequence (policy,
reference, and without the prompt), the loss of every step, every gradient of every step and every weight after the last
one, gathered as whole tensors. Deviations are relative: log-probs to the largest, each loss to itself, gradients and
weights to the largest element of their tensor.

`make parity` runs the comparison and writes this file. `tests/parity/test_mutations.py` tests that each comparison can
fail.
"""


def render(deviations: dict[Case, dict[str, float]]) -> str:
    """The table of docs/parity.md."""
    head = TABLE_HEAD.format(
        runs=len(LOSSES) * len(OPTIMIZERS), losses=", ".join(LOSSES), optimizers=" and the ".join(OPTIMIZERS)
    )
    allowed = ", ".join(f"{name} {value:.0e}" for name, value in ALLOWED.items())
    adapters = f"for adapters, whose B begins at zero, weights {ALLOWED_ADAPTERS['weights']:.0e}"
    lines = [head, f"Allowed: {allowed}; {adapters}.", ""]
    lines += [f"| model | layout | ranks | {' | '.join(ALLOWED)} |", "|---" * (3 + len(ALLOWED)) + "|"]
    for name, model in MODELS.items():
        for layout, (ranks, _) in model.layouts.items():
            own = [found for case, found in deviations.items() if (case.model, case.layout) == (name, layout)]
            worst = " | ".join(_worst(own, quantity) for quantity in ALLOWED)
            lines.append(f"| {name} | {layout} | {ranks} | {worst} |")
    return "\n".join(lines) + "\n"


def rows(table: str) -> list[tuple[str, str]]:
    """(model, layout) of the rows of a rendered table."""
    cells = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return [(row[0].strip(), row[1].strip()) for row in cells[1:]]


def _worst(deviations: Iterable[dict[str, float]], quantity: str) -> str:
    return f"{max(each[quantity] for each in deviations):.1e}"
