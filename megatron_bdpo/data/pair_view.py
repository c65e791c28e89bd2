"""Pairs as a training run sees them: the rendered texts with the boundaries of their tokens, what of them is scored,
and what a pack holds of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.labels import DESIRABLE, UNDESIRABLE, UNJUDGED
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.token_pieces import TokenPieces
from megatron_bdpo.data.tokenization import BoolArray, PairTokenizer, TokenArray
from megatron_bdpo.data.tokenized_rows import TokenizedRows, first_pairs
from megatron_bdpo.data.truncation import truncate
from megatron_bdpo.errors import visible

_WIDTH = 96
_LABELLED = {DESIRABLE: "desirable answer", UNDESIRABLE: "undesirable answer", UNJUDGED: "answer"}


def pair_view(
    record: PreferenceRecord,
    tokenizer: PairTokenizer,
    pieces: TokenPieces,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
) -> list[str]:
    """Lines for a terminal: ``|`` stands between two tokens, ``\\n`` for a line feed.

    Raises:
        RowProblem: the record gives no pair.
    """
    whole = tokenizer.encode(record)
    pair = truncate(whole, max_prompt_tokens, max_response_tokens, tokenizer.start.tokens)
    own = tokenizer.own_unconditional_prompt(record)
    unconditional = tokenizer.empty_prompt(record.is_chat) if own is None else own
    lines = _part("prompt", pair.prompt, whole.prompt, pieces, "")
    names = ["chosen", "rejected"] if record.label is None else [_LABELLED[record.label]]
    answers = zip(names, pair.parts[1:], whole.parts[1:], pair.scored, strict=False)
    for name, tokens, before, scored in answers:
        count = len(tokens) if scored is None else int(scored.sum())
        lines += _part(name, tokens, before, pieces, f", {count} of them scored", scored)
    return lines + _part("unconditional prompt (B-DPO)", unconditional, unconditional, pieces, "")


def without_repeats(pairs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Lines of a row's pairs, in which a text stands once: later pairs name the first that has it.

    Args:
        pairs: of each the lines of :func:`pair_view`; those of a text begin with spaces.
    """
    first: dict[tuple[str, ...], int] = {}
    told: list[list[str]] = []
    for place, lines in enumerate(pairs, start=1):
        told.append([])
        heads = [index for index, line in enumerate(lines) if not line.startswith(" ")]
        for start, stop in itertools.pairwise([*heads, len(lines)]):
            head, text = lines[start], tuple(lines[start + 1 : stop])
            shown = first.setdefault(text, place) if text else place
            told[-1] += [head, *text] if shown == place else [f"{head}, as in pair {shown}"]
    return told


def pack_view(rows: TokenizedRows) -> list[str]:
    """Lines that say what a pack holds of a row: a prompt and its answers once, of one pair or of several."""
    lines = []
    for starts, lengths in zip(*_by_group(rows), strict=True):
        tokens = dict(zip(starts[:, 1:].ravel().tolist(), lengths[:, 1:].ravel().tolist(), strict=True))
        positions = int(lengths[0, 0]) + sum(tokens.values())
        of = f" of a group of {len(starts)} pairs, {len(tokens)} answers" if len(rows) > 1 else ""
        lines.append(f"positions in a pack{of}: {positions}")
    return lines


def _by_group(rows: TokenizedRows) -> tuple[list[npt.NDArray[np.integer]], list[npt.NDArray[np.integer]]]:
    """Starts and lengths of each group's pairs."""
    cuts = first_pairs(rows.starts)[1:]
    return np.split(rows.starts, cuts), np.split(rows.lengths, cuts)


def _part(
    name: str, tokens: TokenArray, whole: TokenArray, pieces: TokenPieces, told: str, scored: BoolArray | None = None
) -> list[str]:
    cut = f", cut from {len(whole)}" if len(tokens) < len(whole) else ""
    head = f"{name}: {len(tokens)} token{'s' * (len(tokens) != 1)}{cut}{told}"
    shown = pieces.of(tokens.tolist())
    if scored is None:
        return [head, *_wrapped(shown)]
    lines = [head]
    for is_scored, run in itertools.groupby(zip(scored.tolist(), shown, strict=True), key=lambda each: each[0]):
        lines += [f"  {'scored' if is_scored else 'context, not scored'}:", *_wrapped([piece for _, piece in run])]
    return lines


def _wrapped(pieces: Sequence[str]) -> Iterator[str]:
    """The pieces in lines, which break between tokens."""
    line = ""
    for place, piece in enumerate(pieces):
        shown = visible(piece).replace("\n", "\\n") + "|" * (place < len(pieces) - 1)
        if line and len(line) + len(shown) > _WIDTH:
            yield f"    {line}"
            line = ""
        line += shown
    yield f"    {line}"
