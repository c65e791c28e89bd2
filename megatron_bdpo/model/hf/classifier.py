"""Reward models of Hugging Face: a language model's layers with ``score`` in the place of ``lm_head``.

transformers has them as models for sequence classification with one label. Their tensors are the language model's, but
for the head; so are their ``config.json``, but for what follows here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.family import OUTPUT_LAYER, REWARD_HEAD, Config, Family
from megatron_bdpo.model.hf.kinds import shown
from megatron_bdpo.model.hf.tensors import Rule

_LANGUAGE_MODEL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"

#: Families of which transformers has no such class.
WITHOUT = frozenset({"granite", "cohere2", "ernie4_5", "glm4_moe"})

#: Where it is not called as the language model is.
_OWN_NAMES = {"gemma3_text": f"Gemma3Text{_CLASSIFIER}"}


def classifier_of(family: Family) -> str:
    """The entry in ``architectures`` of a reward model of a family.

    Raises:
        UserError: transformers has no class for it.
    """
    if family.model_type in WITHOUT:
        raise UserError(
            f"reward models of the family '{family.model_type}' cannot be trained here: transformers has no "
            f"{family.architecture.replace(_LANGUAGE_MODEL, _CLASSIFIER)} to load them with. Choose another family."
        )
    return _OWN_NAMES.get(family.model_type, family.architecture.replace(_LANGUAGE_MODEL, _CLASSIFIER))


def is_classifier(config: Config) -> bool:
    """Whether a ``config.json`` says that it is of a model for sequence classification."""
    named = config.get("architectures")
    return isinstance(named, list) and bool(named) and str(named[0]).endswith(_CLASSIFIER)


def refuse_other_labels(config: Config) -> None:
    """A reward model has one.

    Raises:
        UserError: it has several.
    """
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 1)
    if count != 1:
        raise UserError(
            f"config.json: a classifier of {shown(count)} labels is no reward model, which has one. Start from its "
            "language model, or from a model with one label."
        )


def classifier_rules(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The tensors of a reward model, from those of the language model."""
    head = {REWARD_HEAD: Rule({"score.weight": "one"}, "hidden")}
    return {key: rule for key, rule in rules.items() if key != OUTPUT_LAYER} | head


def classifier_config(config: Config, family: Family) -> dict[str, Any]:
    """The ``config.json`` of a reward model, from that of the language model or of a reward model.

    The token for padding is always written: without it transformers takes the family's own, and a reward is read at
    the last token that is another.
    """
    return {
        **config,
        "architectures": [classifier_of(family)],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "num_labels": 1,
        "problem_type": "regression",
        "pad_token_id": padding_token(config),
    }


def padding_token(config: Config) -> int | None:
    """The token that a reward is not read at; None: there is none."""
    token = config.get("pad_token_id")
    return token if isinstance(token, int) and not isinstance(token, bool) and token >= 0 else None
