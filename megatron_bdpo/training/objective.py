"""What a job trains: a policy on preferences, or a reward model. Our flags about it, as ``settings`` has the others."""

# Field types are evaluated: Megatron makes flags of them. So no ``from __future__ import annotations`` here.

from dataclasses import dataclass
from typing import Literal

from megatron_bdpo.losses.base import LossFunction
from megatron_bdpo.losses.bradley_terry import SPEC, BradleyTerryOptions
from megatron_bdpo.training.flag_fields import flag


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is trained. All but --objective is for reward models."""

    objective: Literal["preference", "reward"] = "preference"
    """preference: a policy, by --preference-loss. reward: a reward model, with a scalar head for its output layer,
    by the Bradley-Terry loss"""
    center_rewards_coefficient: float | None = flag(type=float, metavar="C")
    """with --objective reward, weight of (r_w + r_l)^2, which keeps rewards around zero (default: 0)"""
    rewards: str | None = flag(metavar="FILE")
    """with --objective reward, where `megatron-bdpo score` writes the rewards of all pairs, as lines of JSON"""

    scored_rows: str | None = flag(metavar="FILE")
    """with --objective reward, where `megatron-bdpo score` writes rows of answers that nobody has judged, with the
    reward of each answer as its score"""

    @property
    def is_reward(self) -> bool:
        return self.objective == "reward"

    def reward_loss(self) -> LossFunction:
        """The loss of a reward model.

        Raises:
            UserError: an option is out of range.
        """
        return LossFunction(SPEC, BradleyTerryOptions(self.center_rewards_coefficient or 0.0))
