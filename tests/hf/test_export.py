"""Every layout exports the same tensors, to the bit; what goes wrong on one rank ends all and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bdpo.errors import UserError
from tests.distributed.test_bad_input import refusal
from tests.harness.jobs import train
from tests.harness.tiny_models import load_model, make_model

pytest.importorskip("transformers", reason="the models are made by Hugging Face transformers")

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
EP2, CP2 = ["--expert-model-parallel-size", "2"], ["--context-parallel-size", "2", "--seq-length", "8"]
VPP = ["--num-layers-per-virtual-pipeline-stage", "1"]

#: Model, its layout, ranks, and those that write: of one data-parallel replica each that has a share of the weights.
LAYOUTS = {
    "TP2": ("llama", TP2, 2, {0, 1}),
    "PP2": ("llama", PP2, 2, {0, 1}),
    "TP2 x PP2": ("qwen2", [*TP2, *PP2], 4, {0, 1, 2, 3}),
    "TP2 x PP2, SP": ("qwen3", [*TP2, *PP2, "--sequence-parallel"], 4, {0, 1, 2, 3}),
    "TP2 x PP2, tied": ("llama tied", [*TP2, *PP2], 4, {0, 1, 2, 3}),
    "TP2, norms around": ("gemma3", TP2, 2, {0, 1}),
    "TP2 x PP2, norms over heads": ("olmo2", [*TP2, *PP2], 4, {0, 1, 2, 3}),
    "PP2, norms behind": ("exaone4", PP2, 2, {0, 1}),
    "virtual stages": ("llama", [*PP2, *VPP], 2, {0, 1}),
    "virtual stages, tied": ("gemma", [*PP2, *VPP], 2, {0, 1}),
    "CP2": ("llama", CP2, 2, {0}),
    "TP2 x DP2": ("llama", TP2, 4, {0, 1}),
    "EP2": ("mixtral", EP2, 2, {0, 1}),
    "TP2 x EP2": ("mixtral", [*TP2, *EP2, "--sequence-parallel"], 4, {0, 1, 2, 3}),
    "TP2 x EP2, whole experts": (
        "qwen3 moe",
        [*TP2, *EP2, "--sequence-parallel", "--expert-tensor-parallel-size", "1"],
        2,
        {0, 1},
    ),
    "latents": ("deepseek v3", [*TP2, *PP2, "--sequence-parallel"], 4, {0, 1, 2, 3}),
    "gpt-oss, EP2 x PP2": ("gpt-oss", [*EP2, *PP2], 4, {0, 1, 2, 3}),
    "biases": ("llama biased", [*TP2, *PP2], 4, {0, 1, 2, 3}),
    "fused projections": ("phi3", [*TP2, *PP2], 4, {0, 1, 2, 3}),
    "experts in some layers": ("glm4 moe", [*EP2, *PP2], 4, {0, 1, 2, 3}),
    "a shared expert": ("qwen2 moe mixed", [*TP2, "--sequence-parallel"], 2, {0, 1}),
    "EP2 x PP2": ("qwen3 moe", [*EP2, *PP2], 4, {0, 1, 2, 3}),
}


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def export(flags: list[str], target: Path, hindered: tuple[int, str] | None = None) -> tuple[str, list[str]]:
    """On a rank: write the model of --hf-model as it was read. Returns the refusal, if any, and this rank's files.

    Args:
        hindered: a rank, and the name of what hinders it there.
    """
    from megatron_bdpo.model.hf import export as writing
    from megatron_bdpo.model.hf.card import TrainingFacts
    from megatron_bdpo.model.hf.checkpoint import read_json
    from megatron_bdpo.model.hf.gather import LiveWeights
    from megatron_bdpo.training import distributed
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.hf import exporting
    from megatron_bdpo.training.hf.importing import model_in_memory

    arguments = Arguments.parse(flags)
    facts = TrainingFacts("", "", {}, {}, {})
    written: list[str] = []

    def note(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        written.append(path.name)
        writing.write_file(path, tensors)

    rank, name = hindered or (-1, "nothing")
    hindrance = HINDRANCES[name] if arguments.settings.process.rank == rank else nothing
    with (
        distributed.process_groups(arguments.settings.process),
        model_in_memory(arguments) as model,
        mock.patch.object(exporting, "write_file", note),
    ):
        source = LiveWeights(model, distributed.host_group())
        original = Path(arguments.settings.model.hf_model)
        with hindrance():
            try:
                exporting.write_model(source, target, read_json(original / "config.json"), original, facts)
            except UserError as error:
                return str(error), written
    return "", written


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All of them; those of the index are where it says."""
    (index,) = directory.glob("*.index.json")
    content = json.loads(index.read_text())
    files = {name: load_file(directory / name) for name in set(content["weight_map"].values())}
    assert {path.name for path in directory.glob("*.safetensors")} == files.keys()
    assert sorted(files)[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    tensors = {name: tensor for file in files.values() for name, tensor in file.items()}
    assert content["weight_map"] == {name: file for file in files for name in files[file]}
    assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_exports_what_it_has_read(ranks, tmp_path, layout):
    """transformers' own file is the oracle. The vocabulary is padded to other sizes in other layouts."""
    name, flags, size, expected_writers = LAYOUTS[layout]
    original, target = make_model(name, tmp_path), tmp_path / "out"
    outcomes = ranks(size)(export, ["--hf-model", str(original), *flags], target)
    assert [refusal for refusal, _ in outcomes] == [""] * size
    assert {rank for rank, (_, written) in enumerate(outcomes) if written} == expected_writers
    expected = load_file(original / "model.safetensors")
    is_one = len(expected_writers) == 1 or "gpt" in name  # which is written anew, in few files
    found = load_file(target / "model.safetensors") if is_one else tensors_of(target)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_transformers_loads_what_four_ranks_have_written(ranks, tmp_path):
    """In bf16, as one rank writes it: one rank's file and four ranks' files are the same model."""
    original = make_model("llama 3.2", tmp_path)
    flags = ["--hf-model", str(original), "--bf16"]
    ranks(4)(export, [*flags, *TP2, *PP2], tmp_path / "four")
    ranks(1)(export, flags, tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert len(list((tmp_path / "four").glob("*.safetensors"))) == 4
    found, expected = (load_model(tmp_path / name).state_dict() for name in ("four", "one"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config == json.loads((tmp_path / "one" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_layers_that_predict_further_tokens_are_left_out(ranks, tmp_path):
    """GLM-4.5's files have one behind the last layer. What is written has none, and says so."""
    original = make_model("glm4 moe", tmp_path)
    config = json.loads((original / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (original / "config.json").write_text(json.dumps(config))
    stored = load_file(original / "model.safetensors")
    save_file(stored | {"model.layers.4.enorm.weight": torch.ones(64)}, original / "model.safetensors")
    assert ranks(1)(export, ["--hf-model", str(original)], tmp_path / "out")[0][0] == ""
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == stored.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_biases_of_experts_are_not_rounded(ranks, tmp_path):
    """In bf16 a bias near 30 would be off by up to 0.06, and tokens would go to other experts."""
    original = make_model("glm4 moe", tmp_path)
    (bias,) = ranks(1)(trained_bias, str(original), str(tmp_path / "cache"), str(tmp_path / "out"))
    stored, found = load_file(original / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(bias, stored[name]) and torch.equal(found[name], stored[name])
    assert not torch.equal(stored[name], stored[name].bfloat16().float())
    assert found["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def trained_bias(model: str, cache: str, output: str) -> torch.Tensor:
    """On a rank: the bias of the first layer with experts after a step in bf16."""
    from megatron_bdpo.model.moe import PairRouter
    from megatron_bdpo.training.callbacks.callback import Callback, Start

    routers: list[PairRouter] = []

    class Seen(Callback):
        def after_load(self, start: Start) -> None:
            routers.extend(each for each in start.model[0].modules() if isinstance(each, PairRouter))

    train(
        ["--hf-model", model, "--bf16", "--save-hf", output],
        callbacks=[Seen()],
        pair_cache_dir=cache,
        max_pairs=4,
        pairs_per_step=4,
        train_iters=1,
    )
    bias = routers[0].expert_bias
    assert bias is not None
    return bias.clone()


# What goes wrong on one rank ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """The operating system refuses files above 4 KiB to this process, as a full disk or quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Relative names mean another directory than to the other ranks, as on a node with a disk of its own."""
    before = Path.cwd()
    place = before / "elsewhere"
    (place / "out.partial").mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


HINDRANCES = {"small files": small_files, "elsewhere": elsewhere}


def in_directory(directory: Path, function, *args):
    """On a rank: a call with another working directory."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        return function(*args)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("hindrance", "expected"),
    [
        ("small files", r"cannot be written to out \(rank 1\): .*File too large"),
        ("elsewhere", r"model-0000\d-of-00002\.safetensors, which rank 1 has written, is not in the .* of rank 0"),
    ],
)
def test_one_rank_that_cannot_write_ends_all(ranks, tmp_path, hindrance, expected):
    original = make_model("llama", tmp_path)
    flags = ["--hf-model", str(original), *TP2]
    before = {path.name for path in tmp_path.iterdir()}
    outcomes = ranks(2)(in_directory, tmp_path, export, flags, Path("out"), (1, hindrance))
    messages = {message for message, _ in outcomes}
    assert len(messages) == 1
    (message,) = messages
    assert re.search(expected, message), message
    assert {path.name for path in tmp_path.iterdir()} - {"elsewhere"} == before
    assert ranks(2)(in_directory, tmp_path, export, flags, Path("out"))[0][0] == "", "and the next one is well"


def started_elsewhere(directory: Path, flags: list[str]) -> str:
    """On a rank: what a job is refused with whose ranks have each a working directory of their own."""
    own = directory / os.environ["RANK"]
    own.mkdir()
    return in_directory(own, refusal, flags)


def test_a_directory_that_is_not_shared_is_refused_at_the_start(ranks, tmp_path):
    original = make_model("llama", tmp_path)
    messages = ranks(2)(started_elsewhere, tmp_path, ["--hf-model", str(original), "--save-hf", "out"])
    assert len(set(messages)) == 1
    assert "--save-hf out: what rank 1 writes is not in the " in messages[0]
    assert "file system that all nodes share" in messages[0]
    assert not list(tmp_path.glob("?/*")), "found before anything is read"
