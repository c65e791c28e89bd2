"""Copies and contradictions among pairs and labelled answers are those that a plain search finds."""

from __future__ import annotations

import random

import pytest

from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.repeats import Repeated, Repeats
from megatron_bdpo.data.sources import SourceSpec

SOURCES = [SourceSpec("a"), SourceSpec("b")]


def expected(records: list[PreferenceRecord], of: str, *, labelled: bool = False) -> Repeated:
    """By looking at all rows before each."""
    found = []
    for place, record in enumerate(records):
        texts = (record.prompt, record.chosen, record.rejected, record.label)
        other = None if record.label is None else not record.label
        wanted = texts if of == "copies" else (texts[0], texts[2], texts[1], other)
        before = [(each.prompt, each.chosen, each.rejected, each.label) for each in records[:place]]
        if wanted in before and (record.label is not None) == labelled:
            found.append((place, before.index(wanted)))
    return Repeated(len(found), *map(where, found[0])) if found else Repeated()


def where(place: int) -> str:
    """Rows come from the two sources in turn."""
    return f"{'ab'[place % 2]}, row {place // 2 + 1}"


def seen(records: list[PreferenceRecord]) -> Repeats:
    repeats = Repeats(SOURCES)
    for place, record in enumerate(records):
        repeats.see(place % 2, place // 2 + 1, record)
    return repeats


@pytest.mark.parametrize("seed", range(8))
def test_what_is_found_is_what_a_plain_search_finds(seed):
    draw = random.Random(seed)
    words = "xyz"[: 2 + seed % 2]
    records = [
        PreferenceRecord(draw.choice(words), *draw.sample(["1", "2", "3", "4"], 2))
        for _ in range(draw.choice([3, 12, 60]))
    ]
    records += [
        PreferenceRecord(draw.choice(words), answer, answer, label=draw.random() < 0.5)
        for answer in draw.choices(["1", "2", "3"], k=draw.choice([0, 4, 30]))
    ]
    draw.shuffle(records)
    found = seen(records).found()
    assert found.copies == expected(records, "copies")
    assert found.exchanged == expected(records, "exchanged")
    assert found.labelled_copies == expected(records, "copies", labelled=True)
    assert found.labelled_both_ways == expected(records, "exchanged", labelled=True)


def test_nothing_is_found_where_nothing_repeats():
    assert seen([]).found().lines() == []
    assert seen([PreferenceRecord("a", "b", "c"), PreferenceRecord("b", "a", "c")]).found().lines() == []


def test_a_text_is_not_the_messages_that_spell_it():
    messages = [{"role": "user", "content": "a"}]
    spelled = '[{"content": "a", "role": "user"}]'
    assert seen([PreferenceRecord(messages, "b", "c"), PreferenceRecord(spelled, "b", "c")]).found().copies.count == 0


def test_the_order_of_fields_is_no_difference():
    one, other = {"role": "user", "content": "a"}, {"content": "a", "role": "user"}
    assert seen([PreferenceRecord([one], "b", "c"), PreferenceRecord([other], "b", "c")]).found().copies.count == 1
