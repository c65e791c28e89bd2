"""The documentation says what the code does: tables, flags, the example package, and that it builds."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bdpo.cli.main import main
from megatron_bdpo.data import formats
from megatron_bdpo.losses import registry
from tests.unit.cli.test_cli import ALL, command_of
from tools import docstrings, pages

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
#: Flags of other programs, in commands and tables of these pages.
FOREIGN = {
    "--nproc-per-node", "--nnodes", "--no-deps", "--no-build-isolation", "--exponential-cap", "--help", "--rounds",
}  # fmt: skip
#: Pages with flags of programs of their own (benchmarks, tests, other trainers), which other tests look at.
ELSEWHERE = {"performance", "ablation", "parity", "reliability", "migrating"}


def test_pages_are_current():
    """What the pages take from the source is as the source says it: losses, formats, files, messages, docstrings."""
    assert pages.outdated() == [], "make pages"


def test_a_page_that_is_not_current_is_found():
    """A place is filled whatever it held, and what stands around it stays."""
    page = "a\n\n<!-- made: formats -->\n\nof before\n\n<!-- end -->\n\nb\n"
    text = pages.filled(page)
    assert text == pages.filled("a\n\n<!-- made: formats -->\n<!-- end -->\n\nb\n") != page
    assert text.startswith("a\n\n<!--") and text.endswith("-->\n\nb\n") and "of before" not in text
    assert all(f"| `{each.name}` | {each.summary} |" in text for each in formats.FORMATS)


def test_every_loss_is_explained():
    page = (DOCS / "losses.md").read_text("utf-8")
    headings = ", ".join(re.findall(r"^### (.*)$", page, re.M)).split(", ")
    assert sorted(headings) == sorted(registry.names())


def test_docstrings_as_markdown():
    text = """Scores.

        z = x < y

    Args:
        pairs, of_all: [P] int64,
            sorted.

    Takes ``a <b>``.
    """
    expected = "Scores.\n\n    z = x < y\n\n**Args**\n\n- `pairs, of_all`: [P] int64,\n  sorted.\n\nTakes `a <b>`."
    assert docstrings.markdown(text) == expected


def known_flags() -> set[str]:
    """On a rank: all of a training's flags."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main(["train", "--help-all"])
    return set(re.findall(r"--[a-z0-9][a-z0-9_-]*", output.getvalue()))


def own_flags() -> set[str]:
    found = {"--debug", "--version"}
    for names in ALL:
        found |= {flag for option in command_of(names).params for flag in option.opts}
    return found


def test_flags_in_documents_exist(ranks):
    (flags,) = ranks(1)(known_flags)
    written_by_hand = {
        page.stem: page for page in [*DOCS.glob("*.md"), ROOT / "README.md"] if page.stem not in ELSEWHERE
    }
    texts = {name: pages.by_hand(page.read_text("utf-8")) for name, page in written_by_hand.items()}
    # Of a table "theirs | here", the right side.
    rows = re.findall(r"^\|.*\| (.*) \|$", (DOCS / "migrating.md").read_text("utf-8"), re.M)
    texts["migrating"] = "\n".join(rows)
    for page, text in texts.items():
        written = set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", text))
        assert written - flags - own_flags() - FOREIGN == set(), page


LINKED = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "slurm/README.md",
    "examples/paper/README.md",
    "examples/iterative/README.md",
]


@pytest.mark.parametrize("document", [*LINKED, *(f"docs/{page.name}" for page in sorted(DOCS.glob("*.md")))])
def test_links_lead_somewhere(document):
    """In the repository, as it is read there; of the site MkDocs says it."""
    text = (ROOT / document).read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", re.sub(r"```.*?```", "", text, flags=re.S))
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []


def test_lists_from_the_source():
    """The lists of messages hold what the code says."""
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    assert "is named … times. Name it once, with a weight." in text
    assert "nothing is learned. Raise --lr" in text
    assert text.count("\n- ") > 120


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trls_settings_are_trls():
    """The left side of the table of TRL: what no line says is of older versions, its configurations or PEFT's have."""
    pytest.importorskip("trl")
    from peft import LoraConfig
    from trl import DPOConfig, RewardConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    text = (DOCS / "migrating.md").read_text("utf-8")
    section = text[text.index("### TRL") : text.index("### ms-swift")]
    configurations = (DPOConfig, RewardConfig, CPOConfig, ORPOConfig, LoraConfig)
    known = {name for each in configurations for name in each.__dataclass_fields__}
    arguments_of_the_trainer = {"model", "ref_model", "peft_config"}
    for theirs, _ in re.findall(r"^\| (.*) \| (.*) \|$", section, re.M):
        if "older versions" not in theirs:
            names = set(re.findall(r"`([a-z_0-9]+)(?:=[^`]*)?`", theirs))
            assert names <= known | arguments_of_the_trainer, theirs


def in_a_process_with(package: str, script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a script where a package of examples/ is installed."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", directory]
    origin, source = ROOT / "examples" / package, directory / "source"
    for file in origin.rglob("*.*"):
        if file.suffix in (".py", ".toml"):
            (source / file.relative_to(origin)).parent.mkdir(parents=True, exist_ok=True)
            (source / file.relative_to(origin)).write_bytes(file.read_bytes())
    subprocess.run([*install, source], check=True, timeout=120)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{directory}"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, env=environment, timeout=120, capture_output=True, text=True)


def test_example_of_an_own_loss(tmp_path):
    """Installed as a package, it is in the registry, with its option as a flag and the value of its formula."""
    script = """
import math, torch
from megatron_bdpo.data import formats
from megatron_bdpo.losses import registry
from megatron_bdpo.losses.base import PairLogProbs
options = registry.build_options("exponential", {"exponential_cap": 0.5})
one = torch.ones(2, dtype=torch.int64)
pairs = PairLogProbs(torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -1.0]), one, one,
                     reference_chosen=torch.zeros(2), reference_rejected=torch.zeros(2))
loss = registry.get("exponential").function(pairs, options).loss
torch.testing.assert_close(loss, torch.tensor([math.exp(-0.1 * 2), math.exp(0.5)]))
assert registry.option_fields()["exponential_cap"].flag == "--exponential-cap"
"""
    in_a_process_with("own_loss", script, tmp_path)


def test_example_of_an_own_callback(tmp_path):
    """Installed as a package, a run finds it, and it is told of the steps."""
    script = """
from megatron_bdpo.platform.boot import prepare_platform
prepare_platform()
from megatron_bdpo.training.callbacks.callback import StepResult
from megatron_bdpo.training.callbacks.entry_points import make, offered
(callback,) = [make(point, None, None) for point in offered()]
for iteration in range(1, 21):
    callback.after_step(StepResult(iteration, {}, False, 10.0 if iteration == 15 else 2.0, 8, 100))
"""
    told = in_a_process_with("own_callback", script, tmp_path).stdout
    assert "WARNING: step 15 took 10.0 s, those before it 2.0 s" in told
    assert told.count("WARNING") == 1


def test_it_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed; make docs builds it")
    # Without --quiet: it hides warnings from --strict too, which then passes whatever there is.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert ended.returncode == 0, ended.stderr
