"""The formats that pairs and labelled answers are published in: how each is recognised, which of its columns are read.

The first that recognises a row wins. Those at the head are read as they are, by ``records.parse_row``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_bdpo.data import format_converters as converters
from megatron_bdpo.data import labelled_answers as labelled
from megatron_bdpo.data import ranked_answers as ranked
from megatron_bdpo.data.format_options import FormatOptions
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.ranked_answers import OF_EACH_ANSWER
from megatron_bdpo.data.records import (
    ANSWER_REFERENCE,
    ASSISTANT_MARKER,
    COMPLETION,
    LABEL,
    SCORE_COLUMNS,
    is_labelled,
)
from megatron_bdpo.data.row_parts import FOR_TEMPLATE, OF_ANSWERS, Row
from megatron_bdpo.errors import UserError

AUTO = "auto"

_PAIR = ("chosen", "rejected")
#: All that ``records.parse_row`` reads of a pair, and of a labelled answer.
_OURS = ("prompt", *_PAIR, *FOR_TEMPLATE, *OF_ANSWERS, *SCORE_COLUMNS)
_OUR_ANSWER = ("prompt", COMPLETION, LABEL, *FOR_TEMPLATE, ANSWER_REFERENCE)


@dataclass(frozen=True)
class RowFormat:
    """One of them."""

    name: str
    """What ``--pair-format`` calls it."""

    summary: str
    """Who has it, and its columns."""

    recognises: Callable[[Row], bool]
    """Whether the row has this form."""

    rows: Callable[[Row, FormatOptions], Sequence[Row | RowProblem]]
    """The row as one or several that ``records.parse_row`` reads, or why a pair of it cannot be; raises RowProblem."""

    reads: tuple[str, ...] = _OURS
    """Columns that go into the pairs."""

    ignores: Mapping[str, str] = field(default_factory=dict)
    """Columns that are known and left out -> why."""

    uses: tuple[str, ...] = ()
    """Fields of `FormatOptions` that make a difference here."""

    @property
    def is_ours(self) -> bool:
        """Whether the rows are read as they are."""
        return self.rows is converters.as_it_is

    def __reduce__(self) -> tuple[Callable[[str], RowFormat], tuple[str]]:
        """Other processes find it by its name."""
        return named, (self.name,)

    def unread(self, row: Row) -> list[str]:
        """Columns of the row that hold something which is neither read nor left out for a known reason."""
        reads = self.reads
        if self.is_ours:  # pairs and labelled answers may be mixed
            reads = _OUR_ANSWER if is_labelled(row) else _OURS
        known = {*reads, *self.ignores}
        return sorted(name for name, value in row.items() if value is not None and name not in known)


def recognise(row: Row) -> RowFormat | None:
    """The format of the row; None if it has none of these forms."""
    return next((each for each in FORMATS if each.recognises(row)), None)


def named(name: str) -> RowFormat:
    """The format of that name.

    Raises:
        UserError: there is none.
    """
    for each in FORMATS:
        if each.name == name:
            return each
    raise UserError(f"--pair-format: there is no format {name!r}. Known are {AUTO}, {', '.join(NAMES)}.")


# How they are recognised ----------------------------------------------------------------------------------------------


def _has(names: tuple[str, ...], row: Row) -> bool:
    return all(row.get(name) is not None for name in names)


def _is_trl(row: Row) -> bool:
    """Both answers are text or lists of messages, and a prompt is in a column of its own or in both lists."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is not None:
        return isinstance(chosen, str | list) and isinstance(rejected, str | list)
    return _are_conversations(chosen, rejected)


def _are_conversations(chosen: Any, rejected: Any) -> bool:
    both = isinstance(chosen, list) and isinstance(rejected, list)
    return both and chosen[:1] == rejected[:1] != [] and isinstance(chosen[0], dict) and "role" in chosen[0]


def _has_conversations(marks: tuple[str, ...], row: Row) -> bool:
    """TRL's form, in messages, with one of these columns beside."""
    return any(mark in row for mark in marks) and _are_conversations(row.get("chosen"), row.get("rejected"))


