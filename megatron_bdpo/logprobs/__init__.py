"""From hidden states to log-probs: scored positions only, vocabulary-parallel, explicit process groups.

    scored = ScoredPositions.of(pack.scored_hidden, pack.scored_target, pack.answer_tokens)
    tokens = fused_log_probs(hidden_states, output_layer.weight, None, scored).log_probs    # [N] float32, no logits
    log_probs = answer_log_probs(tokens, scored)                                            # [A] float64, nats

On one process this needs torch and NumPy only; Megatron is loaded where a vocabulary, a sequence or a context is split.
"""

from megatron_bdpo.logprobs.fused_linear import token_log_probs as fused_log_probs
from megatron_bdpo.logprobs.greedy import likeliest_tokens
from megatron_bdpo.logprobs.logit_shape import LogitShape
from megatron_bdpo.logprobs.scored import AnswerScores, OneRank, ScoredPositions, TokenScores, answer_log_probs
from megatron_bdpo.logprobs.scoring import KERNELS, TokenScoring

__all__ = [
    "KERNELS",
    "AnswerScores",
    "LogitShape",
    "OneRank",
    "ScoredPositions",
    "TokenScores",
    "TokenScoring",
    "answer_log_probs",
    "fused_log_probs",
    "likeliest_tokens",
]
