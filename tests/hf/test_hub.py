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

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def silent():
    """The address of a server that takes connections and never answers, as behind a firewall."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing(silent):
    """The address of no server."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    return f"http://127.0.0.1:{port}"


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
    assert tokenizer_directory(str(tmp_path)) == tmp_path.resolve()
