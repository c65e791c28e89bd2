"""What the length of an answer says about its being preferred: a judge who counts tokens would be right so often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bdpo.data.labels import DESIRABLE, PAIR
from megatron_bdpo.data.store import PairStore

_BINS = 60


@dataclass(frozen=True)
class LengthBias:
    """What the length of an answer says about its being chosen.

    Attributes:
        longer, shorter: shares of the pairs whose chosen answer has more, fewer tokens than the rejected one.
        rule: share of the pairs that a judge who knows nothing but lengths gets right, equal ones counted half.
        correlation: of an answer's tokens with its being chosen, over all answers, in [-1, 1].
        mean_difference: of chosen minus rejected, in tokens.
        edges, pairs: a histogram of that difference: [n + 1] and [n], without the few that are far out.
        compared: number of pairs.
    """

    longer: float
    shorter: float
    rule: float
    correlation: float
    mean_difference: float
    edges: list[float]
    pairs: list[int]
    compared: int

    @classmethod
    def of(cls, store: PairStore) -> LengthBias | None:
        """None: there are no pairs."""
        answers = store.scored[store.label == PAIR]
        if not len(answers):
            return None
        difference = answers[:, 0] - answers[:, 1]
        longer, shorter = float((difference > 0).mean()), float((difference < 0).mean())
        mean, spread = float(difference.mean(dtype=np.float64)), float(answers.std(dtype=np.float64))
        widest = max(1.0, float(np.abs(np.percentile(difference, [0.5, 99.5])).max()))
        pairs, edges = np.histogram(difference, np.linspace(-widest, widest, _BINS + 1))
        return cls(
            longer,
            shorter,
            rule=max(longer, shorter) + (1 - longer - shorter) / 2,
            correlation=mean / (2 * spread) if spread else 0.0,
            mean_difference=mean,
            edges=edges.tolist(),
            pairs=pairs.tolist(),
            compared=len(difference),
        )

    def facts(self) -> list[tuple[str, str]]:
        """In words."""
        equal = 1 - self.longer - self.shorter
        return [
            ("chosen is longer", f"{self.longer:.1%}, shorter {self.shorter:.1%}, equal {equal:.1%} of the pairs"),
            ("a rule that knows only lengths", f"is right in {self.rule:.1%}"),
            ("length and being chosen", f"correlation {self.correlation:+.3f}, {self.mean_difference:+.1f} tokens"),
        ]


@dataclass(frozen=True)
class LabelBias:
    """What the length of a labelled answer says about its being desirable.

    Attributes:
        desirable, undesirable: their numbers.
        mean_desirable, mean_undesirable: tokens that are scored; 0 where there is none.
        correlation: of an answer's tokens with its being desirable, in [-1, 1]; 0 where all are alike.
    """

    desirable: int
    undesirable: int
    mean_desirable: float
    mean_undesirable: float
    correlation: float

    @classmethod
    def of(cls, store: PairStore) -> LabelBias | None:
        """None: there are no labelled answers."""
        is_one = store.label != PAIR
        if not is_one.any():
            return None
        tokens, label = store.scored[is_one, 0].astype(np.float64), store.label[is_one] == DESIRABLE
        desirable, undesirable = (float(tokens[which].mean()) if which.any() else 0.0 for which in (label, ~label))
        is_known = label.any() and not label.all() and tokens.std() > 0
        correlation = float(np.corrcoef(tokens, label)[0, 1]) if is_known else 0.0
        return cls(int(label.sum()), int((~label).sum()), desirable, undesirable, correlation)

    def facts(self) -> list[tuple[str, str]]:
        """In words."""
        share = self.desirable / (self.desirable + self.undesirable)
        return [
            ("labelled answers", f"{self.desirable:,} desirable ({share:.1%}), {self.undesirable:,} undesirable"),
            ("their mean tokens", f"desirable {self.mean_desirable:.1f}, undesirable {self.mean_undesirable:.1f}"),
            ("length and being desirable", f"correlation {self.correlation:+.3f}"),
        ]
