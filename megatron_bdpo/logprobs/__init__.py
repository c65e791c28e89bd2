"""From hidden states to log-probs: scored positions only, vocabulary-parallel, explicit process groups."""

from megatron_bdpo.logprobs.scored import ScoredPositions, TokenScores, sequence_log_probs
from megatron_bdpo.logprobs.scoring import KERNELS, TokenScoring

__all__ = ["KERNELS", "ScoredPositions", "TokenScores", "TokenScoring", "sequence_log_probs"]
