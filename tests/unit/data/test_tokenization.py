"""Prompt and response boundaries, start and end tokens, chat templates and truncation, on real tokenizers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.problems import ProblemKind, RowProblem
from megatron_bdpo.data.records import PreferenceRecord
from megatron_bdpo.data.tokenization import PairTokenizer, PairTokens
from megatron_bdpo.data.truncation import truncate
from megatron_bdpo.errors import UserError
from tests.unit.conftest import CHATML_TEMPLATE, LLAMA_TEMPLATE, OPEN_TEMPLATE, train_hugging_face, train_sentencepiece

Build = Callable[..., Any]

ASK = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": "What is the capital of France?"}]
STRINGS = PreferenceRecord("Human: What is the capital?\n\nAssistant:", " Paris, of course.", " I would rather not")
CHAT = PreferenceRecord(
    ASK, [{"role": "assistant", "content": "Paris, of course."}], [{"role": "assistant", "content": "Maybe not"}]
)


@pytest.fixture(params=["sentencepiece", "sentencepiece without BOS", "llama", "qwen", "tiktoken"])
def any_tokenizer(request: pytest.FixtureRequest, megatron_tokenizer: Build) -> Any:
    """Each library of Megatron, with and without BOS."""
    name = str(request.param)
    if name == "tiktoken":
        path = str(request.getfixturevalue("tiktoken_file"))
        arguments = {"tiktoken_num_special_tokens": 10, "vocab_size": 266, "tiktoken_pattern": "v2"}
        return megatron_tokenizer("TikTokenizer", tokenizer_model=path, **arguments)
    fixture, kind = {
        "sentencepiece": ("sentencepiece_model", "SentencePieceTokenizer"),
        "sentencepiece without BOS": ("sentencepiece_model_without_bos", "SentencePieceTokenizer"),
        "llama": ("llama_like", "HuggingFaceTokenizer"),
        "qwen": ("qwen_like", "HuggingFaceTokenizer"),
    }[name]
    return megatron_tokenizer(kind, tokenizer_model=str(request.getfixturevalue(fixture)))


@pytest.fixture
def llama(llama_like: Path, megatron_tokenizer: Build) -> PairTokenizer:
    return PairTokenizer(megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(llama_like)))


@pytest.fixture
def qwen(qwen_like: Path, megatron_tokenizer: Build) -> PairTokenizer:
    return PairTokenizer(megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like)))


@pytest.fixture
def sentencepiece(sentencepiece_model: Path, megatron_tokenizer: Build) -> PairTokenizer:
    return PairTokenizer(megatron_tokenizer("SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model)))


def bos_of(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos in (None, -1) else [tokenizer.bos]


def ids(pair: PairTokens) -> tuple[list[int], list[int], list[int]]:
    prompt, chosen, rejected = (part.tolist() for part in pair.parts)
    return prompt, chosen, rejected


def test_string_records(any_tokenizer: Any) -> None:
    """One BOS if there is one, one EOD, and in between the tokens of the joint text."""
    tokenizer = any_tokenizer
    bos, eod = bos_of(tokenizer), tokenizer.eod

    pair = PairTokenizer(tokenizer).encode(STRINGS)

    assert all(part.dtype == np.int32 for part in pair.parts)
    prompt, chosen, rejected = ids(pair)
    assert prompt[: len(bos)] == bos
    for response, text in ((chosen, STRINGS.chosen), (rejected, STRINGS.rejected)):
        joint = tokenizer.tokenize(STRINGS.prompt + text)
        expected = joint if joint[: len(bos)] == bos else bos + joint
        assert prompt + response == [*expected, eod]
        assert (prompt + response).count(eod) == 1
        assert sum((prompt + response).count(token) for token in bos) == len(bos)


def test_empty_prompts(any_tokenizer: Any) -> None:
    """The empty prompt is BOS, or EOD where there is none; a record whose prompt is empty begins with the same."""
    expected = bos_of(any_tokenizer) or [any_tokenizer.eod]
    tokenizer = PairTokenizer(any_tokenizer)

    pair = tokenizer.encode(PreferenceRecord("", "Paris", "Maybe"))

    assert tokenizer.empty_prompt(chat=False).tolist() == expected
    assert pair.prompt.tolist() == expected
    assert pair.chosen.tolist()[-1] == any_tokenizer.eod


def test_start_and_end_in_the_text_are_not_doubled(llama: PairTokenizer) -> None:
    plain = llama.encode(PreferenceRecord("Human:", " Paris", " Maybe"))

    assert ids(llama.encode(PreferenceRecord("<s>Human:", " Paris</s>", " Maybe"))) == ids(plain)
    nothing_before = llama.encode(PreferenceRecord("", "<s>Paris", "<s>Maybe"))
    assert ids(nothing_before) == ids(llama.encode(PreferenceRecord("", "Paris", "Maybe")))


def test_null_tokenizer(megatron_tokenizer: Build) -> None:
    tokenizer = PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=100))

    assert ids(tokenizer.encode(PreferenceRecord("1 2", " 3 4", " 5"))) == ([1, 2], [3, 4, 99], [5, 99])
    assert tokenizer.empty_prompt(chat=False).tolist() == [99]
    with pytest.raises(RowProblem, match="invalid literal") as caught:
        tokenizer.encode(PreferenceRecord("1 2", " three", " 5"))
    assert caught.value.kind is ProblemKind.NOT_ENCODABLE


def test_unusable_tokenizers(megatron_tokenizer: Build, sentencepiece_model: Path, tmp_path: Path) -> None:
    without_end = train_sentencepiece(tmp_path / "no_eos", eos_id=-1)
    with pytest.raises(UserError, match="no EOS"):
        PairTokenizer(megatron_tokenizer("SentencePieceTokenizer", tokenizer_model=str(without_end)))
    other = megatron_tokenizer("SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model))
    other.library = "sft"
    with pytest.raises(UserError, match=r"--tokenizer-type: .*'sft'"):
        PairTokenizer(other)


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        # "the" is one token of the training text, so the split lies inside it.
        (PreferenceRecord("Answer th", "e question", "e user"), ProblemKind.BOUNDARY_MERGE),
        (PreferenceRecord("Answer:", " Paris", "</s>"), ProblemKind.EMPTY_RESPONSE),
        (PreferenceRecord("Answer:", " Paris</s>", " Paris"), ProblemKind.IDENTICAL_TOKENS),
    ],
)
def test_unusable_records(llama: PairTokenizer, record: PreferenceRecord, kind: ProblemKind) -> None:
    with pytest.raises(RowProblem) as caught:
        llama.encode(record)

    assert caught.value.kind is kind


def test_white_space_before_the_response_belongs_to_it(sentencepiece: PairTokenizer) -> None:
    """A prompt that ends in a space does not lose it silently."""
    with pytest.raises(RowProblem, match="end the prompt before the white space"):
        sentencepiece.encode(PreferenceRecord("The answer is ", "Paris", "maybe"))
    sentencepiece.encode(PreferenceRecord("The answer is", " Paris", " maybe"))


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_chat_records_are_what_the_template_makes_of_them(name: str, request: pytest.FixtureRequest) -> None:
    """Oracle: transformers' own apply_chat_template, which is what serving uses."""
    tokenizer: PairTokenizer = request.getfixturevalue(name)
    oracle = tokenizer._tokenizer._tokenizer.tokenizer  # type: ignore[attr-defined]

    prompt, chosen, rejected = ids(tokenizer.encode(CHAT))

    def rendered(messages: list[dict[str, str]], generate: bool) -> list[int]:
        return list(oracle.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False))

    assert prompt == rendered(ASK, True)
    assert isinstance(CHAT.chosen, list) and isinstance(CHAT.rejected, list)
    assert prompt + chosen == rendered(ASK + CHAT.chosen, False)
    assert prompt + rejected == rendered(ASK + CHAT.rejected, False)
    assert chosen.count(oracle.eos_token_id) == 1
    empty_turn = [{"role": "user", "content": ""}]
    assert tokenizer.empty_prompt(chat=True).tolist() == rendered(empty_turn, True)


