"""Which tokens of an answer of several turns are scored, against transformers' own tokens, masks and offsets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import PreferenceRecord, parse_row
from megatron_bdpo.data.row_reader import RECOGNISED, row_readers
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.text_encoder import TextEncoder
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.data.tokenizing import RowTokenizer
from megatron_bdpo.data.truncation import truncate
from tests.unit.conftest import CHATML_TEMPLATE, LLAMA_TEMPLATE

Build = Callable[..., PairTokenizer]

# As in Qwen3's: reasoning is written for the last turn alone, and there even where there is none.
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

USER = {"role": "user", "content": "What is the capital of France?"}
LONG = [
    {"role": "assistant", "content": "The city of Paris."},
    {"role": "user", "content": "Are you sure? Please answer."},
    {"role": "assistant", "content": "Yes, the capital is Paris."},
]
SHORT = [{"role": "assistant", "content": "Maybe not"}]
RECORD = PreferenceRecord([USER], LONG, SHORT)


@pytest.fixture(scope="module")
def build(megatron_tokenizer: Callable[..., Any], qwen_like: Path) -> Build:
    def tokenizer(template: str, **options: Any) -> PairTokenizer:
        of_megatron = megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like), chat_template=template)
        return PairTokenizer(of_megatron, **options)

    return tokenizer


def hugging_face(tokenizer: PairTokenizer) -> Any:
    return tokenizer._tokenizer._tokenizer.tokenizer  # type: ignore[attr-defined]


def scored_text(tokenizer: PairTokenizer, ids: np.ndarray, scored: np.ndarray | None) -> str:
    """The text of the scored tokens, stretches apart."""
    assert scored is not None
    stretches = np.split(ids, np.flatnonzero(np.diff(scored)) + 1)
    kept = stretches[0 if scored[0] else 1 :: 2]
    return "|".join(hugging_face(tokenizer).decode(stretch, skip_special_tokens=False) for stretch in kept)


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, LLAMA_TEMPLATE, THINKING_TEMPLATE, MARKED_TEMPLATE])
def test_tokens_are_those_of_the_whole_conversation(build: Build, template: str) -> None:
    tokenizer = build(template)
    pair = tokenizer.encode(RECORD)
    theirs = hugging_face(tokenizer)
    for answer, found in ((LONG, pair.chosen), (SHORT, pair.rejected)):
        whole = theirs.apply_chat_template([USER, *answer], return_dict=False)
        assert [*pair.prompt, *found] == list(whole)
    assert pair.rejected_scored is None


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (CHATML_TEMPLATE, ["The city of Paris.<|im_end|>\n", "Yes, the capital is Paris.<|im_end|>\n"]),
        (
            THINKING_TEMPLATE,
            ["The city of Paris.<|im_end|>\n", "<think></think>Yes, the capital is Paris.<|im_end|>\n"],
        ),
        (MARKED_TEMPLATE, ["The city of Paris.<|im_end|>", "Yes, the capital is Paris.<|im_end|>"]),
    ],
)
def test_the_assistants_turns_are_scored(build: Build, template: str, turns: list[str]) -> None:
    pair = build(template).encode(RECORD)
    assert scored_text(build(template), pair.chosen, pair.chosen_scored) == "|".join(turns)

    last = build(template, train_on="last").encode(RECORD)
    assert last.chosen.tolist() == pair.chosen.tolist()
    assert scored_text(build(template), last.chosen, last.chosen_scored) == turns[-1]


def test_marks_of_a_template_are_those_of_transformers(build: Build) -> None:
    tokenizer = build(MARKED_TEMPLATE)
    pair = tokenizer.encode(RECORD)
    mask = hugging_face(tokenizer).apply_chat_template(
        [USER, *LONG], return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    assert pair.chosen_scored is not None
    assert pair.chosen_scored.tolist() == [bool(each) for each in mask[len(pair.prompt) :]]


def test_sentencepiece_finds_the_same_turns(megatron_tokenizer: Callable[..., Any], sentencepiece_model: Path) -> None:
    template = (
        "{% for m in messages %}\n[{{ m.role }}]\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}\n[assistant]\n{% endif %}"
    )
    of_megatron = megatron_tokenizer(
        "SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model), chat_template=template
    )
    pair = PairTokenizer(of_megatron).encode(RECORD)
    scored = pair.chosen[pair.chosen_scored].tolist()
    assert " ".join(of_megatron.detokenize(scored[:-1]).split()) == "The city of Paris. Yes, the capital is Paris."
    assert scored[-1] == of_megatron.eod  # the template leaves the turn open


def test_rows_of_several_turns(build: Build, tmp_path: Path) -> None:
    """As they come from a file; the row's own log-probs are of whole answers, so they are of no use here."""
    row = {"prompt": [USER], "chosen": LONG, "rejected": SHORT, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    source = SourceSpec(str(tmp_path / "rows.jsonl"))
    Path(source.path).write_text(json.dumps(row))
    work = RowTokenizer(build(CHATML_TEMPLATE), row_readers([source], RECOGNISED))
    rows = work(0, [(1, row), (2, {**row, "chosen": LONG[:1]})])
    assert len(rows) == rows.outcome.read == 2
    assert len(rows.context) == 1
    assert np.isnan(rows.reference).all(axis=1).tolist() == [True, False]


def test_tool_calls_are_scored_and_what_tools_answer_is_not(build: Build) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    answer = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "The answer is maybe"},
        {"role": "assistant", "content": "yes"},
    ]
    row = {"prompt": [USER], "chosen": answer, "rejected": SHORT, "tools": [tool]}
    tokenizer = build(TOOL_TEMPLATE)
    pair = tokenizer.encode(parse_row(row))
    assert scored_text(tokenizer, pair.chosen, pair.chosen_scored) == 'add{"a": 1}<|im_end|>\n|yes<|im_end|>\n'
    assert '"name": "add"' in hugging_face(tokenizer).decode(pair.prompt)

    with pytest.raises(RowProblem, match="does not read any"):
        build(CHATML_TEMPLATE).encode(parse_row(row))


