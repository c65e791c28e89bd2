"""Rounds of iterative DPO: the policy answers, a judge scores, the best and the worst answer are a pair, it is trained.

    python examples/iterative/loop.py --model MODEL --prompts prompts.jsonl --output runs/iterative \
        --rounds 2 -- --seq-length 2048 --pairs-per-step 64 --pair-epochs 1 --lr 5e-7 --bf16

What follows `--` are flags of `megatron-bdpo train`, the same in every round. Round N is runs/iterative/N:
answers.jsonl (prompt, answers, scores), pairs.jsonl, run (metrics, checkpoint), model (for transformers, and the next
round's start and reference). What is there is not made again: the same command goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, it is in no package

from examples.iterative.generate import Prompt, Sampling, by_server, by_transformers, served
from megatron_bdpo.artifact import write_whole
from megatron_bdpo.errors import UserError

HERE = Path(__file__).resolve().parent

type Judge = Callable[[Prompt, str], float]
type Train = Callable[[list[str]], int]
"""``megatron-bdpo train`` with these flags; its exit code."""


@dataclass(frozen=True)
class Loop:
    """What all rounds share."""

    prompts: list[Prompt]
    judge: Judge
    sampling: Sampling
    server: str
    serve: str
    train: Train
    flags: list[str]

    def round(self, number: int, model: str, directory: Path) -> str:
        """The model that a round makes of another."""
        made, answers, pairs = directory / "model", directory / "answers.jsonl", directory / "pairs.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        if not answers.is_file():
            write_whole(answers, self._answers(number, model))
        if not pairs.is_file():
            rows = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
            found = [row for row in map(pair_of, rows) if row]
            print(f"round {number}: {len(found)} pairs of {len(rows)} prompts; the answers to the others score equally")
            write_whole(pairs, "".join(json.dumps(row) + "\n" for row in found))
        if not (made / "config.json").is_file():
            own = [
                "--hf-model",
                model,
                "--pair-data",
                str(pairs),
                "--save-hf",
                str(made),
                "--save",
                str(directory / "run"),
            ]
            if code := self.train([*own, "--save-interval", "1000000", *self.flags]):
                raise UserError(f"round {number}: the training run has ended with {code}. Its own lines above say why.")
        return str(made)

    def _answers(self, number: int, model: str) -> Iterator[str]:
        drawn = Sampling(
            self.sampling.answers, self.sampling.tokens, self.sampling.temperature, self.sampling.seed + number
        )
        with served(self.serve, self.server, model):
            of = by_server(self.server, model, self.prompts, drawn) if self.server else None
            for prompt, answers in zip(self.prompts, of or by_transformers(model, self.prompts, drawn), strict=True):
                scores = [self.judge(prompt, answer) for answer in answers]
                yield json.dumps({"prompt": prompt, "answers": answers, "scores": scores}) + "\n"


def pair_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """The best and the worst answer as a row of training data; None where none is better, or one is empty."""
    ranked = sorted(zip(row["scores"], row["answers"], strict=True))
    (worst, rejected), (best, chosen) = ranked[0], ranked[-1]
    if best == worst or not rejected.strip() or not chosen.strip():
        return None
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": row["prompt"], **dict(zip(("chosen", "rejected"), answers, strict=True))}


def read_prompts(path: Path) -> list[Prompt]:
    """The column ``prompt`` of JSON lines."""
    try:
        return [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--prompts {path}: {error!r}. Give JSON lines with a column prompt.") from error


def load_judge(path: Path) -> Judge:
    """``score`` of a Python file."""
    spec = importlib.util.spec_from_file_location("judge", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--judge {path} is no Python file. Give one with a function score(prompt, answer).")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    judge: Judge = module.score
    return judge


def run_training(flags: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "megatron_bdpo.cli.main", "train", *flags]).returncode


def main(argv: list[str] | None = None, train: Train = run_training) -> int:
    """All rounds. Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:cut])
    try:
        if options.serve and not options.server:
            raise UserError("--serve starts what --server names. Give its address, too.")
        sampling = Sampling(options.answers, options.tokens, options.temperature, options.seed)
        judge = load_judge(options.judge)
        loop = Loop(
            read_prompts(options.prompts), judge, sampling, options.server, options.serve, train, words[cut + 1 :]
        )
        model = options.model
        for number in range(1, options.rounds + 1):
            model = loop.round(number, model, options.output / str(number))
        print(f"{options.rounds} rounds: {model}")
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face model: directory or hub name")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSON lines with a column prompt: text, or messages"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/iterative"), help="(runs/iterative)")
    parser.add_argument("--rounds", type=int, default=2, help="(2)")
    parser.add_argument("--judge", type=Path, default=HERE / "judge.py", help="Python file with score(prompt, answer)")
    parser.add_argument("--answers", type=int, default=4, help="to each prompt (4)")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer, at most (512)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(1.0)")
    parser.add_argument("--seed", type=int, default=1, help="of the answers; each round's is another (1)")
    parser.add_argument("--server", default="", help="address of an OpenAI-compatible API: http://localhost:8000/v1")
    parser.add_argument(
        "--serve", default="", help="command that serves {model} there; it is ended before the training run"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
