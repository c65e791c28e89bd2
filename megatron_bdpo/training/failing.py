"""How this process's job has failed, as far as it has heard of it; torch need not be there for that."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass
class Failure:
    """Of the job that is running, or ran last."""

    cause: str = ""
    """What has ended it, where a rank has raised: the first one's error, as far as this one has heard of it."""
    is_after_others: bool = False
    """This rank's failure follows from another's, which has told the cause."""
    is_alone: bool = False
    """This rank ends by an error that the others do not have: they wait for it in a collective."""


FAILURE = Failure()


def left_alone() -> bool:
    """Whether this rank, of several that a launcher has started, ends by an error that the others do not have.

    They wait for it in a collective, and taking the groups down may wait for them: it has to end without.
    """
    return FAILURE.is_alone and "TORCHELASTIC_RUN_ID" in os.environ


def is_first_of_launcher() -> bool:
    """Whether this is global rank 0, by the launcher's environment."""
    return int(os.environ.get("RANK", "0")) == 0
