"""The wheel, in an environment of its own, in the hands of a new user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*command: object, **settings) -> str:
    ended = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        **settings,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves a build/ that later wheels would take old files from."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source)
    (built,) = target.glob("*.whl")
    return built


def test_what_the_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_bdpo").rglob("*.py")}
    assert {name for name in names if name.startswith("megatron_bdpo/")} == expected | {
        "megatron_bdpo/py.typed",
        "megatron_bdpo/report/page.html",
        "megatron_bdpo/training/flags/flag_table.json",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert "Requires-Python: >=3.12" in metadata and "License: Apache-2.0" in metadata


@pytest.mark.slow
def test_first_hour(wheel, tmp_path):
    """Its dependencies are this environment's: torch is not downloaded again."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    where = run(python, "-c", "import megatron_bdpo; print(megatron_bdpo.__file__)", env=environment, cwd=work)
    assert where.startswith(str(site))

    output = run(HERE / "play.sh", ROOT / "docs" / "quickstart.md", HERE / "make_model.py", env=environment, cwd=work)

    shown = [line.split()[2] for line in output.splitlines() if line.startswith("$ megatron-bdpo")]
    assert shown == ["data", "data", "score", "train", "report", "convert"]
    assert "pairs: 40 kept of 40 rows" in output and "generated: " in output and "Traceback" not in output
    steps = [json.loads(line) for line in (work / "RUN" / "metrics.jsonl").read_text().splitlines()]
    assert [step["iteration"] for step in steps if step["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert (work / "REPORT" / "report.html").stat().st_size > 10_000
    assert (work / "EXPORTED" / "README.md").exists()
