"""``--push-to-hub``: what a run has exported goes to the Hugging Face hub from rank 0."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from megatron_bdpo.model.hf.push import check_name, make_repository, push_directory
from megatron_bdpo.training.distributed import all_ranks_agree, is_rank_zero, say
from megatron_bdpo.training.phases import beat
from megatron_bdpo.training.settings import Settings

#: Seconds between two signs of life while files are sent, which may take hours.
_BEAT = 10.0


def check_push(settings: Settings) -> None:
    """Refuse a push that would fail after the training run: called before it. Collective.

    Raises:
        UserError: on every rank; there is no token, or the hub does not let it write.
    """
    name = settings.model.push_to_hub
    if not name:
        return
    with all_ranks_agree():
        if is_rank_zero():
            if settings.dry_run.is_wanted:  # which leaves nothing behind
                check_name(name)
            else:
                say(f"hub: {make_repository(name)}, a private repository unless it has been there before")


def push_export(settings: Settings) -> None:
    """Send what ``--save-hf`` has written. Collective.

    Raises:
        UserError: on every rank; it stays where it was written.
    """
    name, directory = settings.model.push_to_hub, settings.model.save_hf
    if not name or not directory:
        return
    with all_ranks_agree():
        if is_rank_zero():
            say(f"pushed to {_with_signs_of_life(lambda: push_directory(Path(directory), make_repository(name)))}")


def _with_signs_of_life[Result](work: Callable[[], Result]) -> Result:
    """Do it in a thread, and beat from this one, so that a long upload does not count as a hang."""
    results: list[Result] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_BEAT)
        beat()
    if problems:
        raise problems[0]
    return results[0]
