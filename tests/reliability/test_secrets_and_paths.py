"""One whole job with secrets in its environment, and with spaces and letters of all kinds in every path."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.flags.secrets import refuse_secrets
from tests.harness.jobs import DATA
from tests.harness.tiny_models import make_model, save_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefdeadbeef",
    "HF_TOKEN": "hf_ThisMustNotBeSeenAnywhere",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+key/0123456789",
}
PASSWORDS = {
    "WANDB_BASE_URL": "https://robot:swordfish77@wandb.example",
    "HTTPS_PROXY": "http://me:opensesame@127.0.0.1:9",
}
HIDDEN = [*SECRETS.values(), "swordfish77", "opensesame"]
#: What a group that shares its work sets: nothing for others, all for the group.
UMASK = 0o007
ODD = "a b ü 漢 'x' $(y)"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment = {**inherited, **paths, **SECRETS, **PASSWORDS, **environment}
    command_line = [sys.executable, *map(str, command)]
    return subprocess.run(command_line, env=environment, umask=UMASK, capture_output=True, text=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job in which every path that a flag takes is odd: its directory and what it has printed."""
    place = tmp_path_factory.mktemp("odd") / ODD
    place.mkdir()
    model = place / "the model ✓"
    make_model("llama", place).rename(model)
    save_tokenizer(model)
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(DATA / name, place / f"pairs of {name}")
    packed = place / "more pairs ü.jsonl.gz"
    packed.write_bytes(gzip.compress(b"".join((DATA / "train.jsonl").read_bytes().splitlines(keepends=True)[:3])))
    recipe = place / "my recipe 漢.yaml"
    recipe.write_text(
        "pair-data: ['${RECIPE_DIR}/pairs of train.jsonl', 2, '${RECIPE_DIR}/more pairs ü.jsonl.gz']\n"
        "eval-pair-data: ['${RECIPE_DIR}/pairs of heldout.jsonl']\n"
        "hf-model: '${RECIPE_DIR}/the model ✓'\n"
        "train-iters: 2\nsave-interval: 1\npairs-per-step: 4\nmax-pairs: 16\nseq-length: 1024\nlr: 1e-3\n",
        "utf-8",
    )
    places = {"save": "the run", "pair-cache-dir": "a cache", "reference-cache": "its scores", "save-hf": "aligned",
              "tensorboard-dir": "board", "stop-file": "stop here"}  # fmt: skip
    flags = [word for flag, name in places.items() for word in (f"--{flag}", place / f"{name} é")]
    done = run("-m", "megatron_bdpo.train", "--recipe", recipe, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, done.stdout + done.stderr


def test_every_path_may_be_odd(job):
    place, _ = job
    made = {path.name for path in place.iterdir()}
    assert {"the run é", "a cache é", "its scores é", "aligned é", "board é"} <= made
    assert (place / "the run é" / "iter_0000002").is_dir() and (place / "its scores é" / "train").is_dir()
    assert sorted(path.name for path in (place / "aligned é").glob("*.safetensors"))
    assert not list(Path.cwd().glob("the run*")), "written beside the place that was named"


def test_the_programs_read_odd_paths_too(job):
    place, _ = job
    checked = run("-m", "megatron_bdpo.cli.main", "data", "check", place / "more pairs ü.jsonl.gz")
    assert checked.returncode == 0 and "3 kept of 3 rows" in checked.stdout, checked.stderr
    output = place / "my report ✓"
    reported = run("-m", "megatron_bdpo.cli.main", "report", place / "the run é", "--output", output)
    assert reported.returncode == 0, reported.stderr
    assert (output / "report.html").is_file()
    exported = run("-m", "megatron_bdpo.cli.main", "convert", "export", "--checkpoint", place / "the run é",
                   "--hf-model", place / "the model ✓", "--output", place / "exported ü")  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    for file in (place / "aligned é").glob("*.safetensors"):
        assert (place / "exported ü" / file.name).read_bytes() == file.read_bytes()


def test_a_stop_file_at_an_odd_path(job):
    place, _ = job
    stop = place / "stop here too é"
    stop.touch()
    again = place / "another run ✓"
    caches = ["--pair-cache-dir", place / "a cache é", "--reference-cache", place / "its scores é"]
    flags = ["--recipe", place / "my recipe 漢.yaml", "--save", again, "--stop-file", stop]
    done = run("-m", "megatron_bdpo.train", *flags, *caches)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"state": "stopped"' in (again / "status.json").read_text()


def test_no_secret_is_written_anywhere(job):
    """Every byte of every file that the job has made, and all that it has printed."""
    place, printed = job
    assert len(list(place.rglob("*"))) > 40, "the job has left too little to search"
    for name, content in [("the terminal", printed.encode()), *contents(place)]:
        for secret in HIDDEN:
            assert secret.encode() not in content, f"{name} holds {secret}"


def test_every_file_is_as_open_as_the_umask_says(job):
    """No wider, as modes that are set by hand are; no narrower, as those of tempfile and safetensors are."""
    place, _ = job
    made = [path for name in ("the run é", "a cache é", "its scores é", "aligned é", "board é")
            for path in (place / name, *(place / name).rglob("*"))]  # fmt: skip
    expected = {path: 0o770 if path.is_dir() else 0o660 for path in made}
    others = {path: oct(path.stat().st_mode & 0o777) for path in made if path.stat().st_mode & 0o777 != expected[path]}
    assert len(made) > 30 and not others


def contents(place: Path):
    """Name and bytes of every file; of what is packed, unpacked too. Megatron's checkpoints are not compressed."""
    for path in place.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            yield path, data
            if data[:2] in (b"\x1f\x8b", b"\x78\x9c"):
                yield path, zlib.decompress(data, 47)


def test_the_search_finds_what_is_there(job, tmp_path):
    """A byte of a model card, one of a checkpoint's arguments: the settings are where they would be seen."""
    place, _ = job
    found = {path.relative_to(place).parts[0] for path, data in contents(place) if b"pairs of train.jsonl" in data}
    assert {"the run é", "aligned é", "my recipe 漢.yaml"} <= found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"wandb-entity": SECRETS["HF_TOKEN"]}, "--wandb-entity holds what the environment has as HF_TOKEN"),
        ({"pair-data": ["2", "x/" + SECRETS["WANDB_API_KEY"]]}, "--pair-data holds .* as WANDB_API_KEY"),
        ({"hf-model": "https://me:swordfish77@host/x"}, "--hf-model holds an address with a password in it"),
    ],
)
def test_a_secret_is_no_flags_value(monkeypatch, settings, expected):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected) as caught:
        refuse_secrets(settings)
    assert not any(secret in str(caught.value) for secret in HIDDEN)


def test_what_is_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZER_PATH", "models/llama")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("MY_TOKEN", "short")
    refuse_secrets(
        {"tokenizer-model": "models/llama", "save": f"{tmp_path}/run", "lr": 1e-3, "x": "short", "bf16": True}
    )
