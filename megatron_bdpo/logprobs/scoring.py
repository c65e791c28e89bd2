"""Which kernel turns hidden states into log-probs, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_bdpo.logprobs import fused_linear, vocab_parallel
from megatron_bdpo.logprobs.logit_shape import LogitShape
from megatron_bdpo.logprobs.scored import AnswerScores, ScoredPositions, TokenScores

KERNELS: Mapping[str, Callable[..., TokenScores]] = {
    "fused": fused_linear.token_log_probs,
    "plain": vocab_parallel.token_log_probs,
}


@dataclass(frozen=True)
class TokenScoring:
    """How the scored positions of a pack are scored."""

    vocab_size: int
    """Entries of the tokenizer."""
    kernel: str = "fused"
    """A name in ``KERNELS``."""
    chunk_size: int | None = None
    """Vocabulary rows whose logits exist at once; the fused kernel's choice when None. Other kernels have no chunks."""
    entropy: bool = False
    """Compute the entropy of every scored position, too."""
    collision_entropy: bool = False
    """Compute its collision entropy -log sum_v p_v^2 (Renyi's of order 2), too."""
    kept_bytes: int | None = None
    """Largest softmax that the fused kernel keeps for backward instead of making it again; its bound when None."""
    shape: LogitShape = field(default_factory=LogitShape)
    """Scale and cap of the logits."""

    def apart(self, scores: Tensor) -> AnswerScores:
        """What the output layer has returned for A answers (``AnswerScores.stacked``)."""
        if not (self.entropy or self.collision_entropy):
            return AnswerScores(scores)
        log_probs, *rows = scores
        return AnswerScores(
            log_probs,
            rows.pop(0) if self.entropy else None,
            rows.pop(0) if self.collision_entropy else None,
        )

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, scored: ScoredPositions, **layout: Any
    ) -> TokenScores:
        """Score. ``layout`` holds the kernels' arguments about process group and parallelism."""
        given = {"chunk_size": self.chunk_size, "kept_bytes": self.kept_bytes}
        given = {name: value for name, value in given.items() if value is not None}
        return KERNELS[self.kernel](
            hidden_states,
            weight,
            bias,
            scored,
            vocab_size=self.vocab_size,
            entropy=self.entropy,
            collision_entropy=self.collision_entropy,
            shape=self.shape,
            **given,
            **layout,
        )
