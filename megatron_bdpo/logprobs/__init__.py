"""From hidden states to log-probs: scored positions only, vocabulary-parallel, explicit process groups."""

from megatron_bdpo.logprobs.scored import ScoredPositions, sequence_log_probs
from megatron_bdpo.logprobs.vocab_parallel import token_log_probs

__all__ = ["ScoredPositions", "sequence_log_probs", "token_log_probs"]
