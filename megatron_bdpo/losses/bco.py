"""BCO: a binary classifier of labelled answers, whose logit is the reward less the mean reward.

    L = -lambda_D log sigmoid(r - delta)        of a desirable answer,   r = beta Delta
    L = -lambda_U log sigmoid(-(r - delta))     of an undesirable one

    Delta = log pi_theta(y|x) - log pi_ref(y|x), summed over the response
    delta = mean of r over the answers of the step, of either label, without gradient: `shift`, also a metric, `delta`
    lambda_D, lambda_U = desirable_weight, undesirable_weight; 1 is the paper's

The step, not the microbatch, is what delta is a mean over, and no step before it: a run that goes on has the same one,
and so has every layout. It costs a forward pass of the policy per step. TRL's BCOTrainer (of its versions before 1.16,
which has none) takes the mean over all microbatches of all processes from the first of the run to this one, each answer
alike whatever the step: one that forgets nothing, and that begins anew where a run is resumed without its file. An
evaluation has a delta of its own, over all that is held out; TRL's is the last of training.

Answers of either label weigh alike in delta, as in TRL. Later papers, which have pairs, quote delta as half the sum of
the mean rewards of the two labels (the paper's own text was not at hand): the same number where there are as many
desirable answers as undesirable ones.

Not here: the paper's underlying distribution matching, which weighs undesirable answers by a classifier of their
prompts' embeddings (UDM; TRL's `embedding_func`). Of pairs, with no delta: `bco_pair`.

Source: arXiv 2404.04656.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_bdpo.losses.answer_terms import AnswerOptions, answer_log_ratios, labels, mean_log_ratio, weights
from megatron_bdpo.losses.answers import AnswerLogProbs, AnswerLosses
from megatron_bdpo.losses.base import LossSpec, Requirements


def mean_reward(answers: AnswerLogProbs, options: AnswerOptions) -> Tensor:
    """[]: delta, of all answers of a step."""
    return options.beta * mean_log_ratio(answers)


def bco(answers: AnswerLogProbs, options: AnswerOptions) -> AnswerLosses:
    """BCO per answer, [N], in nats; rewards beta Delta. Metric: `delta`, where a step is looked at."""
    reward = options.beta * answer_log_ratios(answers)
    above = reward if answers.shift is None else reward - answers.shift
    loss = -weights(answers, options) * logsigmoid(labels(answers) * above)
    delta = {} if answers.shift is None else {"delta": answers.shift.expand_as(reward)}
    return AnswerLosses(loss, reward.detach(), delta)


SPEC = LossSpec(
    name="bco",
    function=bco,
    options=AnswerOptions,
    requirements=lambda options: Requirements(reference=True),
    summary="Binary Classifier Optimization: labelled answers, rewards shifted by their step's mean",
    source="arXiv 2404.04656",
    takes="answers",
    step_shift=mean_reward,
)
