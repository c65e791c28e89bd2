"""A real browser for tests of pages: Chromium without a window, told what to do over its DevTools protocol by pipes."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Debian's name, and those of others.
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

#: It runs as root in containers, where /dev/shm may be small, and looks at our own pages alone.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)

#: One that lives longer than this hangs.
_SECONDS = 120


def find_browser() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@dataclass(frozen=True)
class Look:
    """What there is to see of a page in a window of some width, in CSS pixels."""

    errors: list[str]
    """Of the console and of scripts, and requests for anything but the page."""
    client_width: int
    scroll_width: int
    """Greater than the window's: something sticks out, and the page can be pushed sideways."""
    figures: dict[str, tuple[float, float]]
    """Width and height of every picture, by the first word of its description; 0 where it could not be drawn."""
    screenshot: bytes
    """PNG of the whole page."""


_MEASURE = """({
    client: document.documentElement.clientWidth,
    scroll: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
    figures: [...document.images].map(each => {
        const box = each.getBoundingClientRect(), drawn = each.naturalWidth > 0 ? 1 : 0
        return [each.alt.split(':')[0], [drawn * box.width, drawn * box.height]]
    }),
})"""


class Browser:
    """One that is running: see :func:`browser`. Commands and answers are JSON that ends with a zero byte."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer = commands, answers, b""
        self._numbers = itertools.count(1)
        self._events: list[dict[str, Any]] = []

    def look(self, page: Path, width: int, height: int = 900) -> Look:
        """Open a file in a new tab of this size, and measure it."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", session, **size)
        self._ask("Page.navigate", session, url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()
        found = self._ask("Runtime.evaluate", session, expression=_MEASURE, returnByValue=True)["result"]["value"]
        shot = self._ask("Page.captureScreenshot", session, captureBeyondViewport=True)["data"]
        errors = [told for event in self._events if (told := _error(event, page))]
        self._ask("Target.closeTarget", targetId=target)
        figures = {name: tuple(size) for name, size in found["figures"]}
        return Look(errors, found["client"], found["scroll"], figures, base64.b64decode(shot))

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 2**20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message


def _error(event: dict[str, Any], page: Path) -> str:
    told = event["params"]
    match event["method"]:
        case "Runtime.exceptionThrown":
            return f"exception: {told['exceptionDetails']}"
        case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
            return f"console: {told['args']}"
        case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
            return f"log: {told['entry']['text']}"
        case "Network.requestWillBeSent" if not told["request"]["url"].startswith(("data:", page.resolve().as_uri())):
            return f"request: {told['request']['url']}"
    return ""


@contextmanager
def browser(program: str, home: Path) -> Iterator[Browser]:
    """Start one, with a profile of its own in ``home``, and end it."""
    (commands_there, commands), (answers, answers_there) = os.pipe(), os.pipe()
    # The protocol's descriptors are 3 and 4.
    start = f'exec "$@" 3<&{commands_there} 4>&{answers_there}'
    process = subprocess.Popen(
        ["bash", "-c", start, "bash", program, *_FLAGS, f"--user-data-dir={home}"],
        pass_fds=(commands_there, answers_there),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_there)
    os.close(answers_there)
    limit = threading.Timer(_SECONDS, process.kill)
    limit.start()
    try:
        yield Browser(commands, answers)
    finally:
        limit.cancel()
        process.terminate()
        process.wait(timeout=20)
        os.close(commands)
        os.close(answers)