def _is_hh_rlhf(row: Row) -> bool:
    answers = [row.get(name) for name in _PAIR]
    return row.get("prompt") is None and all(isinstance(text, str) and ASSISTANT_MARKER in text for text in answers)


def _is_ms_swift(row: Row) -> bool:
    return _has(("messages",), row) and any(_has((name,), row) for name in ("rejected_response", "rejected_messages"))


def _is_argilla(row: Row) -> bool:
    prompts = ("instruction", "prompt")
    return _has(("chosen_response", "rejected_response"), row) and any(_has((name,), row) for name in prompts)


def _is_axolotl(row: Row) -> bool:
    return _has(_PAIR, row) and any(_has((name,), row) for name in ("messages", "conversation"))


def _is_orca(row: Row) -> bool:
    return _has(_PAIR, row) and (_has(("question",), row) or (_has(("input",), row) and "system" in row))


def _is_unpaired(row: Row) -> bool:
    """The answer is text or messages, and a prompt is in a column of its own or in the messages."""
    if not (is_labelled(row) and _has((COMPLETION, LABEL), row)):
        return False
    completion = row[COMPLETION]
    if row.get("prompt") is not None:
        return isinstance(completion, str | list)
    return isinstance(completion, list) and all(isinstance(each, dict) and "role" in each for each in completion)


def _is_axolotl_kto(row: Row) -> bool:
    if not (is_labelled(row) and _has((COMPLETION, LABEL), row)):
        return False
    return any(_has((name,), row) for name in ("instruction", "question")) or (
        _has(("prompt",), row) and "system" in row
    )


def _is_llama_factory_kto(row: Row) -> bool:
    return _has((labelled.KTO_TAG,), row) and any(_has((name,), row) for name in ("conversations", "messages"))


def _is_openrlhf_kto(row: Row) -> bool:
    return _has(("input", "output", LABEL), row) and row.get("instruction") is None


# What they leave out --------------------------------------------------------------------------------------------------


