"""Rows with any number of judged answers, to the pairs that ``--pairs-from`` asks for; see ``format_converters``.

Pairs of one row become a group: its answers are stored and computed once. Which answers are tied is told, pair by pair.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_bdpo.data.format_options import FormatOptions
from megatron_bdpo.data.messages import ASSISTANT, USER, says_something
from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import COMPLETION, LABEL, NO_LABEL, as_label, as_log_prob, is_finite
from megatron_bdpo.data.row_parts import (
    FOR_TEMPLATE,
    Messages,
    Row,
    as_answer,
    as_conversation,
    column_of,
    grade_of,
    is_grade,
    passed_on,
    text_of,
    turn_of,
    wrong_type,
)

RESPONSES, RESPONSES_REFERENCE = "responses", "ref_responses_logps"
SCORES = "scores"
GRADES = (SCORES, "ranks")
_SAFE = "responses_safe"
#: What a row may say of each of its answers -> what of a pair's two it becomes.
OF_EACH_ANSWER = {_SAFE: "{}_safe", RESPONSES_REFERENCE: "ref_{}_logps"}

_TURN = re.compile(r"\n\n(Human|Assistant):")


def responses(row: Row, options: FormatOptions) -> list[Row | RowProblem]:
    """``responses`` with ``scores``, the highest the best, or with ``ranks``, the lowest the best; or each by itself.

    An answer whose score or rank is null, or a table's NaN, takes no part.
    """
    prompt, texts = column_of(row, "prompt"), _listed(row, RESPONSES, 1 if options.each_answer else 2)
    if not all(isinstance(each, str) for each in (prompt, *texts)):  # else text, as it is
        prompt = as_conversation(prompt, "column 'prompt'")
        texts = [as_answer(each, f"'responses', answer {number}") for number, each in enumerate(texts, start=1)]
    if options.each_answer:
        _refuse_judged(row)
        shared = {"prompt": prompt, **passed_on(row, *FOR_TEMPLATE)}
        return [{**shared, COMPLETION: each, LABEL: NO_LABEL} for each in texts]
    by = _graded_by(row)
    grades = _of_each(row, by, len(texts))
    ranks = [
        None if grade is None or grade != grade else grade_of({by: grade}, by, f"answer {number}")
        for number, grade in enumerate(grades, start=1)
    ]
    beside = {name: _of_each(row, name, len(texts)) for name in OF_EACH_ANSWER if row.get(name) is not None}
    answers = [{"answer": text, **{name: each[i] for name, each in beside.items()}} for i, text in enumerate(texts)]
    for number, each in enumerate(answers, start=1):
        as_label(each.get(_SAFE), f"'{_SAFE}' of answer {number}")
        if each.get(RESPONSES_REFERENCE) is not None:
            as_log_prob(each[RESPONSES_REFERENCE], f"'{RESPONSES_REFERENCE}' of answer {number}")
    return _compared({"prompt": prompt, **passed_on(row, *FOR_TEMPLATE)}, answers, ranks, by, options)


def _refuse_judged(row: Row) -> None:
    if given := [name for name in GRADES if row.get(name) is not None]:
        what = f"the row has '{given[0]}'; leave the column out to have its answers judged"
        raise RowProblem(ProblemKind.WRONG_TYPE, what)


def _graded_by(row: Row) -> str:
    given = [name for name in GRADES if row.get(name) is not None]
    if len(given) == 2:
        raise RowProblem(ProblemKind.WRONG_TYPE, "the row has both 'scores' and 'ranks'; leave one out")
    if not given:
        has = ", ".join(sorted(name for name in row if row[name] is not None))
        advice = "a reward model gives scores: megatron-bdpo score --objective reward --scored-rows FILE"
        told = f"there are neither 'scores' nor 'ranks'; the row has {has}; {advice}"
        raise RowProblem(ProblemKind.MISSING_COLUMN, told)
    return given[0]


def _listed(row: Row, name: str, at_least: int) -> list[Any]:
    values = column_of(row, name)
    if not isinstance(values, list):
        raise wrong_type(f"column '{name}'", values, "a list")
    if len(values) < at_least:
        needed = "two are" if at_least == 2 else "one is"
        raise RowProblem(ProblemKind.UNRANKED, f"column '{name}' holds {len(values)} answers; {needed} needed")
    return values


def _of_each(row: Row, name: str, answers: int) -> list[Any]:
    """A column with an entry for each answer."""
    values = _listed(row, name, 0)
    if len(values) != answers:
        raise RowProblem(ProblemKind.WRONG_TYPE, f"column '{name}' has {len(values)} entries for {answers} answers")
    return values


def ultrafeedback(row: Row, options: FormatOptions) -> list[Row | RowProblem]:
    """``fine-grained_score``, the mean of four ratings, where all answers have it; else ``overall_score``."""
    prompt = [turn_of(USER, text_of(row, "instruction"))]
    answers = _answers(row, "completions")
    has_all = all(is_grade(each.get("fine-grained_score")) for each in answers)
    by = "fine-grained_score" if has_all else "overall_score"
    return _ranked(row, prompt, answers, "response", by, options)


def nectar(row: Row, options: FormatOptions) -> list[Row | RowProblem]:
    """Rank 1 is the best; the prompt is a dialogue in text."""
    prompt = _dialogue(text_of(row, "prompt"))
    return _ranked(row, prompt, _answers(row, "answers"), "answer", "rank", options)


def nemo_rl(row: Row, options: FormatOptions) -> list[Row | RowProblem]:
    """The lowest rank is the best."""
    prompt = as_conversation(column_of(row, "context"), "column 'context'")
    return _ranked(row, prompt, _answers(row, "completions"), "completion", "rank", options)


def _answers(row: Row, name: str) -> list[Row]:
    answers = column_of(row, name)
    if not (isinstance(answers, list) and all(isinstance(each, dict) for each in answers)):
        raise wrong_type(f"column '{name}'", answers, "a list of objects")
    if len(answers) < 2:
        raise RowProblem(ProblemKind.UNRANKED, f"column '{name}' holds {len(answers)} answers; two are needed")
    return answers


def _ranked(
    row: Row, prompt: Messages, answers: list[Row], text: str, by: str, options: FormatOptions
) -> list[Row | RowProblem]:
    """Pairs of answers of different rank.

    Args:
        text: the answers' field that holds the answer.
        by: the answers' field that ranks them.
    """
    ranks: list[float | None] = []
    texts = []
    for number, each in enumerate(answers, start=1):
        ranks.append(grade_of(each, by, f"answer {number}"))
        texts.append(as_answer(column_of(each, text, f"answer {number}"), f"'{text}' of answer {number}"))
    shared = {"prompt": prompt, **passed_on(row, *FOR_TEMPLATE)}
    return _compared(shared, [{"answer": each} for each in texts], ranks, by, options)


#: Of ranks the lowest is the best, of scores the highest.
_LOWEST_FIRST = ("rank", "ranks")


def _compared(
    shared: Row, answers: list[Row], ranks: list[float | None], by: str, options: FormatOptions
) -> list[Row | RowProblem]:
    """The pairs that ``options.pairs_from`` asks for; those of equal rank, and answers that say nothing, are told as
    problems.

    Args:
        shared: of all pairs.
        answers: each one's ``answer``, and what else the row says of it by the names of ``OF_EACH_ANSWER``.
        ranks: of each; equal ones keep their order. None: it takes no part.
        by: the name of the ranks.
    """
    scores = {i: -rank if by in _LOWEST_FIRST else rank for i, rank in enumerate(ranks) if rank is not None}
    if len(scores) < 2:
        raise RowProblem(ProblemKind.UNRANKED, f"{len(scores)} of {len(answers)} answers have '{by}'; two are needed")
    empty = [place for place in scores if _is_empty(answers[place]["answer"])]
    told = [RowProblem(ProblemKind.EMPTY_RESPONSE, f"answer {place + 1} has no text") for place in empty]
    if len(scores) - len(empty) < 2:
        raise told[0]
    scores = {place: score for place, score in scores.items() if place not in empty}
    order = sorted(scores, key=scores.__getitem__, reverse=True)
    if len(set(scores.values())) == 1:
        raise RowProblem(ProblemKind.TIED, f"all answers have '{by}' {ranks[order[0]]}")
    pairs: list[Row | RowProblem] = []
    for better, worse in _places(order, scores, options):
        if scores[better] == scores[worse]:
            tie = f"answers {better + 1} and {worse + 1} have the same '{by}', {ranks[better]}"
            pairs.append(RowProblem(ProblemKind.TIED, tie))
            continue
        pair = dict(shared)
        has_reference = all(answers[place].get(RESPONSES_REFERENCE) is not None for place in (better, worse))
        for side, place in (("chosen", better), ("rejected", worse)):
            pair[side] = answers[place]["answer"]
            if all(map(is_finite, scores.values())):
                pair[f"{side}_score"] = scores[place]
            if answers[place].get(_SAFE) is not None:
                pair[OF_EACH_ANSWER[_SAFE].format(side)] = answers[place][_SAFE]
            if has_reference:
                pair[OF_EACH_ANSWER[RESPONSES_REFERENCE].format(side)] = answers[place][RESPONSES_REFERENCE]
        pairs.append(pair)
    if not pairs:
        raise RowProblem(ProblemKind.TIED, f"no two answers are {options.margin:g} apart in '{by}'")
    return [*told, *pairs]


def _is_empty(answer: str | Messages) -> bool:
    return not (answer.strip() if isinstance(answer, str) else answer and says_something(answer[-1]))


def _places(order: list[int], scores: Mapping[int, float], options: FormatOptions) -> Iterable[tuple[int, int]]:
    """Which answers are compared, the better one first."""
    if options.margin is not None:
        margin = options.margin
        return [(a, b) for a, b in itertools.combinations(order, 2) if _are_apart(scores[a], scores[b], margin)]
    if options.pairs_from == "all":
        return itertools.combinations(order, 2)
    return itertools.pairwise(order) if options.pairs_from == "adjacent" else [(order[0], order[-1])]


def _are_apart(better: float, worse: float, margin: float) -> bool:
    """By the margin or more, as people read them: 0.9 and 0.8 are 0.1 apart, in 64 bits and in a table's 32."""
    high, low = _as_float(better), _as_float(worse)
    return high - low >= margin - 1e-6 * max(abs(high), abs(low))


def _as_float(value: float) -> float:
    """Infinite where it is one of JSON's integers that are too large."""
    return float(value) if is_finite(value) else math.inf if value > 0 else -math.inf


def _dialogue(text: str) -> Messages:
    """The turns of ``"\\n\\nHuman: ...\\n\\nAssistant: "``; a text without such markers is one turn of the user."""
    before, *parts = _TURN.split(text)
    if not parts:
        return [turn_of(USER, text)]
    speakers, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if before.strip() or speakers[0] != "Human" or speakers[-1] != "Assistant" or texts.pop():
        raise RowProblem(
            ProblemKind.WRONG_TYPE, "column 'prompt' is no dialogue from '\\n\\nHuman:' to an empty '\\n\\nAssistant:'"
        )
    return [turn_of(USER if who == "Human" else ASSISTANT, said) for who, said in zip(speakers, texts, strict=False)]
