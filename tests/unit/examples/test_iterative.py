"""The example of iterative DPO: two rounds with a tiny model; answers by transformers, and by a server."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import socket
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_bdpo.errors import UserError
from tests.unit.cli.test_cli import run

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "iterative"
FLAGS = ["--", "--seq-length", "128", "--pairs-per-step", "4", "--train-iters", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def loop():
    spec = importlib.util.spec_from_file_location("iterative_loop", EXAMPLE / "loop.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["iterative_loop"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("iterative")
    script = [sys.executable, ROOT / "tests" / "first_hour" / "make_model.py", "MODEL", "pairs.jsonl"]
    subprocess.run(script, cwd=directory, check=True, capture_output=True)
    rows = (directory / "pairs.jsonl").read_text().splitlines()[:8]
    prompts = [json.dumps({"prompt": json.loads(row)["prompt"]}) for row in rows]
    (directory / "prompts.jsonl").write_text("\n".join(prompts))
    return directory


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_two_rounds(loop, made, ranks, tmp_path, capsys):
    """Each round's pairs are its own model's answers, and its model is the next one's start; a stop loses nothing."""
    trained: list[list[str]] = []

    def train(flags: list[str]) -> int:
        trained.append(flags)
        ((code, _, errors),) = ranks(1)(run, "train", *flags, "--pair-cache-dir", str(tmp_path / "cache"))
        assert code == 0, errors
        return code

    words = ["--model", str(made / "MODEL"), "--prompts", str(made / "prompts.jsonl"), "--output", str(tmp_path)]
    words += ["--tokens", "12", "--answers", "3"]
    assert loop.main([*words, "--rounds", "1", *FLAGS], train) == 0
    assert loop.main([*words, "--rounds", "2", *FLAGS], train) == 0
    starts = [flags[flags.index("--hf-model") + 1] for flags in trained]
    assert starts == [str(made / "MODEL"), str(tmp_path / "1" / "model")], "the first round is not made again"
    models = [made / "MODEL", tmp_path / "1" / "model", tmp_path / "2" / "model"]
    assert len({(model / "model.safetensors").read_bytes() for model in models}) == 3
    for number in ("1", "2"):
        answers = {row["prompt"]: row for row in lines(tmp_path / number / "answers.jsonl")}
        assert len(answers) == 8 and all(len(row["answers"]) == 3 for row in answers.values())
        for pair in lines(tmp_path / number / "pairs.jsonl"):
            row = answers[pair["prompt"]]
            score = dict(zip(row["answers"], row["scores"], strict=True))
            assert score[pair["chosen"]] == max(row["scores"]) > min(row["scores"]) == score[pair["rejected"]]
    assert lines(tmp_path / "1" / "answers.jsonl") != lines(tmp_path / "2" / "answers.jsonl")


class _Server(BaseHTTPRequestHandler):
    """Answers with what it was asked, n times."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = self.path == "/v1/chat/completions"
        texts = [f"{asked['model']} {number}" for number in range(asked["n"])]
        choices = [{"message": {"content": text}} if chat else {"text": text} for text in texts]
        body = json.dumps({"choices": choices}).encode() if "lost" not in asked["model"] else b"no"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_answers_of_a_server(loop, server, tmp_path):
    chat = [{"role": "user", "content": "hello"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": chat}) + "\n")
    (tmp_path / "judge.py").write_text("def score(prompt, answer):\n    return float(answer[-1])\n")
    words = ["--prompts", str(tmp_path / "prompts.jsonl"), "--judge", str(tmp_path / "judge.py"), "--server", server]
    words += ["--output", str(tmp_path), "--rounds", "1"]
    assert loop.main(["--model", "m", *words], lambda flags: 0) == 0
    assistant = [[{"role": "assistant", "content": f"m {number}"}] for number in (3, 0)]
    assert lines(tmp_path / "1" / "pairs.jsonl") == [
        {"prompt": "a", "chosen": "m 3", "rejected": "m 0"},
        {"prompt": chat, "chosen": assistant[0], "rejected": assistant[1]},
    ]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert loop.main(["--model", "lost", *words, "--output", str(tmp_path / "x")], lambda flags: 0) == 2
        assert loop.main(["--model", "m", *words], lambda flags: 3) == 2
        assert loop.main(["--model", "m", *words[:4], "--serve", "x"], lambda flags: 0) == 2
    assert "gave no answers" in errors.getvalue() and "has ended with 3" in errors.getvalue()
    assert not (tmp_path / "x" / "1" / "answers.jsonl").exists()


def test_a_server_is_started_for_a_model_and_ended(loop, tmp_path):
    (tmp_path / "m" / "v1").mkdir(parents=True)
    (tmp_path / "m" / "v1" / "models").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/v1"
    command = f"{sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {{model}}"
    with loop.served(command, address, str(tmp_path / "m")):
        urllib.request.urlopen(f"{address}/models").close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{address}/models")
    with pytest.raises(UserError, match="the server does not answer"), loop.served("false", address, "m"):
        pass


def test_equal_scores_make_no_pair(loop):
    assert loop.pair_of({"prompt": "a", "answers": ["b", "c"], "scores": [1.0, 1.0]}) is None
    assert loop.pair_of({"prompt": "a", "answers": ["b", " "], "scores": [1.0, 0.0]}) is None