def _because(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


_ORIGIN = partial(_because, "says where the row comes from")
_RATED = partial(_because, "says how good an answer is or by how much it is better; no loss here reads that")
_TOLD = partial(_because, "repeats what another column says")

_TWO_SIDES = ("chosen", "rejected")


def _both(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(side) for side in _TWO_SIDES)


_PKU_SIDES = [
    f"response_{i}_{what}" for i in (0, 1) for what in ("source", "sha256", "harm_category", "severity_level")
]

FORMATS = (
    RowFormat(
        "ultrafeedback-binarized",
        "UltraFeedback as H4 and Argilla made pairs of it: `prompt`, `chosen`, `rejected` in messages, scores beside",
        partial(_has_conversations, ("score_chosen", "chosen-rating")),
        converters.as_it_is,
        ignores={
            **_ORIGIN("prompt_id", "source", *_both("{}-model")),
            **_RATED(*_both("score_{}"), *_both("{}-rating")),
            **_TOLD("messages"),
        },
    ),
    RowFormat(
        "tulu3",
        "Tulu 3's preference mixtures: `prompt`, `chosen`, `rejected` in messages, with `chosen_model`",
        partial(_has_conversations, ("chosen_model", "chosen_rating")),
        converters.as_it_is,
        ignores={**_ORIGIN("id", "source", *_both("{}_model")), **_RATED(*_both("{}_rating"))},
    ),
    RowFormat(
        "trl",
        "TRL, NeMo-RL's binary form: `prompt` (or none), `chosen`, `rejected`, each in text or in messages",
        _is_trl,
        converters.as_it_is,
    ),
    RowFormat("hh-rlhf", "HH-RLHF: `chosen`, `rejected` as whole dialogues in text", _is_hh_rlhf, converters.as_it_is),
    RowFormat(
        "axolotl-kto",
        "axolotl's KTO: `instruction`, `question` or `prompt`, `system`, `completion`, `label`",
        _is_axolotl_kto,
        labelled.axolotl,
        reads=(*labelled.AXOLOTL_PROMPTS, "system", COMPLETION, LABEL, *FOR_TEMPLATE, ANSWER_REFERENCE),
    ),
    RowFormat(
        "unpaired",
        "TRL's KTO: `prompt`, `completion`, in text or in messages (then also as a whole conversation), and `label`, "
        "true or false",
        _is_unpaired,
        converters.as_it_is,
        reads=_OUR_ANSWER,
    ),
    RowFormat(
        "pku-saferlhf",
        "PKU-SafeRLHF: `response_0`, `response_1`, both with safety labels; `--pair-preference` says which is chosen",
        partial(_has, ("prompt", "response_0", "response_1")),
        converters.pku_saferlhf,
        reads=(
            *("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
            *("is_response_0_safe", "is_response_1_safe", *FOR_TEMPLATE),
        ),
        ignores={
            **_ORIGIN("prompt_source", *(name for name in _PKU_SIDES if name.endswith(("source", "sha256")))),
            **_because(
                "says more than safe or not; no loss here reads that",
                *(name for name in _PKU_SIDES if not name.endswith(("source", "sha256"))),
            ),
        },
        uses=("preference",),
    ),
    RowFormat(
        "responses",
        "Any number of answers: `prompt`, `responses`, with `scores`, the highest the best, or `ranks`, the lowest",
        partial(_has, ("prompt", "responses")),
        ranked.responses,
        reads=("prompt", "responses", "scores", "ranks", *OF_EACH_ANSWER, *FOR_TEMPLATE),
        uses=("pairs_from",),
    ),
    RowFormat(
        "nectar",
        "Nectar: `prompt` as a dialogue in text, `answers` with `rank`, 1 the best",
        partial(_has, ("prompt", "answers")),
        ranked.nectar,
        reads=("prompt", "answers", *FOR_TEMPLATE),
        ignores={
            **_ORIGIN("source"),
            **_TOLD("turns", "num_responses"),
            **_because("is a judge's remark on the prompt", "good_natured"),
        },
        uses=("pairs_from",),
    ),
    RowFormat(
        "helpsteer3",
        "HelpSteer3: `context`, `response1`, `response2`, `overall_preference` from -3 (the first) to 3 (the second)",
        partial(_has, ("context", "response1", "response2")),
        converters.helpsteer3,
        reads=("context", "response1", "response2", "overall_preference", *FOR_TEMPLATE),
        ignores={
            **_ORIGIN("domain", "language"),
            **_because("is what `overall_preference` sums up", "individual_preference"),
        },
    ),
    RowFormat(
        "nemo-rl",
        "NeMo-RL's rank form: `context`, `completions` with `rank`, the lowest the best",
        partial(_has, ("context", "completions")),
        ranked.nemo_rl,
        reads=("context", "completions", *FOR_TEMPLATE),
        ignores=_ORIGIN("task_name"),
        uses=("pairs_from",),
    ),
    RowFormat(
        "ultrafeedback",
        "UltraFeedback: `instruction`, `completions` with `fine-grained_score` or, where one has none, `overall_score`",
        partial(_has, ("instruction", "completions")),
        ranked.ultrafeedback,
        reads=("instruction", "completions", *FOR_TEMPLATE),
        ignores={
            **_ORIGIN("source", "models"),
            **_because("is for other tasks", "correct_answers", "incorrect_answers"),
        },
        uses=("pairs_from",),
    ),
    RowFormat(
        "ms-swift",
        "ms-swift: `messages` that end in the chosen answer, `rejected_response` or `rejected_messages`",
        _is_ms_swift,
        converters.ms_swift,
        reads=("messages", "rejected_response", "rejected_messages", "system", *FOR_TEMPLATE, *OF_ANSWERS),
    ),
    RowFormat(
        "llama-factory-kto",
        "LLaMA-Factory's KTO: `conversations` in `from` and `value`, or `messages`, that end in the answer, `kto_tag`",
        _is_llama_factory_kto,
        labelled.llama_factory,
        reads=("conversations", "messages", labelled.KTO_TAG, "system", *FOR_TEMPLATE, ANSWER_REFERENCE),
    ),
    RowFormat(
        "alpaca-kto",
        "LLaMA-Factory's KTO in Alpaca's form: `instruction`, `input`, `output`, `kto_tag`, `system`, `history`",
        partial(_has, ("instruction", "output", labelled.KTO_TAG)),
        labelled.alpaca,
        reads=(
            *("instruction", "input", "output", labelled.KTO_TAG, "system", "history", *FOR_TEMPLATE),
            ANSWER_REFERENCE,
        ),
    ),
    RowFormat(
        "ms-swift-kto",
        "ms-swift's KTO: `messages` that end in the answer, `label`",
        partial(_has, ("messages", LABEL)),
        labelled.ms_swift,
        reads=("messages", LABEL, "system", *FOR_TEMPLATE, ANSWER_REFERENCE),
    ),
    RowFormat(
        "sharegpt",
        "ShareGPT, LLaMA-Factory: `conversations` in `from` and `value`, `chosen`, `rejected`, `system`",
        partial(_has, ("conversations", *_PAIR)),
        converters.sharegpt,
        reads=("conversations", *_PAIR, "system", *FOR_TEMPLATE, *OF_ANSWERS),
    ),
    RowFormat(
        "axolotl",
        "axolotl's chat_template.default, LLaMA-Factory in OpenAI's form: `messages` (or `conversation`), a message "
        "as `chosen`, one as `rejected`",
        _is_axolotl,
        converters.axolotl,
        reads=("messages", "conversation", *_PAIR, "system", *FOR_TEMPLATE, *OF_ANSWERS),
    ),
    RowFormat(
        "alpaca",
        "Alpaca, LLaMA-Factory: `instruction`, `input`, `chosen`, `rejected`, `system`, `history`",
        partial(_has, ("instruction", *_PAIR)),
        converters.alpaca,
        reads=("instruction", "input", *_PAIR, "system", "history", *FOR_TEMPLATE, *OF_ANSWERS),
    ),
    RowFormat(
        "argilla",
        "Argilla, axolotl's chatml.argilla, NeMo-RL's older form: `instruction` or `prompt`, `chosen_response`, "
        "`rejected_response`, `system`",
        _is_argilla,
        converters.argilla,
        reads=("instruction", "prompt", *_both("{}_response"), "system", *FOR_TEMPLATE, *OF_ANSWERS),
        ignores={**_ORIGIN("source", *_both("{}_model")), **_RATED(*_both("{}_avg_rating"))},
    ),
    RowFormat(
        "orca",
        "Orca pairs (Intel's, Argilla's), axolotl's chatml.intel: `system`, `question` or `input`, `chosen`, "
        "`rejected`",
        _is_orca,
        converters.orca,
        reads=("system", "question", "input", *_PAIR, *FOR_TEMPLATE, *OF_ANSWERS),
        ignores={
            **_ORIGIN("labelling_model", "labelling_prompt", "raw_labelling_response", "status", "in_gsm8k_train"),
            **_RATED("rating", "chosen_score"),
            **_TOLD("generations", "order", "original_chosen", "original_rejected"),
        },
    ),
    RowFormat(
        "openrlhf",
        "OpenRLHF: `input`, `chosen`, `rejected`, each in text, joined as they are, or in messages",
        partial(_has, ("input", *_PAIR)),
        converters.openrlhf,
        reads=("input", *_PAIR, *FOR_TEMPLATE, *OF_ANSWERS),
    ),
    RowFormat(
        "openrlhf-kto",
        "OpenRLHF's KTO: `input`, `output`, each in text, joined as they are, or in messages, `label`",
        _is_openrlhf_kto,
        labelled.openrlhf,
        reads=("input", "output", LABEL, *FOR_TEMPLATE, ANSWER_REFERENCE),
    ),
)

NAMES = tuple(each.name for each in FORMATS)

#: Columns that some format reads.
COLUMNS = tuple(sorted({name for each in FORMATS for name in each.reads}))