def test_what_the_template_puts_after_the_response_is_kept(qwen: PairTokenizer) -> None:
    text = qwen._tokenizer.detokenize(qwen.encode(CHAT).chosen.tolist())  # type: ignore[attr-defined]

    assert text == "Paris, of course.<|im_end|>\n"


def test_template_without_end_of_turn_gets_eod(megatron_tokenizer: Build, qwen_like: Path) -> None:
    tokenizer = megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(qwen_like), chat_template=OPEN_TEMPLATE)

    pair = PairTokenizer(tokenizer).encode(CHAT)

    assert (
        tokenizer.detokenize(pair.prompt.tolist())
        == "system: Be nice.\nuser: What is the capital of France?\nassistant:"
    )
    assert pair.chosen.tolist()[-1] == tokenizer.eod
    assert pair.chosen.tolist().count(tokenizer.eod) == 1


def test_sentencepiece_templates_get_bos_from_us(megatron_tokenizer: Build, sentencepiece_model: Path) -> None:
    """Megatron renders them without bos_token, so that they cannot write it themselves."""
    arguments = {"tokenizer_model": str(sentencepiece_model)}
    tokenizer = megatron_tokenizer("SentencePieceTokenizer", chat_template=CHATML_TEMPLATE, **arguments)
    pairs = PairTokenizer(tokenizer)

    prompt, chosen, _ = ids(pairs.encode(CHAT))

    assert prompt[0] == tokenizer.bos and prompt.count(tokenizer.bos) == 1
    assert tokenizer.detokenize(prompt).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.detokenize(chosen) == "Paris, of course.<|im_end|>\n"
    assert pairs.empty_prompt(chat=True)[0] == tokenizer.bos
    needs_bos = megatron_tokenizer("SentencePieceTokenizer", chat_template="{{ bos_token + 'x' }}", **arguments)
    with pytest.raises(RowProblem, match="no bos_token") as caught:
        PairTokenizer(needs_bos).encode(CHAT)
    assert caught.value.kind is ProblemKind.TEMPLATE_REFUSED


