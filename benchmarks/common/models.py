"""Llama-shaped models with random weights, their tokenizers, and pairs of chosen lengths, made on the spot."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PADDING, UNKNOWN, END = 0, 1, 2
_SPECIAL = ("<pad>", "<unk>", "<end>")  # by their ids


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; untied output layer, SwiGLU."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    groups: int = 4
    """Key/value heads."""
    ffn: int = 1376
    vocab: int = 32_000

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer."""
        key_value = self.hidden * self.groups // self.heads
        return self.hidden * (2 * self.hidden + 2 * key_value + 3 * self.ffn)

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, {self.layers} layers, {self.heads} heads of which {self.groups} for keys and "
            f"values, ffn {self.ffn}, vocabulary {self.vocab}"
        )


def make_model(shape: Shape, directory: Path, texts: Path | None = None, seed: int = 1, dtype: str = "float32") -> Path:
    """Write random weights in Hugging Face's format, and a tokenizer. Returns the directory.

    Args:
        texts: a file of pairs to train a BPE tokenizer on; None for one that reads "<17><4>" as [17, 4].
        dtype: of the weights, as torch names it.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PADDING,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    del model
    torch.cuda.empty_cache()  # the processes that train it need the room
    tokenizer = id_tokenizer(shape.vocab) if texts is None else trained_tokenizer(texts, shape.vocab)
    tokenizer.save_pretrained(directory)
    return directory


def id_tokenizer(vocab: int, end: int = END) -> Any:
    """Reads "<17><4>" as [17, 4]; ``end`` is the token that ends answers."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"<{token}>": token for token in range(vocab)}, unk_token=f"<{UNKNOWN}>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"<{end}>", pad_token=f"<{PADDING}>")


def trained_tokenizer(texts: Path, vocab: int) -> Any:
    """Byte-level BPE, trained on the pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_SPECIAL[END], pad_token=_SPECIAL[PADDING])


def _texts(path: Path) -> Iterator[str]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for line in content.splitlines():
        row = json.loads(line)
        yield from (row[name] for name in ("prompt", "chosen", "rejected") if isinstance(row.get(name), str))


@dataclass(frozen=True)
class Lengths:
    """How long the parts of a made-up pair are on average, in tokens; each is drawn from half to one and a half."""

    prompt: int
    response: int


def make_pairs(lengths: Lengths, count: int, vocab: int, path: Path, seed: int = 1) -> Path:
    """Write pairs of random tokens, for the tokenizer that reads ids."""
    rng = np.random.default_rng(seed)

    def part(mean: int) -> str:
        return as_text(rng.integers(3, vocab, max(1, int(mean * rng.uniform(0.5, 1.5)))))

    with path.open("w") as file:
        for _ in range(count):
            pair = {
                "prompt": part(lengths.prompt),
                "chosen": part(lengths.response),
                "rejected": part(lengths.response),
            }
            file.write(json.dumps(pair) + "\n")
    return path


def as_text(tokens: Iterable[int]) -> str:
    """Token ids for the tokenizer that reads them."""
    return "".join(f"<{token}>" for token in tokens)


def add_shape_flags(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """A flag for each size."""
    for name, value in (asdict(Shape()) | defaults).items():
        parser.add_argument(f"--{name}", type=int, default=value)


def shape_of(options: argparse.Namespace) -> Shape:
    """The model that the flags describe."""
    return Shape(*(getattr(options, name) for name in asdict(Shape())))


def shape_of_model(directory: Path) -> Shape:
    """Of a Llama-shaped Hugging Face model."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return Shape(*(config[name] for name in (*names, "vocab_size")))
