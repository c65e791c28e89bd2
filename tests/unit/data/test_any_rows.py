"""Rows of any JSON, of any Arrow types and of any text: a record that can be used, or a counted problem."""

from __future__ import annotations

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_bdpo.data.check import check_rows
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.records import PreferenceRecord, parse_row
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.errors import UserError
from tests.reliability.fuzz.invariants import check_record

#: Half of a surrogate pair is among them: JSON can spell it.
any_text = st.text(st.characters(), max_size=12)
odd_numbers = st.sampled_from([10**400, -(10**30), 2**63, 1e308, float("nan"), float("inf"), -0.0])
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | odd_numbers | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["user", "assistant", "system"])
messages = st.fixed_dictionaries({"role": roles | any_text, "content": any_text | any_json})
answers = any_text | st.lists(messages, max_size=3) | any_json
any_row = (
    st.fixed_dictionaries(
        {}, optional={"prompt": answers, "chosen": answers, "rejected": answers, "chosen_safe": any_json}
    )
    | st.fixed_dictionaries(
        {"completion": answers, "label": st.booleans() | any_json}, optional={"prompt": answers, "ref_logps": any_json}
    )
    | st.dictionaries(any_text, any_json, max_size=3)
)

ASK, YES = {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}


@given(any_row)
@example({"\ud800": None})
@example({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_safe": float("nan")})
@example({"prompt": [{"role": "\udfff", "content": ""}], "chosen": "a", "rejected": "b"})
@example({"prompt": [ASK], "chosen": [ASK, YES], "rejected": [YES]})
@settings(max_examples=400, deadline=None)
def test_any_json(row):
    try:
        check_record(parse_row(row))
    except RowProblem as problem:
        assert problem.detail.isprintable()


#: Arrow's types -> values of them.
ARROW = {
    pa.string(): st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    pa.large_string(): st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    pa.binary(): st.binary(max_size=8),
    pa.int8(): st.integers(-128, 127),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float16(): st.floats(width=16),
    pa.bool_(): st.booleans(),
    pa.null(): st.none(),
    pa.date32(): st.dates(),
    pa.timestamp("us"): st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2200, 1, 1)),
    pa.decimal128(9, 2): st.decimals(-1000, 1000, places=2).map(decimal.Decimal),
    pa.list_(pa.string()): st.lists(st.text("ab", max_size=2), max_size=2),
    pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])): st.lists(
        st.fixed_dictionaries({"role": roles, "content": st.text("ab", max_size=3) | st.none()}), max_size=3
    ),
    pa.struct([("content", pa.string())]): st.fixed_dictionaries({"content": st.text("ab", max_size=2)}),
    pa.map_(pa.string(), pa.int32()): st.lists(st.tuples(st.text("ab", max_size=2), st.integers(0, 9)), max_size=2),
}


@st.composite
def tables(draw) -> pa.Table:
    rows = draw(st.integers(1, 4))
    columns = {}
    for name in ("prompt", "chosen", "rejected", "chosen_safe"):
        if draw(st.integers(0, 7)):
            kind = draw(st.sampled_from(list(ARROW)))
            values = draw(st.lists(st.none() | ARROW[kind], min_size=rows, max_size=rows))
            columns[name] = pa.array(values, kind)
    return pa.table(columns or {"prompt": pa.array(["p"])})


@given(tables())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_arrow_types(tmp_path, table):
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    try:
        report = check_rows((SourceSpec(str(path)),))
    except UserError:
        return
    assert report.rows_read == [table.num_rows] == [report.pairs_kept[0] + report.dropped_rows]
    json.dumps(report.to_json())


@pytest.fixture(scope="module")
def tokenizer(megatron_tokenizer, qwen_like):
    return megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like))


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
conversations = st.lists(st.fixed_dictionaries({"role": roles, "content": plain_text}), min_size=1, max_size=3)


@given(conversations, plain_text, plain_text)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_conversation_through_a_template(tokenizer, prompt, chosen, rejected):
    """What the model sees of a pair is the rendered text's own tokens, cut where the prompt ends."""
    answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    try:
        pair = PairTokenizer(tokenizer).encode(PreferenceRecord(prompt, *answers))
    except RowProblem:
        return
    for answer, found in zip(answers, pair.parts[1:], strict=True):
        text = tokenizer.apply_chat_template(prompt + answer, tokenize=False, add_generation_prompt=False)
        assert [*pair.prompt.tolist(), *found.tolist()] == list(tokenizer.tokenize(text))
    assert pair.chosen.tolist() != pair.rejected.tolist()
