"""What a run does with ``--eval-prompts``: the policy answers them after every evaluation, and the answers are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.training.global_vars import get_tokenizer, get_wandb_writer
from torch import Tensor

from megatron_bdpo.data.answering import GreedyAnswers
from megatron_bdpo.data.problems import printable
from megatron_bdpo.data.prompts import ANSWER_COLUMNS, EvalPrompts
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.display import Table
from megatron_bdpo.training.callbacks.callback import Callback, Start
from megatron_bdpo.training.distributed import all_ranks_agree, is_last_rank
from megatron_bdpo.training.generation.decoding import PackShape, answer_greedily
from megatron_bdpo.training.reporting.console import show
from megatron_bdpo.training.reporting.generations_file import (
    NAME,
    Row,
    answer_text,
    open_generations,
    prompt_text,
    side_by_side,
)
from megatron_bdpo.training.reporting.step_lines import StepLines
from megatron_bdpo.training.stopping import StopRequest

#: Prompts in the table at the end of a run, and characters of a text there.
_SHOWN, _CHARACTERS = 4, 200


class Answers(Callback):
    """Answers of the policy to the prompts of a job; without prompts it does nothing."""

    def __init__(
        self, prompts: EvalPrompts | None, shape: PackShape, vocab_size: int, save: str | None, stop: StopRequest
    ) -> None:
        """
        Args:
            shape: of the packs that prompts go in.
            vocab_size: entries of the tokenizer.
            save: directory of the file, if it is to be written.
            stop: listened to before every token. Answers that are not all there yet are given up; Megatron's loop hears
                of the stop when it asks next, saves, and ends.
        """
        self.rows: list[Row] = []
        """All that were made or found, in order, on the last rank. See ``reporting.generations_file``."""
        self._prompts, self._shape, self._vocab_size, self._save, self._stop = prompts, shape, vocab_size, save, stop
        self._model: list[Any] = []
        self._file: StepLines | None = None
        self._asked_at: int | None = None

    def after_load(self, start: Start) -> None:
        """Open the file, on the last rank, at the step that the run starts from. Collective.

        Raises:
            UserError: it cannot be read or written.
        """
        self._model = start.model
        with all_ranks_agree():
            if self._save and is_last_rank():
                path = Path(self._save) / NAME
                if self._prompts or path.exists():  # without prompts: what another run has left there
                    self._file = open_generations(path, start.iteration)
                    self.rows = list(self._file.found)

    def after_evaluation(self, metrics: Mapping[str, Tensor], iteration: int) -> None:
        """Have the policy answer, and keep, show and send what it says. Collective over all ranks."""
        if self._prompts is None or iteration == self._asked_at:  # Megatron evaluates twice after a last step
            return
        self._asked_at = iteration
        began = time.perf_counter()
        answers = answer_greedily(self._model, self._prompts, self._shape, self._vocab_size, self._is_to_stop)
        if not is_last_rank():
            return
        if answers is None:
            show(f"prompts, after step {iteration} | given up: {self._stop.reason}")
            return
        rows = rows_of(self._prompts, answers, PairTokenizer(get_tokenizer()).text, iteration)
        seconds, tokens = time.perf_counter() - began, sum(row["tokens"] for row in rows)
        show(
            f"prompts, after step {iteration} | {len(rows)} answered, {sum(answers.finished)} to their end | "
            f"{tokens / len(rows):.1f} tokens each | {seconds:.1f} s"
        )
        if self._file:
            self._file.add(rows)
        if iteration not in {row["step"] for row in self.rows}:  # of a finished run that was started once more
            self.rows += rows
        if wandb := get_wandb_writer():
            wandb.log({"generations": _wandb_table(wandb, self.rows, rows)}, iteration)

    def _is_to_stop(self) -> bool:
        return any(self._stop.signals_received())

    def table(self) -> Table | None:
        """A few answers of the first and the last evaluation side by side; None unless there are two."""
        pair = side_by_side(self.rows)
        if pair is None or pair.steps[0] == pair.steps[1]:
            return None
        titles = ["prompt", *(f"step {step}" for step in pair.steps)]
        cells = [[printable(" ".join(text.split()), _CHARACTERS) for text in row] for row in pair.rows[:_SHOWN]]
        return Table(titles, cells, left=(0, 1, 2))


def rows_of(prompts: EvalPrompts, answers: GreedyAnswers, text: Callable[[list[int]], str], step: int) -> list[Row]:
    """An evaluation's rows of generations.jsonl."""
    return [
        {
            "step": step,
            "prompt": row.prompt,
            "answer": text(answers.without_end(index)),
            "tokens": len(answers.answers[index]),
            "finished": answers.finished[index],
            **row.columns,
        }
        for index, row in enumerate(prompts.rows)
    ]


def _wandb_table(wandb: Any, rows: list[Row], latest: list[Row]) -> Any:
    """The latest answers beside the first. Texts, because W&B gives every column one type."""
    first = rows[0]["step"]
    before = {prompt_text(row["prompt"]): answer_text(row) for row in rows if row["step"] == first}
    others = list(dict.fromkeys(name for row in latest for name in row if name not in ANSWER_COLUMNS))
    data = []
    for row in latest:
        prompt = prompt_text(row["prompt"])
        cells = [prompt, before.get(prompt, ""), answer_text(row), row["tokens"], row["finished"]]
        data.append([*cells, *("" if row.get(name) is None else str(row[name]) for name in others)])
    return wandb.Table(columns=["prompt", f"step {first}", "answer", "tokens", "finished", *others], data=data)
