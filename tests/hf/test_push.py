"""A push to a hub that a stub plays: private, with the environment's token, and told beforehand where it would fail."""

from __future__ import annotations

import contextlib
import io
import os
from unittest import mock

import pytest

from megatron_bdpo.errors import PassingError, UserError
from tests.harness import hub_stub
from tests.harness.jobs import train
from tests.harness.tiny_models import make_model

JOB = {"max_pairs": 8, "pairs_per_step": 4, "train_iters": 1, "lr": 1e-3}

constants = pytest.importorskip("huggingface_hub.constants")

from megatron_bdpo.model.hf import push  # noqa: E402  # which needs huggingface_hub


@pytest.fixture
def hub(monkeypatch):
    with hub_stub.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / ".left.tmp").write_text("of an interrupted export")
    return directory


def test_a_directory_is_one_commit_in_a_private_repository(hub, model):
    name = push.make_repository("me/model")
    told = push.push_directory(model, name)
    assert name == "me/model" and hub.private == {"me/model": True}
    assert hub.files["me/model"] == {"config.json": b"{}", "model.safetensors": b"weights"}
    assert hub.commits == ["Trained with megatron_bdpo"]
    assert told == f"{hub.address}/me/model (private: its settings make it public)"


def test_a_repository_that_is_there_stays_as_it_is(hub, model):
    hub.private["me/model"], hub.files["me/model"] = False, {}
    assert push.push_directory(model, push.make_repository("me/model")).endswith("/me/model (public)")


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("a/b/c", {}, r"--push-to-hub a/b/c: .* Give OWNER/NAME"),
        ("me/model", {"HF_TOKEN": ""}, r"the environment has no HF_TOKEN\. Set it to a token that may write"),
        (
            "me/model",
            {"HF_TOKEN": "hf_of_somebody_else"},
            r"the repository cannot be made: .*401.* Look at the token's",
        ),
    ],
    ids=["no-name", "no-token", "another-token"],
)
def test_told_beforehand(hub, monkeypatch, name, environment, expected):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=expected) as caught:
        push.make_repository(name)
    assert hub.private == {} and "hf_of_somebody_else" not in str(caught.value)


def test_offline_is_told_beforehand(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push.make_repository("me/model")


def test_what_cannot_be_pushed_stays(hub, model):
    hub.broken = True
    with pytest.raises(PassingError, match=r"could not be pushed: .* hf upload me/model .*/model sends it"):
        push.push_directory(model, push.make_repository("me/model"))
    assert (model / "config.json").exists()


def test_an_export_from_a_checkpoint(ranks, hub, tmp_path):
    model, run, output = make_model("llama", tmp_path), tmp_path / "run", tmp_path / "exported"
    ranks(1)(train, ["--hf-model", str(model), "--save", str(run), "--save-interval", "1"], **JOB)
    words = [
        "--checkpoint",
        str(run),
        "--hf-model",
        str(model),
        "--output",
        str(output),
        "--push-to-hub",
        "me/exported",
    ]
    ((code, said),) = ranks(1)(convert_with_hub, words, hub.address, hub.token)
    assert code == 0 and f"pushed to {hub.address}/me/exported (private" in said
    assert hub.files["me/exported"] == {path.name: path.read_bytes() for path in output.iterdir()}


def convert_with_hub(words: list[str], address: str, token: str) -> tuple[int, str]:
    from megatron_bdpo.cli.main import main

    with (
        mock.patch.object(constants, "ENDPOINT", address),
        mock.patch.dict(os.environ, HF_TOKEN=token),
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        return main(["convert", "export", *words]), said.getvalue()


def run_with_hub(flags: list[str], address: str, token: str, cache: str) -> tuple[str, str]:
    """A run on these ranks whose hub is at ``address``. Returns what it has said, and its error."""
    with (
        mock.patch.object(constants, "ENDPOINT", address),
        mock.patch.dict(os.environ, HF_TOKEN=token),
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        try:
            train(flags, pair_cache_dir=cache, **JOB)
        except UserError as error:
            return said.getvalue(), str(error)
    return said.getvalue(), ""


def test_a_run_pushes_what_it_has_exported(ranks, hub, tmp_path):
    """Two ranks, and a hub that takes nothing at first: the same command once more sends it."""
    saved, run = tmp_path / "trained", tmp_path / "run"
    flags = ["--hf-model", str(make_model("llama", tmp_path)), "--save-hf", str(saved), "--push-to-hub", "me/aligned"]
    flags += ["--save", str(run), "--save-interval", "1", "--tensor-model-parallel-size", "2"]
    where = (hub.address, hub.token, str(tmp_path / "cache"))
    hub.broken = True
    (said, problem), (_, other) = ranks(2)(run_with_hub, flags, *where)
    assert "hub: me/aligned, a private repository" in said
    assert "hf upload me/aligned" in problem and other, "both ranks end"
    assert hub.files["me/aligned"] == {} and (saved / "config.json").exists()
    hub.broken = False
    (said, problem), _ = ranks(2)(run_with_hub, [*flags, "--load", str(run)], *where)
    assert problem == "" and f"{saved}: written before" in said and "pushed to http" in said
    assert hub.files["me/aligned"] == {path.name: path.read_bytes() for path in saved.iterdir()}