def test_templates_that_do_not_fit(megatron_tokenizer: Build, qwen_like: Path) -> None:
    def with_template(template: str) -> PairTokenizer:
        arguments = {"tokenizer_model": str(qwen_like), "chat_template": template}
        return PairTokenizer(megatron_tokenizer("HuggingFaceTokenizer", **arguments))

    thinks = with_template(CHATML_TEMPLATE.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"))
    with pytest.raises(RowProblem, match="<think>") as caught:
        thinks.encode(CHAT)
    assert caught.value.kind is ProblemKind.TEMPLATE_MISMATCH

    refuses = with_template(
        "{% for m in messages %}{% if not m['content'] or m['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(RowProblem, match="no system role") as caught:
        refuses.encode(CHAT)
    assert caught.value.kind is ProblemKind.TEMPLATE_REFUSED
    with pytest.raises(UserError, match=r"--chat-template: .*empty user turn"):
        refuses.empty_prompt(chat=True)


def test_missing_chat_template(sentencepiece: PairTokenizer) -> None:
    with pytest.raises(UserError, match="--chat-template"):
        sentencepiece.encode(CHAT)
    with pytest.raises(UserError, match="--chat-template"):
        sentencepiece.empty_prompt(chat=True)


def test_truncation_keeps_the_prompts_end_and_the_responses_start(any_tokenizer: Any) -> None:
    tokenizer = PairTokenizer(any_tokenizer)
    start = bos_of(any_tokenizer)
    whole = tokenizer.encode(STRINGS)
    prompt, chosen, rejected = ids(whole)

    own = tokenizer.start.tokens
    assert ids(truncate(whole, None, None, own)) == (prompt, chosen, rejected)
    assert ids(truncate(whole, len(prompt), 10_000, own)) == (prompt, chosen, rejected)
    assert ids(truncate(whole, 5, 4, own)) == (start + prompt[-5 + len(start) :], chosen[:4], rejected[:4])
    assert truncate(whole, 1, None, own).prompt.tolist() == prompt[-1:]


def test_identical_after_truncation(llama: PairTokenizer) -> None:
    pair = llama.encode(PreferenceRecord("Human:", " Paris is nice", " Paris is the capital"))

    with pytest.raises(RowProblem) as caught:
        truncate(pair, None, 1, llama.start.tokens)

    assert caught.value.kind is ProblemKind.IDENTICAL_AFTER_TRUNCATION


def test_identity_follows_content_not_place(any_tokenizer: Any, megatron_tokenizer: Build, tmp_path: Path) -> None:
    identity = PairTokenizer(any_tokenizer).settings()
    any_tokenizer.tokenize("encoding something does not change it")
    assert PairTokenizer(any_tokenizer).settings() == identity

    place = Path(any_tokenizer.path)
    copy = tmp_path / place.name
    if place.is_dir():
        shutil.copytree(place, copy)
    else:
        shutil.copy(place, copy)
    if any_tokenizer.library != "tiktoken":
        kind = {"huggingface": "HuggingFaceTokenizer", "sentencepiece": "SentencePieceTokenizer"}[any_tokenizer.library]
        again = PairTokenizer(megatron_tokenizer(kind, tokenizer_model=str(copy)))
        assert again.settings() == identity
    any_tokenizer.chat_template = "{{ messages }}"
    assert PairTokenizer(any_tokenizer).settings() != identity


def test_identity_sees_vocabulary_and_special_tokens(
    megatron_tokenizer: Build, sentencepiece: PairTokenizer, llama: PairTokenizer, tmp_path: Path
) -> None:
    other_model = train_sentencepiece(tmp_path / "other", vocab_size=400)
    other = PairTokenizer(megatron_tokenizer("SentencePieceTokenizer", tokenizer_model=str(other_model)))
    assert other.settings() != sentencepiece.settings()

    other_end = train_hugging_face(tmp_path, LLAMA_TEMPLATE, bos="<s>", eos="<end>", library_adds_bos=True)
    other = PairTokenizer(megatron_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(other_end)))
    assert other.settings() != llama.settings()

    null = [PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=size)).settings() for size in (50, 60)]
    assert null[0] != null[1]
