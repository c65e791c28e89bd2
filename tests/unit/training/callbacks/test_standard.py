"""Which callbacks a run has, and in which order they are told."""

from __future__ import annotations

from typing import Any

from megatron_bdpo.training.callbacks.callback import Callback
from tests.harness.jobs import TINY_JOB, TINY_MODEL


class Own(Callback):
    """Given to a run by a program."""


def callbacks(flags: list[str], **overrides: Any) -> str:
    """Those of a run that has not begun."""
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.run import PreferenceRun
    from megatron_bdpo.training.setup import forget_global_state

    arguments = Arguments.parse(flags, TINY_MODEL | TINY_JOB | overrides)
    with process_groups(arguments.settings.process):
        run = PreferenceRun(arguments, [Own()])
        forget_global_state()
    assert run.progress.listeners is run.callbacks
    return " ".join(type(callback).__name__ for callback in run.callbacks)


#: Before a step's line: what may end the run. Before the status: what a finished run leaves.
ALL = (
    "Own StepZeroCheck FiniteCheck Divergence RunRecord Progress Scalars MetricsJsonl HeldOutPairs ConsoleLines "
    "Answers Checksums Deletion Timetable StatusFile"
)
BARE = "Own FiniteCheck Divergence Progress Scalars ConsoleLines Answers Checksums Timetable StatusFile"


def test_they_are_those_that_the_flags_ask_for(ranks, tmp_path):
    saved = ["--save", str(tmp_path), "--save-interval", "2", "--keep-checkpoints", "2"]
    assert ranks(2)(callbacks, [*saved, "--preference-loss", "dpo"]) == [ALL, ALL]
    assert ranks(1)(callbacks, ["--preference-loss", "simpo"], pair_cache_dir=str(tmp_path)) == [BARE]
