"""A limit of time for what somebody else wrote, a chat template for one: it may loop for ever."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class _Expired(BaseException):
    """No Exception, so that nothing on the way takes it for one of its own."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End the block after so many seconds.

    In the main thread of a process alone, where signals are heard: rows are tokenized there. Elsewhere, and where
    somebody else has set the process's alarm, there is no limit.

    Raises:
        TimeoutError: the block took longer.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise _Expired

    before = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again: a finalizer would swallow the first
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Expired:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise TimeoutError(f"it took more than {seconds:g} s") from None
    finally:
        signal.signal(signal.SIGALRM, before)
