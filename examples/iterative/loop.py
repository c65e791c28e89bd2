"""Rounds of iterative DPO: the policy answers, a judge scores the answers to each prompt, it is trained on them.

    python examples/iterative/loop.py --model MODEL --prompts prompts.jsonl --held-out held_out.jsonl --rounds 2 \
        -- --seq-length 2048 --pairs-per-step 64 --pair-epochs 1 --lr 5e-7 --bf16

What follows `--` are flags of `megatron-bdpo train`, the same in every round. Round N is runs/iterative/N:
answers.jsonl (prompt, responses, scores, ended), train.jsonl (what of them is trained on), run (metrics, checkpoint),
model (for transformers, and the next round's start and reference), held_out.jsonl (its answers to the held-out
prompts; 0/ has those of the start). With --reward-model the scores are in files of their own, judged_answers.jsonl and
judged_held_out.jsonl. What is there is not made again: the same command goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, it is in no package

from examples.iterative.generate import Answer, Prompt, Sampling, by_server, by_transformers, release_gpu, served
from megatron_bdpo.artifact import write_whole
from megatron_bdpo.errors import UserError

HERE = Path(__file__).resolve().parent

type Judge = Callable[[Prompt, str], float]
type Row = dict[str, Any]
type Job = Callable[[list[str]], int]
"""``megatron-bdpo train``, or ``score``, with these flags; its exit code."""


@dataclass(frozen=True)
class RewardModel:
    """A judge that reads answers as it was trained to: by a scoring job, once all answers of a file are there."""

    directory: Path
    flags: list[str]
    score: Job

    def judged(self, path: Path) -> list[Row]:
        """The rows of a file with the scores of their answers, null for an empty one; without those that it left out.
        They are kept in a file beside it, as long as no more are answered."""
        target = path.with_name(f"judged_{path.name}")
        if target.is_file() and target.stat().st_mtime_ns < path.stat().st_mtime_ns:
            target.unlink()
        if not target.is_file():
            own = ["--objective", "reward", "--hf-model", str(self.directory), "--pair-data", str(path)]
            own += ["--scored-rows", str(target), "--pair-cache-dir", str(path.parent / "cache")]
            if code := self.score([*own, *self.flags]):
                raise UserError(
                    f"--reward-model: scoring {path} has ended with {code}. Its own lines above say why. What it needs "
                    "beside the model, such as --seq-length, stands in --reward-flags."
                )
        return [json.loads(line) for line in target.read_text("utf-8").splitlines()]


@dataclass(frozen=True)
class Answering:
    """Who answers, and who judges the answers."""

    judge: Judge | RewardModel
    sampling: Sampling
    seed: int
    at_once: int
    """Prompts that are answered together."""
    server: str
    serve: str

    def answers(self, what: str, number: int, model: str, prompts: list[Prompt], path: Path) -> list[Row]:
        """The judged answers of a round's model, a row for each prompt. They are kept in a file, batch by batch."""
        rows = self._generated(what, number, model, prompts, path)
        return self.judge.judged(path) if isinstance(self.judge, RewardModel) else rows

    def _generated(self, what: str, number: int, model: str, prompts: list[Prompt], path: Path) -> list[Row]:
        rows = _kept(path, prompts)
        if rows and ("scores" in rows[0]) == isinstance(self.judge, RewardModel):
            flag = "--judge" if "scores" in rows[0] else "--reward-model"
            raise UserError(f"{path} has answers that {flag} judges. Go on with that, or name another --output.")
        if len(rows) == len(prompts):
            return rows
        del rows[len(rows) // self.at_once * self.at_once :]  # batches are made whole, so that their seeds are theirs
        path.write_text("".join(map(_line, rows)), "utf-8")
        with (
            served(self.serve, self.server, model),
            path.open("a", encoding="utf-8") as file,
            tqdm(prompts, f"{what} of round {number}", initial=len(rows), unit="prompt") as bar,
        ):
            for new in self._batches(number, model, prompts, len(rows)):
                file.writelines(map(_line, new))
                file.flush()
                rows += new
                bar.update(len(new))
        release_gpu()
        return rows

    def _batches(self, number: int, model: str, prompts: list[Prompt], start: int) -> Iterator[list[Row]]:
        """The answers to the prompts from one on, judged where a function does it."""
        to = by_server(self.server, model, self.sampling) if self.server else by_transformers(model, self.sampling)
        for first in range(start, len(prompts), self.at_once):
            batch = prompts[first : first + self.at_once]
            answers = to(batch, self.seed + 1_000_000 * number + first)
            yield [self._judged(*each) for each in zip(batch, answers, strict=True)]

    def _judged(self, prompt: Prompt, answers: list[Answer]) -> Row:
        row: Row = {"prompt": prompt, "responses": [each.text for each in answers]}
        if not isinstance(self.judge, RewardModel):
            row["scores"] = [_number(self.judge(prompt, each.text), each.text) for each in answers]
        return row | {"ended": [each.ended for each in answers]}


def _number(score: object, answer: str) -> float:
    """A judge's score, of whatever type of numbers."""
    with contextlib.suppress(TypeError, ValueError):
        if math.isfinite(number := float(score)):  # type: ignore[arg-type]
            return number
    raise UserError(f"--judge: the score of {answer[:60]!r} is {score!r}. Make it a number that is finite.")


@dataclass(frozen=True)
class Loop:
    """What all rounds share."""

    answering: Answering
    prompts: list[Prompt]
    held_out: list[Prompt]
    directory: Path
    cut_penalty: float
    train: Job
    flags: list[str]

    def run(self, model: str, rounds: int) -> str:
        """The model of the last round."""
        told = [self._on_held_out(0, model)]
        for number in range(1, rounds + 1):
            model = self._round(number, model)
            told.append(self._on_held_out(number, model))
        print(*(line for line in told if line), sep="\n")
        return model

    def _round(self, number: int, model: str) -> str:
        directory = self.directory / str(number)
        directory.mkdir(parents=True, exist_ok=True)
        made, data = directory / "model", directory / "train.jsonl"
        if (made / "config.json").is_file():
            return str(made)
        answers = self.answering.answers("answers", number, model, self.prompts, directory / "answers.jsonl")
        rows = [row for row in (trained_on(row, self.cut_penalty) for row in answers) if row]
        print(f"round {number}: {len(rows)} of {len(answers)} prompts have answers to compare")
        if not rows:
            raise UserError(
                f"{directory}/answers.jsonl: no prompt has an answer that ended and another of a lower score. Raise "
                "--tokens if they are cut, or give --cut-penalty 0; raise --temperature if they are alike, or take a "
                "judge that tells them apart."
            )
        write_whole(data, map(_line, rows))
        own = ["--hf-model", model, "--pair-data", str(data), "--save-hf", str(made), "--save", str(directory / "run")]
        if code := self.train([*own, "--save-interval", "1000000", *self.flags]):
            raise UserError(f"round {number}: the training run has ended with {code}. Its own lines above say why.")
        return str(made)

    def _on_held_out(self, number: int, model: str) -> str:
        """What the judge says of a round's model, in a line; empty without such prompts."""
        if not self.held_out:
            return ""
        path = self.directory / str(number) / "held_out.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.answering.answers("held-out answers", number, model, self.held_out, path)
        return f"held out, round {number}: {_summary(rows)}"


def _summary(rows: list[Row]) -> str:
    """With the standard error of the mean score over prompts, for the answers to one prompt are alike."""
    known = [[score for score in row["scores"] if score is not None] for row in rows]
    of_prompts = [fmean(scores) for scores in known if scores]
    if not of_prompts:
        return "no answer has a score"
    error = stdev(of_prompts) / len(of_prompts) ** 0.5 if len(of_prompts) > 1 else float("nan")
    ended = fmean(each for row in rows for each in row["ended"])
    characters = fmean(len(each) for row in rows for each in row["responses"])
    return (
        f"mean score {fmean(of_prompts):.3f} +- {error:.3f}, {ended:.1%} of the answers ended, "
        f"{characters:.0f} characters each"
    )


def trained_on(row: Row, cut_penalty: float) -> Row | None:
    """A row of training data: the answers, scored and not empty; None where there is nothing to compare.

    The chat template ends every answer, also one that the limit cut. Such an answer loses the penalty, and where it is
    the best nevertheless, the row is left out: no model is to learn that an answer ends in the middle. Without a
    penalty, cut answers are like any other.
    """
    kept = [
        (score if ended else score - cut_penalty, ended, text)
        for text, score, ended in zip(row["responses"], row["scores"], row["ended"], strict=True)
        if text.strip() and score is not None
    ]
    scores = [score for score, _, _ in kept]
    best_was_cut = any(not ended for score, ended, _ in kept if score == max(scores))
    if len(set(scores)) < 2 or (best_was_cut and cut_penalty):
        return None
    return {"prompt": row["prompt"], "responses": [text for _, _, text in kept], "scores": scores}


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _kept(path: Path, prompts: list[Prompt]) -> list[Row]:
    """Rows that an earlier start has written; a last line without its end is none."""
    text = path.read_text("utf-8") if path.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if [row["prompt"] for row in rows] != prompts[: len(rows)]:
        raise UserError(f"{path} answers other prompts. Give those of the earlier start, or name another --output.")
    return rows


def read_prompts(flag: str, path: Path | None) -> list[Prompt]:
    """The column ``prompt`` of JSON lines; none of no file."""
    if path is None:
        return []
    try:
        prompts = [json.loads(line)["prompt"] for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag} {path}: {error!r}. Give JSON lines with a column prompt.") from error
    if not prompts:
        raise UserError(f"{flag} {path} has no rows. Give JSON lines with a column prompt.")
    for number, prompt in enumerate(prompts, 1):
        if not _is_prompt(prompt):
            told = repr(prompt)[:60]
            raise UserError(f"{flag} {path}, prompt {number} is {told}. Make it text, or a list of messages.")
    return prompts


def _is_prompt(value: object) -> bool:
    if isinstance(value, list):
        return value != [] and all(isinstance(each, dict) and "content" in each for each in value)
    return isinstance(value, str) and value != ""


def load_judge(path: Path) -> Judge:
    """``score`` of a Python file."""
    spec = importlib.util.spec_from_file_location("judge", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--judge {path} is no Python file. Give one with a function score(prompt, answer).")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it may raise anything
        raise UserError(f"--judge {path} cannot be run: {error!r}. Mend the file.") from error
    if not callable(judge := getattr(module, "score", None)):
        raise UserError(f"--judge {path} has no function score(prompt, answer). Define one.")
    return judge


def load_reward_model(directory: Path, flags: str, score: Job) -> RewardModel:
    """See ``RewardModel``. The directory is looked at, as answers would be made before it is read."""
    try:
        (architecture,) = json.loads((directory / "config.json").read_text("utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        architecture = "no model"
    if not str(architecture).endswith("ForSequenceClassification"):
        raise UserError(
            f"--reward-model {directory} holds {architecture}. Name the directory of a reward model: what "
            "megatron-bdpo train --objective reward --save-hf DIR has written."
        )
    return RewardModel(directory, shlex.split(flags), score)


def run_training(flags: list[str]) -> int:
    return _run("train", flags)


def run_scoring(flags: list[str]) -> int:
    return _run("score", flags)


def _run(command: str, flags: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "megatron_bdpo.cli.main", command, *flags]).returncode


def _judge(options: argparse.Namespace, score: Job) -> Judge | RewardModel:
    if options.reward_model:
        if options.judge:
            raise UserError("--judge and --reward-model are two judges. Leave one out.")
        return load_reward_model(options.reward_model, options.reward_flags, score)
    if options.reward_flags:
        raise UserError("--reward-flags are of --reward-model. Name one, or leave them out.")
    return load_judge(options.judge or HERE / "judge.py")


def main(argv: list[str] | None = None, train: Job = run_training, score: Job = run_scoring) -> int:
    """All rounds. Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:cut])
    try:
        if options.serve and not options.server:
            raise UserError("--serve starts what --server names. Give its address, too.")
        if options.server and not options.server.startswith(("http://", "https://")):
            raise UserError(f"--server {options.server} is no address. Begin it with http:// or https://.")
        sampling = Sampling(options.answers, options.tokens, options.temperature)
        judge = _judge(options, score)
        answering = Answering(judge, sampling, options.seed, options.at_once, options.server, options.serve)
        prompts = read_prompts("--prompts", options.prompts)
        held_out = read_prompts("--held-out", options.held_out)
        flags = words[cut + 1 :]
        loop = Loop(answering, prompts, held_out, options.output, options.cut_penalty, train, flags)
        print(f"{options.rounds} rounds: {loop.run(options.model, options.rounds)}")
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return 2
    return 0


def _from(smallest: int) -> Callable[[str], int]:
    """A whole number of at least this."""

    def number(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} is less than {smallest}")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face model: directory or hub name")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSON lines with a column prompt: text, or messages"
    )
    parser.add_argument("--held-out", type=Path, help="more such prompts, answered and judged before and after")
    parser.add_argument("--output", type=Path, default=Path("runs/iterative"), help="(runs/iterative)")
    parser.add_argument("--rounds", type=_from(1), default=2, help="(2)")
    parser.add_argument("--judge", type=Path, help="Python file with score(prompt, answer) (judge.py beside this)")
    parser.add_argument("--reward-model", type=Path, metavar="DIR", help="judge by a reward model instead")
    parser.add_argument(
        "--reward-flags", default="", metavar="FLAGS", help="of its scoring jobs: '--seq-length 2048 --bf16'"
    )
    parser.add_argument("--answers", type=_from(2), default=4, help="to each prompt (4)")
    parser.add_argument("--tokens", type=_from(1), default=512, help="of an answer, at most (512)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(1.0)")
    parser.add_argument(
        "--cut-penalty",
        type=float,
        default=1.0,
        help="what an answer that --tokens cut loses of its score; 0: such answers are like any other (1.0)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the answers; each batch's is another (1)")
    parser.add_argument("--at-once", type=_from(1), default=16, help="prompts that are answered together (16)")
    parser.add_argument("--server", default="", help="address of an OpenAI-compatible API: http://localhost:8000/v1")
    parser.add_argument(
        "--serve", default="", help="command that serves {model} there; it is ended before the training run"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
