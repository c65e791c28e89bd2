"""A round of the iterative example on the real model: chat prompts, its template, its end of turn."""

from __future__ import annotations

import json
from pathlib import Path

from examples.iterative import loop
from examples.iterative.generate import Sampling, by_transformers
from tests.harness.program import run

EXAMPLE = Path(loop.__file__).parent
PROMPTS = EXAMPLE.joinpath("prompts.jsonl").read_text("utf-8").splitlines(keepends=True)[:2]


def test_a_round(smollm2, ranks, tmp_path):
    """The model of the round is another one; what it was trained on are the answers of the model before it."""
    (tmp_path / "prompts.jsonl").write_text("".join(PROMPTS))
    words = ["--model", str(smollm2), "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path)]
    words += ["--rounds", "1", "--tokens", "8", "--answers", "3", "--cut-penalty", "0"]
    flags = ["--preference-loss", "bdpo_list", "--seq-length", "256", "--pairs-per-step", "2", "--train-iters", "1"]

    def train(own: list[str]) -> int:
        ((code, _, errors),) = ranks(1)(run, "train", *own)
        assert code == 0, errors
        return code

    assert loop.main([*words, "--", *flags, "--lr", "1e-5"], train) == 0
    before, after = (Path(each, "model.safetensors").read_bytes() for each in (smollm2, tmp_path / "1" / "model"))
    assert len(before) == len(after) and before != after


def test_answers_of_a_batch(smollm2):
    """Two prompts of different lengths, at next to no temperature: each has the answer it has alone, and it ended."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS]
    generate = by_transformers(str(smollm2), Sampling(answers=1, tokens=64, temperature=1e-4))
    together = generate(prompts, 1)
    assert together == [each for prompt in prompts for each in generate([prompt], 2)]
    for (answer,) in together:
        assert answer.ended and answer.text.endswith(".") and "<|im_end|>" not in answer.text
