"""Two nodes, played by two ranks with their own mounts, host name and hub cache: what one of them does not see is said.

A node's own view is a mount namespace, which only root may make; without that these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.jobs import DATA, train
from tests.harness.ranks import RankPool
from tests.harness.tiny_models import make_model, save_tokenizer

transformers = pytest.importorskip("transformers", reason="models by name come from the Hugging Face hub")

REVISION = "0123456789abcdef0123456789abcdef01234567"
STEP = ["--train-iters", "1"]


@pytest.fixture
def nodes(tmp_path_factory):
    """A pool of two ranks that nobody else uses: they change for good."""
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("a node of its own needs a mount namespace, and so root")
    pool = RankPool(2, tmp_path_factory.mktemp("nodes"))
    yield pool
    pool.close()


def become_node(*hidden: str) -> None:
    """From now on this rank is the first of its node, and on the second node these directories are empty."""
    import socket

    os.environ["LOCAL_RANK"] = "0"
    if os.environ["RANK"] == "0":
        return
    os.unshare(os.CLONE_NEWNS | os.CLONE_NEWUTS)
    socket.sethostname("node2")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for directory in hidden:
        subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)


def refusal(hidden: list[str], flags: list[str], **overrides: object) -> str:
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training import nodes

    become_node(*hidden)
    nodes.PATIENCE = 0.5
    try:
        train(flags, **overrides)
    except UserError as error:
        return str(error)
    return "no error"


def test_a_save_directory_of_each_node_alone(nodes, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    flags = [*STEP, "--save", str(run), "--save-interval", "1"]
    for message in nodes(refusal, [str(run)], flags):
        assert f"--save {run} is not one directory for all nodes: node2 does not see" in message
    assert list(run.iterdir()) == [], "nor is anything left there"


def test_a_token_cache_of_each_node_alone(nodes, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for message in nodes(refusal, [str(cache)], STEP, pair_cache_dir=str(cache)):
        assert f"--pair-cache-dir {cache} is not one directory for all nodes: node2 does not see" in message


def test_a_tokenizer_that_one_node_has_not(nodes, tmp_path):
    place = tmp_path / "tokenizer"
    place.mkdir()
    model = Path(shutil.copy(DATA / "tokenizer.model", place))
    shared = str(tmp_path / "cache")
    for message in nodes(refusal, [str(place)], STEP, tokenizer_model=str(model), pair_cache_dir=shared):
        assert f"--tokenizer-model {model}: node2 does not see it, the first node does" in message


def test_a_model_directory_that_one_node_has_not(nodes, tmp_path):
    model = make_model("llama", tmp_path / "models")
    flags = [*STEP, "--hf-model", str(model)]
    for message in nodes(refusal, [str(tmp_path / "models")], flags):
        assert f"--hf-model {model}: node2 does not see it, the first node does" in message


def test_a_checkpoint_that_one_node_has_not(ranks, nodes, tmp_path):
    start = tmp_path / "start"
    ranks(2)(train, [*STEP, "--save", str(start), "--save-interval", "1"])
    flags = [*STEP, "--pretrained-checkpoint", str(start)]
    for message in nodes(refusal, [str(start)], flags, pair_cache_dir=str(tmp_path / "cache")):
        assert "--pretrained-checkpoint" in message and "node2 does not see it" in message


def into_hub_cache(model: Path, cache: Path) -> None:
    """As ``hf download org/tiny`` leaves it."""
    root = cache / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    shutil.copytree(model, root / "snapshots" / REVISION)


def by_name(caches: list[str], flags: list[str], **overrides: object) -> tuple[str, str]:
    """A job from a name on a hub out of reach, a cache for each node. Returns how it ended, and the model's path."""
    import huggingface_hub.constants as constants

    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.run import PreferenceRun
    from tests.harness.jobs import TINY_JOB

    become_node()
    constants.HF_HUB_OFFLINE = True
    constants.HF_HUB_CACHE = caches[int(os.environ["RANK"])]
    own_tokenizer = {"tokenizer_type": None, "tokenizer_model": None}
    arguments = Arguments.parse([*flags, "--hf-model", "org/tiny"], TINY_JOB | own_tokenizer | overrides)
    try:
        with distributed.process_groups(arguments.settings.process):
            PreferenceRun(arguments).pretrain()
    except UserError as error:
        return str(error), ""
    return "", arguments.settings.model.hf_model


def test_a_name_is_fetched_once_for_each_node(nodes, tmp_path):
    """Both caches hold it, with its tokenizer: each node reads its own, at one revision, and the job runs."""
    model = make_model("llama", tmp_path / "models")
    save_tokenizer(model)
    caches = [str(tmp_path / f"hub{rank}") for rank in range(2)]
    for cache in caches:
        into_hub_cache(model, Path(cache))
    # The first node's is hidden from the second by its place: nothing of it is there.
    flags = [*STEP, "--long-pairs", "drop"]
    found = nodes(hidden_by_name, caches, flags, pair_cache_dir=str(tmp_path / "cache"))
    assert [ended for ended, _ in found] == ["", ""]
    assert [Path(path).is_relative_to(cache) for (_, path), cache in zip(found, caches, strict=True)] == [True, True]
    assert {Path(path).name for _, path in found} == {REVISION}


def hidden_by_name(caches: list[str], flags: list[str], **overrides: object) -> tuple[str, str]:
    become_node(caches[0])
    return by_name(caches, flags, **overrides)


def test_a_name_that_one_node_cannot_fetch(nodes, tmp_path):
    caches = [str(tmp_path / f"hub{rank}") for rank in range(2)]
    into_hub_cache(make_model("llama", tmp_path / "models"), Path(caches[0]))
    for message, _ in nodes(hidden_by_name, caches, STEP, pair_cache_dir=str(tmp_path / "cache")):
        assert message.startswith("on node2: --hf-model: org/tiny is no directory and cannot be fetched.")
        assert f"Or let all nodes share an HF_HOME: the first node has it in {caches[0]}" in message


def other_flags(flags: list[str]) -> str:
    """The second node's environment makes another recipe of it."""
    os.environ["BETA"] = "0.1" if os.environ["RANK"] == "0" else "0.2"
    return refusal([], flags)


def test_flags_that_differ_between_nodes(nodes):
    for message in nodes(other_flags, [*STEP, "--recipe", "{beta: '${BETA}'}"]):
        assert message.startswith("on node2 these flags are not what they are on the first node: --beta.")


def test_a_recipe_that_one_node_has_not_is_told_by_that_node(tmp_path):
    """Before the ranks know of each other: node by node, once for each."""
    command = [sys.executable, "-m", "megatron_bdpo.train", "--recipe", str(tmp_path / "none.yaml")]
    for local_rank, expected in ((0, "error on "), (1, "")):
        place = {"RANK": str(2 + local_rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "4"}
        ended = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2
        assert ended.stderr.startswith(expected) and bool(ended.stderr) == bool(expected), ended.stderr