def test_answers_that_begin_with_the_users_turn(build: Build) -> None:
    begun = [USER, LONG[0]]
    chosen, rejected = ([{"role": "user", "content": text}, *SHORT] for text in ("yes, or", "maybe no"))
    row = {"chosen": [*begun, *chosen], "rejected": [*begun, *rejected]}
    pair = build(CHATML_TEMPLATE).encode(parse_row(row))
    for ids, scored in ((pair.chosen, pair.chosen_scored), (pair.rejected, pair.rejected_scored)):
        assert scored_text(build(CHATML_TEMPLATE), ids, scored) == "Maybe not<|im_end|>\n"


def test_plain_dialogues(build: Build) -> None:
    begin = "\n\nHuman: What is the capital?\n\nAssistant:"
    rest = " Paris\n\nHuman: Please?\n\nAssistant: Paris, of course"
    tokenizer = build(CHATML_TEMPLATE)
    pair = tokenizer.encode(parse_row({"chosen": begin + rest, "rejected": begin + " no"}))
    end = hugging_face(tokenizer).eos_token
    assert scored_text(tokenizer, pair.chosen, pair.chosen_scored) == f" Paris| Paris, of course{end}"
    assert pair.rejected_scored is None


def test_a_cut_that_leaves_nothing_of_the_assistants(build: Build) -> None:
    tokenizer = build(CHATML_TEMPLATE, train_on="last")
    pair = tokenizer.encode(RECORD)
    cut = truncate(pair, None, len(pair.chosen) - 2, tokenizer.start.tokens)
    assert cut.chosen_scored is not None and len(cut.chosen_scored) == len(cut.chosen)
    with pytest.raises(RowProblem, match="none of the first 3 tokens of chosen") as caught:
        truncate(pair, None, 3, tokenizer.start.tokens)
    assert caught.value.kind is ProblemKind.EMPTY_RESPONSE


def test_variables_of_a_template(build: Build) -> None:
    """A row's own go before those of all rows, and the prompt that says nothing has them, too."""
    template = "{% if mood %}{{ mood + '\n' }}{% endif %}" + CHATML_TEMPLATE
    with_mood = PreferenceRecord([USER], SHORT, LONG[:1], variables={"mood": "nice"})

    def decoded(tokenizer: PairTokenizer, ids: Any) -> str:
        return str(hugging_face(tokenizer).decode(ids))

    plain, moody = build(template), build(template, variables={"mood": "helpful"})
    assert decoded(plain, plain.encode(with_mood).prompt).startswith("nice\n")
    assert decoded(moody, moody.encode(RECORD).prompt).startswith("helpful\n")
    assert decoded(moody, moody.encode(with_mood).prompt).startswith("nice\n")
    assert plain.own_unconditional_prompt(RECORD) is None
    assert decoded(plain, plain.own_unconditional_prompt(with_mood)).startswith("nice\n")
    assert decoded(moody, moody.empty_prompt(chat=True)).startswith("helpful\n")
    assert plain.settings() != moody.settings()


def test_the_unconditional_prompt_keeps_the_context_if_asked(build: Build) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    system = {"role": "system", "content": "You are nice."}
    record = PreferenceRecord([system, USER], SHORT, LONG[:1], variables={"tools": [tool]})
    assert build(TOOL_TEMPLATE).own_unconditional_prompt(record) is None

    keeps = build(TOOL_TEMPLATE, unconditional_context=True)
    theirs = hugging_face(keeps).apply_chat_template(
        [system, {"role": "user", "content": ""}], tools=[tool], add_generation_prompt=True, return_dict=False
    )
    own = keeps.own_unconditional_prompt(record)
    assert own is not None and own.tolist() == list(theirs)


PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "\n", " ", "a", "the", " Paris", "é", "<", "|>", "im_start", "</s>"]
)


@given(st.lists(PIECES, max_size=8), st.lists(st.lists(PIECES, max_size=5), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["qwen_like", "llama_like"])
def test_a_common_beginning_is_tokenized_once_to_the_same_tokens(
    name: str, request: pytest.FixtureRequest, megatron_tokenizer: Callable[..., Any], begin: list[str], ends: Any
) -> None:
    of_megatron = megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(request.getfixturevalue(name)))
    encoder = TextEncoder(of_megatron)
    common = "".join(begin)
    texts = [common + "".join(end) for end in ends]
    mark = encoder.last_mark(common)
    assert mark is None or mark.text in common
    expected = [list(of_megatron._tokenizer.tokenizer(text).input_ids) if text else [] for text in texts]
    before = len(encoder.before)
    assert encoder.encode_after(texts, common, mark) == [ids[before:] for ids in expected]
