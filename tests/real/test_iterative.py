"""Two rounds of the iterative example on the real model: chat prompts, its template, its end of turn."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from examples.iterative import loop
from examples.iterative.generate import Sampling, by_transformers
from tests.harness.program import run

EXAMPLE = Path(loop.__file__).parent
PROMPTS, HELD_OUT = (
    EXAMPLE.joinpath(name).read_text("utf-8").splitlines(keepends=True)[:2]
    for name in ("prompts.jsonl", "held_out.jsonl")
)
FLAGS = ["--", "--preference-loss", "bdpo_list", "--seq-length", "256", "--pairs-per-step", "2", "--train-iters", "1"]
FLAGS += ["--no-save-optim"]  # 1 GB a round that nothing reads


def test_two_rounds(smollm2, ranks, tmp_path, monkeypatch, capsys):
    """The second round's answers, start and reference are of the first one's model; the same command does no more."""
    asked: list[str] = []
    trained: list[list[str]] = []

    @functools.cache  # a model answers twice, and is loaded once
    def generator(model: str, sampling: Sampling):
        return by_transformers(model, sampling)

    def answering(model: str, sampling: Sampling):
        asked.append(model)
        return generator(model, sampling)

    def train(own: list[str]) -> int:
        trained.append(own)
        ((code, _, errors),) = ranks(1)(run, "train", *own)
        assert code == 0, errors
        return code

    monkeypatch.setattr(loop, "by_transformers", answering)
    (tmp_path / "prompts.jsonl").write_text("".join(PROMPTS))
    (tmp_path / "held_out.jsonl").write_text("".join(HELD_OUT))
    words = ["--model", str(smollm2), "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out")]
    (tmp_path / "judge.py").write_text("def score(prompt, answer):\n    return sum(map(ord, answer))\n")  # no ties
    words += ["--held-out", str(tmp_path / "held_out.jsonl"), "--rounds", "2", "--judge", str(tmp_path / "judge.py")]
    words += ["--tokens", "8", "--answers", "3", "--cut-penalty", "0", *FLAGS, "--lr", "1e-5"]
    assert loop.main(words, train) == 0
    models = [smollm2, tmp_path / "out" / "1" / "model", tmp_path / "out" / "2" / "model"]
    assert asked == [str(models[place]) for place in (0, 0, 1, 1, 2)]
    assert [own[own.index("--hf-model") + 1] for own in trained] == list(map(str, models[:2]))
    _check_models(models)
    told = capsys.readouterr().out
    assert [line.split(":")[0] for line in told.splitlines() if "mean score" in line] == [
        f"held out, round {number}" for number in (0, 1, 2)
    ]
    left, calls = _contents(tmp_path), (len(asked), len(trained))
    assert loop.main(words, train) == 0
    assert _contents(tmp_path) == left and (len(asked), len(trained)) == calls
    assert capsys.readouterr().out == "".join(
        line for line in told.splitlines(keepends=True) if line.startswith(("held out, ", "2 rounds: "))
    )


def _check_models(models: list[Path]) -> None:
    """Three different ones of one size; each round's run has its start for its reference."""
    weights = [(model / "model.safetensors").read_bytes() for model in models]
    assert len(set(weights)) == 3 and len({len(each) for each in weights}) == 1
    references = set()
    for model in models[1:]:
        run_of_round = model.parent / "run"
        (step,) = map(json.loads, (run_of_round / "metrics.jsonl").read_text().splitlines())
        # Exactly, as the two are scored in packs of one length.
        assert step["rewards/chosen"] == step["rewards/rejected"] == 0.0, (
            "the policy is its reference at its first step"
        )
        references.add(json.loads((run_of_round / "run.json").read_text())["reference"]["weights"])
    assert len(references) == 2


def _contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    """When each file was written, and what it holds."""
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest())
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_answers_of_a_batch(smollm2):
    """Two prompts of different lengths, at next to no temperature: each has the answer it has alone, and it ended."""
    prompts = [json.loads(line)["prompt"] for line in PROMPTS]
    generate = by_transformers(str(smollm2), Sampling(answers=1, tokens=64, temperature=1e-4))
    together = generate(prompts, 1)
    assert together == [each for prompt in prompts for each in generate([prompt], 2)]
    for (answer,) in together:
        assert answer.ended and answer.text.endswith(".") and "<|im_end|>" not in answer.text
