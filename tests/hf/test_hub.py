"""A name on a hub that cannot be reached: said at once, with the way out, whatever stands in the way."""

from __future__ import annotations

import http.server
import re
import socket
import threading
import time

import pytest

from megatron_bdpo import hub
from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.directory import model_directory, tokenizer_directory
from tests.distributed.test_bad_input import refusal
from tests.harness.rendezvous import free_port

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def silent():
    """The address of a server that takes connections and never answers, as behind a firewall."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing():
    """The address of no server."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def answering():
    """The address of a server that knows nothing."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(params=["offline", "silent", "refusing", "no such name", "no such proxy"])
def unreachable(request, monkeypatch):
    """A machine that cannot reach the hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", "http://nowhere.invalid")
    if request.param in ("silent", "refusing"):
        monkeypatch.setattr(constants, "ENDPOINT", request.getfixturevalue(request.param))
    if request.param == "no such proxy":
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("find", "flag"), [(model_directory, "--hf-model"), (tokenizer_directory, "--tokenizer-model")]
)
def test_said_at_once(unreachable, find, flag):
    import huggingface_hub  # noqa: F401  # which takes seconds itself

    start = time.monotonic()
    expected = f"{flag}: some-org/no-such-model is no directory and cannot be fetched. The hub cannot be reached from"
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        find("some-org/no-such-model")
    assert "hf download" in str(caught.value) and "give a directory" in str(caught.value)
    assert time.monotonic() - start < 10, "2.5 s and what a busy machine adds; the libraries take a minute"


def test_an_error_is_an_answer(answering, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", answering)
    assert hub.is_reachable()


@pytest.mark.parametrize("name", ["/no/such/place", "./no-such-place", "a/b/c", "~/x"])
def test_what_can_be_no_name(name):
    for find in (model_directory, tokenizer_directory):
        with pytest.raises(UserError, match=r"there is no directory .*, nor can this be a name on the hub"):
            find(name)


def test_a_tokenizers_directory_needs_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no tokenizer: none of tokenizer.json, .* \(it holds config.json\)"):
        tokenizer_directory(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_directory(str(tmp_path)) == tmp_path.resolve()


def test_a_revision_is_asked_for(monkeypatch):
    asked: list[str | None] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], local_files_only: bool, revision: str | None) -> str:
        asked.append(revision)
        return "somewhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for revision in ("v1.0", None):
        model_directory("org/model", revision)
    assert asked == ["v1.0", None]


def test_a_cached_revision_among_others(tmp_path, monkeypatch):
    """The hub's own cache, as it lies on a disk, with two revisions; the network is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commits = {"main": "a" * 40, "v1.0": "b" * 40}
    repository = tmp_path / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (repository / "refs" / name).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    assert model_directory("org/model").name == commits["main"]
    assert model_directory("org/model", "v1.0").name == commits["v1.0"]
    assert model_directory("org/model", commits["v1.0"]).name == commits["v1.0"]
    with pytest.raises(UserError, match="cannot be fetched"):
        model_directory("org/model", "v9")


def test_a_directory_has_no_revision(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--hf-revision v1: .* is a directory.* Leave --hf-revision out"):
        model_directory(str(tmp_path), "v1")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--hf-revision", "v1"], "--hf-revision is a revision of --hf-model, which is not given"),
     (["--hf-model", "MODEL", "--hf-revision", "v1"], "--hf-revision v1: MODEL is a directory")],
)  # fmt: skip
def test_a_run_refuses_a_revision_of_nothing(ranks, tmp_path, flags, expected):
    (tmp_path / "config.json").write_text("{}")
    flags = [flag.replace("MODEL", str(tmp_path)) for flag in flags]
    (message,) = ranks(1)(refusal, flags, max_pairs=8)
    assert expected.replace("MODEL", str(tmp_path)) in message
