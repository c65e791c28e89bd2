"""What this rank is at, since when it has not gone on, and how long that may be. ``watch`` reads it from a thread.

A **beat** is one unit of work done: a chunk of rows, a weight, a call of the model, a microbatch, a file. A phase's
limit is for the time from one beat to the next. It follows from the run itself, as the calculated timeouts of NVIDIA's
resiliency extension do: FACTOR times the longest that was seen, at least a floor, and before enough was seen a limit
for beginnings (compilation, first connections). ``--phase-limit`` sets it, or switches it off.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from megatron_bdpo.errors import UserError

Phase = Literal["set-up", "tokenizing", "weights", "scoring", "step", "evaluation", "save", "export"]

PHASES: tuple[Phase, ...] = get_args(Phase)

#: That of nvidia-resiliency-ext's ``safety_factor``.
FACTOR = 5.0

#: Beats of a phase that are not measured, for they are first ones; and those after which the measure is taken.
_WARM_UP, _ENOUGH = 2, 5

#: Steps of a process that compile and connect.
WARM_UP_STEPS = 2

#: Phase -> seconds: limit before anything is measured, and the least afterwards.
_LIMITS: Mapping[Phase, tuple[float, float]] = MappingProxyType(
    {
        "set-up": (3600, 1800),
        "tokenizing": (1800, 300),
        "weights": (3600, 600),
        "scoring": (1800, 180),
        "step": (1800, 180),
        "evaluation": (1800, 180),
        "save": (3600, 1200),
        "export": (3600, 1200),
    }
)

#: Here the ranks do the same at the same time; in the others one may work for long while the rest wait for it.
IN_STEP: frozenset[Phase] = frozenset({"step", "evaluation"})

#: Left here, a job loses nothing: no step is done, and what it reads is read again.
NOTHING_TO_KEEP: frozenset[Phase] = frozenset({"set-up", "weights"})


@dataclass(frozen=True)
class PhaseLimits:
    """Seconds from beat to beat."""

    given: Mapping[str, float] = field(default_factory=dict)
    """By --phase-limit; infinite: none."""

    @classmethod
    def parse(cls, words: Sequence[str]) -> PhaseLimits:
        """``off``, ``SECONDS`` for all phases, ``PHASE=SECONDS``, ``PHASE=off``; later words go before earlier ones.

        Raises:
            UserError: there is no such phase, or no such number of seconds.
        """
        given: dict[str, float] = {}
        for word in words:
            name, _, value = word.rpartition("=")
            if name and name not in PHASES:
                raise UserError(f"--phase-limit {word}: there is no phase '{name}'. Name one of {', '.join(PHASES)}.")
            try:
                seconds = math.inf if value == "off" else float(value)
            except ValueError:
                seconds = math.nan
            if not seconds > 0:
                raise UserError(
                    f"--phase-limit {word}: '{value}' is no number of seconds above 0. Give seconds, or off."
                )
            given |= dict.fromkeys([name] if name else PHASES, seconds)
        return cls(MappingProxyType(given))

    def of(self, phase: Phase, longest: float, beats: int) -> float:
        """Seconds that may pass; infinite where nothing is watched.

        Args:
            longest: seen so far between two beats of the phase.
            beats: that it was measured of.
        """
        if phase in self.given:
            return self.given[phase]
        first, least = _LIMITS[phase]
        return max(least, FACTOR * longest) if beats >= _ENOUGH else max(first, FACTOR * longest)


@dataclass
class PhaseClock:
    """Of this rank. Written by the main thread alone."""

    limits: PhaseLimits = field(default_factory=PhaseLimits)
    now: tuple[Phase, float] = field(default_factory=lambda: ("set-up", time.monotonic()))
    """The phase, and when this rank has last gone on in it."""
    beats: int = 0
    """Of all phases."""
    is_waiting: bool = False
    """In a collective of ours on the host: it goes on as long as any rank does."""
    is_warm: bool = True
    """What is done now is a measure for what comes: not so of first steps, which compile and connect."""
    told: Callable[[], None] = lambda: None
    """Called by the main thread when the phase is another one."""
    step: int = 0
    """Optimizer steps done, of so many."""
    of: int = 0
    _longest: dict[Phase, float] = field(default_factory=dict)
    _seen: Counter[Phase] = field(default_factory=Counter)

    def beat(self) -> None:
        phase, since = self.now
        now = time.monotonic()
        self.now = phase, now
        self.beats += 1
        if not self.is_warm:
            return
        self._seen[phase] += 1
        if self._seen[phase] > _WARM_UP:
            self._longest[phase] = max(self._longest.get(phase, 0.0), now - since)

    def enter(self, phase: Phase) -> None:
        before, self.now = self.now[0], (phase, time.monotonic())
        self.beats += 1
        if phase != before:
            self.told()

    def limit(self) -> float:
        """Of the phase that this rank is in."""
        phase, _ = self.now
        return self.limits.of(phase, self._longest.get(phase, 0.0), self._seen[phase] - _WARM_UP)


_clock = PhaseClock()


def clock() -> PhaseClock:
    """Of the job that this process is at."""
    return _clock


def start_clock(limits: PhaseLimits | None = None) -> PhaseClock:
    """A new one, for a job that begins."""
    global _clock
    _clock = PhaseClock(limits or PhaseLimits())
    return _clock


def beat() -> None:
    """One unit of work is done."""
    _clock.beat()


@contextlib.contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Inside the block this rank is in a phase, behind it in the one before. All ranks enter it.

    What the block raises ends the job there, and its status says so.
    """
    before, _ = _clock.now
    _clock.beat()
    _clock.enter(name)
    yield
    _clock.beat()
    _clock.enter(before)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Inside the block this rank waits for all others. What that takes is none of its own measures."""
    own = _clock
    own.beat()
    own.is_waiting = True
    try:
        yield
    finally:
        own.is_waiting = False
        own.enter(own.now[0])
