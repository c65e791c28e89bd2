"""Makes the example preference set: train.jsonl, heldout.jsonl and tokenizer.model, from the sentences in topics.toml.

    python examples/data/make_data.py [--output-dir examples/data]

Why a made-up set: the demo has to run offline, in a minute, on a model of a few hundred thousand parameters, and what
it shows has to be readable. Requests that should be refused and harmless ones that sound like them come in equal
number, so a model that learns to refuse everything gets half of those pairs wrong.

The same input gives the same bytes: one seeded generator, one tokenizer thread, no clock and no file names inside.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

HERE = Path(__file__).resolve().parent
SEED = 20260323
TRAIN_PAIRS_PER_TOPIC = 12  # of 20 combinations of a filler and a request
HELDOUT_PAIRS_PER_TOPIC = 3  # of 8
VOCAB_SIZE = 1024

# Turns and remarks before the request, for both kinds of request alike: they say nothing about the right answer.
GREETINGS = (
    "User: Hello!\nAssistant: Hello! What can I do for you today?\n",
    "User: Are you there?\nAssistant: Yes, I am here. How can I help?\n",
    "User: Thanks for your help with the recipe. It turned out very well.\n"
    "Assistant: I am glad to hear that! Is there anything else you would like to know?\n",
)
REMARKS = (
    "I have a quick question.",
    "There is something I would like to ask.",
    "It has been a long week.",
    "I am not sure whom else to ask.",
    "I have been thinking about this for a while.",
)

# Sentences that are right after one request and wrong after another, so that the response alone does not tell which of
# the two it is: the model has to read the prompt.
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help you with this.",
    "Sorry, that is something I won't do.",
)
AGREEMENTS = ("Sure, I can help with that.", "Of course.", "Happy to help.")
SHARED_OPENINGS = 0.35  # of the responses begin with one of them

Kind = Literal["harmful", "harmless", "quality"]
Fillers = dict[str, str]
Rows = list[list[str]]


@dataclass(frozen=True)
class Topic:
    """One table of topics.toml; the file's head says what the fields mean."""

    name: str
    kind: Kind
    train: list[Fillers]
    heldout: list[Fillers]
    requests: list[str]
    chosen: Rows
    rejected: Rows


@dataclass(frozen=True)
class Pair:
    """One line of the JSONL files. A response starts with the space that follows "Assistant:"."""

    prompt: str
    chosen: str
    rejected: str
    chosen_safe: bool
    rejected_safe: bool


def read_topics(path: Path) -> list[Topic]:
    with path.open("rb") as file:
        return [Topic(**table) for table in tomllib.load(file)["topic"]]


def make_pairs(topic: Topic, fillers: list[Fillers], count: int, rng: random.Random) -> Iterator[Pair]:
    """`count` pairs with as many different requests."""
    for filler, request in rng.sample(list(itertools.product(fillers, topic.requests)), count):
        values = filler | {f"your_{key}": re.sub(r"\b(my|our)\b", "your", value) for key, value in filler.items()}
        chosen_rows, rejected_rows = _with_shared_openings(topic, rng)
        chosen = _response(chosen_rows, values, rng, may_be_brief=topic.kind != "quality")
        rejected = _response(rejected_rows, values, rng, may_be_brief=topic.kind != "quality")
        yield Pair(_prompt(_capital(request.format(**values)), rng), chosen, rejected, True, topic.kind != "harmful")


def _with_shared_openings(topic: Topic, rng: random.Random) -> tuple[Rows, Rows]:
    """The chosen and rejected rows; some open as responses of the opposite kind of request do."""
    chosen, rejected = topic.chosen, topic.rejected
    refusal, agreement = [rng.choice(REFUSALS)], [rng.choice(AGREEMENTS)]
    open_chosen, open_rejected = rng.random() < SHARED_OPENINGS, rng.random() < SHARED_OPENINGS
    if topic.kind == "harmful":
        chosen = [refusal, *chosen[1:]] if open_chosen else chosen
        rejected = [agreement, *rejected[1:]] if open_rejected else rejected
    elif topic.kind == "harmless":
        # In one row with what follows: an agreement alone would be no answer.
        chosen = [[f"{agreement[0]} {sentence}" for sentence in chosen[0]], *chosen[1:]] if open_chosen else chosen
        rejected = [refusal, *rejected[1:]] if open_rejected else rejected
    return chosen, rejected


def _prompt(request: str, rng: random.Random) -> str:
    """Half of the requests come alone, the others after a remark, after earlier turns, or both: lengths vary."""
    greeting = rng.choice(GREETINGS) if rng.random() < 0.2 else ""
    remark = rng.choice(REMARKS) + " " if rng.random() < 0.35 else ""
    return f"{greeting}User: {remark}{request}\nAssistant:"


def _response(rows: Rows, values: Fillers, rng: random.Random, *, may_be_brief: bool) -> str:
    """One sentence of each row; a brief response stops after the first."""
    if may_be_brief and rng.random() < 0.15:
        rows = rows[:1]
    sentences = [_capital(rng.choice(row).format(**values)) for row in rows]
    return "".join(s if s.startswith("\n") else " " + s for s in sentences if s)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def make_splits(topics: list[Topic], seed: int = SEED) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, topics mixed. They share sentences, but no filler of a topic, hence no request."""
    rng = random.Random(seed)
    train = [pair for t in topics for pair in make_pairs(t, t.train, TRAIN_PAIRS_PER_TOPIC, rng)]
    heldout = [pair for t in topics for pair in make_pairs(t, t.heldout, HELDOUT_PAIRS_PER_TOPIC, rng)]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def to_jsonl(pairs: list[Pair]) -> str:
    return "".join(json.dumps(vars(pair), ensure_ascii=False) + "\n" for pair in pairs)


def train_tokenizer(pairs: list[Pair]) -> bytes:
    """A SentencePiece model of the training text, as bytes.

    No prefix space, no normalization and byte fallback: every text comes back as it was, nothing is unknown, and the
    tokens of prompt + response are those of the prompt followed by those of the response.
    """
    texts = (text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the example preference set and its tokenizer.")
    parser.add_argument("--output-dir", type=Path, default=HERE, help="default: beside this script")
    output_dir: Path = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    train, heldout = make_splits(read_topics(HERE / "topics.toml"))
    for name, pairs in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        (output_dir / name).write_text(to_jsonl(pairs), encoding="utf-8")
        print(f"{name}: {len(pairs)} pairs")
    (output_dir / "tokenizer.model").write_bytes(train_tokenizer(train))
    print(f"tokenizer.model: {VOCAB_SIZE} pieces")


if __name__ == "__main__":
    main()
