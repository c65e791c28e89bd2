"""Groups for losses, as tensors and as lists of answers, and what a loss makes of them."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from megatron_bdpo import losses
from megatron_bdpo.losses import GroupLogProbs, GroupLosses
from tests.harness.group_forms import Answer, Group


def random_groups(count: int, sizes: tuple[int, ...] = (2, 3, 4, 5), seed: int = 0, ties: bool = True) -> list[Group]:
    """Log-probs on a grid of 1/16 and scores of a few values, so that fp32 holds them exactly."""
    rng = random.Random(seed)

    def log_prob(tokens: int) -> float:
        return -round(16 * tokens * rng.uniform(0.05, 5)) / 16 - 1 / 16

    def answer(score: float) -> Answer:
        n = rng.choice([1, 2, 7, 60])
        return Answer(log_prob(n), n, score, log_prob(n), log_prob(n))

    def group() -> Group:
        size = rng.choice(sizes)
        return list(map(answer, rng.choices([-1.5, 1.0, 2.0, 4.5], k=size) if ties else rng.sample(range(9), size)))

    return [group() for _ in range(count)]


AT_THE_REFERENCE = [[a._replace(l=a.r) for a in group] for group in random_groups(4, seed=1)]
EXTREME = [  # |z| = 1e3 at beta 0.1, two rewards that are equal, all scores equal, I near +-1e3
    [Answer(-10.0, 1, 2, -10.0, -12.0), Answer(-10010.0, 1, 1, -10.0, -11.0), Answer(-5.0, 1, 1.5, -10005.0, -4.0)],
    [Answer(-10010.0, 1, 2, -10.0, -11.0), Answer(-10.0, 1, 1, -10.0, -12.0)],
    [Answer(-3.0, 1, 0, -4.0, -5.0), Answer(-4.0, 1, 1, -5.0, -4.5), Answer(-9.0, 1, 1, -7.0, -4.5)],
    [Answer(-3.0, 1, 3, -4.0, -5.0), Answer(-9.0, 1, 3, -7.0, -4.5)],
    [Answer(-1.0, 1, 0, -1.0, -1001.0), Answer(-9.0, 1, 2, -800.0, -2.0), Answer(-9.0, 1, 1, -8.0, -8.0)],
]
GROUPS = random_groups(100) + AT_THE_REFERENCE + EXTREME


def inputs(groups: list[Group], dtype: torch.dtype, places: int = 0, absent: float = 0.0) -> GroupLogProbs:
    """Groups in the given number of places or as many as the largest needs, the empty ones filled."""
    places = max([places, *map(len, groups)])

    def table(field: str, fill: float, dtype: torch.dtype) -> torch.Tensor:
        rows = [[getattr(a, field) for a in group] + [fill] * (places - len(group)) for group in groups]
        return torch.tensor(rows, dtype=dtype).reshape(len(groups), places)

    return GroupLogProbs(
        policy=table("l", absent, dtype).requires_grad_(),
        tokens=table("n", 1, torch.int64),
        score=table("score", absent, dtype),
        present=torch.tensor([len(group) for group in groups])[:, None] > torch.arange(places),
        reference=table("r", -absent, dtype),
        unconditional=table("u", absent, dtype),
        unsafe=table("h", 0, torch.int64),
    )


class Result(NamedTuple):
    loss: torch.Tensor
    gradient: torch.Tensor
    """[G, K], in the policy's log-probs."""


def evaluate(name: str, given: dict[str, object], groups: GroupLogProbs) -> tuple[Result, GroupLosses]:
    out = losses.get(name).function(groups, losses.build_options(name, given))
    return Result(out.loss, *torch.autograd.grad(out.loss.sum(), groups.policy)), out


def told(out: GroupLosses) -> dict[str, torch.Tensor]:
    return {"reward": out.reward, **out.metrics}
