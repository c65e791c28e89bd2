"""A Hugging Face hub on this machine: as much of its HTTP API as a push of small files needs."""

from __future__ import annotations

import base64
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml


@dataclass
class Hub:
    """What it holds, and what it was asked."""

    address: str = ""
    token: str = "hf_stub_token"
    """Which may write."""
    private: dict[str, bool] = field(default_factory=dict)
    """By repository."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    broken: bool = False
    """Commits are answered with an error."""


@contextmanager
def running() -> Iterator[Hub]:
    """One that is empty."""
    hub = Hub()

    class Answers(_Answers):
        state: ClassVar[Hub] = hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()


class _Answers(http.server.BaseHTTPRequestHandler):
    state: ClassVar[Hub]

    def do_POST(self) -> None:
        hub, body = self.state, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/validate-yaml":
            return self._answer(*_judge(json.loads(body)["content"]))
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        match = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        if match is None:
            return self._answer(404, {"error": self.path})
        if match[2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        return self._commit(match[1], [json.loads(line) for line in body.splitlines()])

    def do_GET(self) -> None:
        match = re.match(r"/api/models/([^/?]+/[^/?]+)", self.path)
        name = match[1] if match else ""
        if name not in self.state.private:
            return self._answer(404, {"error": self.path})
        siblings = [{"rfilename": path} for path in self.state.files[name]]
        return self._answer(
            200, {"id": name, "private": self.state.private[name], "sha": "0" * 40, "siblings": siblings}
        )

    def do_HEAD(self) -> None:
        self._answer(200, {})

    def _create(self, told: dict[str, Any]) -> None:
        name = f"{told.get('organization') or 'me'}/{told['name']}"
        if name in self.state.private:
            return self._answer(409, {"error": "exists", "url": f"{self.state.address}/{name}"})
        # Today's client sends a visibility, an older one whether it is private.
        self.state.private[name] = told.get("private", told.get("visibility") == "private")
        self.state.files[name] = {}
        return self._answer(200, {"url": f"{self.state.address}/{name}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        if self.state.broken:
            return self._answer(400, {"error": "no room"})
        for line in lines:
            if line["key"] == "file":
                self.state.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.state.commits.append(lines[0]["value"]["summary"])
        commit = {"commitUrl": f"{self.state.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
        return self._answer(200, commit)

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


def _judge(card: str) -> tuple[int, dict[str, Any]]:
    """A model's card may name a base of the hub only."""
    base = yaml.safe_load(card.split("---")[1]).get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return 400, {"errors": [{"message": f'"base_model" with value "{base}" is not valid'}], "warnings": []}
    return 200, {"errors": [], "warnings": []}
