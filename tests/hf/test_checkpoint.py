"""Broken and foreign weights end with one error that names what is wrong; rows are read, not files."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.config import read_config
from megatron_bdpo.model.hf.directory import model_directory
from megatron_bdpo.model.hf.export import split, write_file
from megatron_bdpo.model.hf.file_layout import ExportFile, Whole, in_order, index, lay_out, rounds
from megatron_bdpo.model.hf.tensors import Place, place_of
from tests.harness import jobs

CONFIG = {
    "model_type": "llama",
    "vocab_size": 1030,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NORM, GATE = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.gate_proj.weight"


def weights():
    return read_config(CONFIG).weights


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in weights().shapes().items()}


def write(directory: Path, content: dict[str, torch.Tensor], *, files: int = 1, config=CONFIG) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(content, directory / "model.safetensors")
        return directory
    names = sorted(content)
    places = {name: f"model-{index % files}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: content[name] for name in names if places[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        HuggingFaceCheckpoint.open(directory).check(weights().shapes())
    return str(caught.value)


def test_rows_and_columns(tmp_path):
    content = tensors()
    for files in (1, 3):
        checkpoint = HuggingFaceCheckpoint.open(write(tmp_path / str(files), content, files=files))
        checkpoint.check(weights().shapes())
        for name, value in content.items():
            assert torch.equal(checkpoint.rows(name, 1, 7), value[1:7])
        assert torch.equal(checkpoint.rows(GATE, 5, 9, (slice(8, 16),)), content[GATE][5:9, 8:16])
        checkpoint.close()


def test_truncated_file(tmp_path):
    file = write(tmp_path, tensors(), files=2) / "model-1.safetensors"
    for content in (file.read_bytes()[:-100], b"\x10", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(content)
        assert f"{file} is no safetensors file, or truncated: " in refused(tmp_path)


def test_missing_file_of_the_index(tmp_path):
    file = write(tmp_path, tensors(), files=2) / "model-1.safetensors"
    file.unlink()
    assert f"{file} cannot be read: No such file" in refused(tmp_path)


def test_missing_index(tmp_path):
    (write(tmp_path, tensors(), files=2) / "model.safetensors.index.json").unlink()
    message = refused(tmp_path)
    assert "has neither model.safetensors nor model.safetensors.index.json" in message
    assert "There are model-0.safetensors, model-1.safetensors." in message


def test_tensors_that_are_not_the_architectures(tmp_path):
    content = tensors()
    del content[NORM]
    content["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    content[GATE] = torch.zeros(47, 32)
    content["lm_head.weight"] = content["lm_head.weight"].to(torch.int8)
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old releases wrote it
    lines = refused(write(tmp_path, content)).splitlines()
    assert lines[1:] == [
        f"  missing: {NORM}",
        "  unexpected: model.layers.0.self_attn.q_proj.bias",
        f"  of another shape: {GATE} [47, 32] instead of [48, 32]",
        "  of a data type that holds no weights: lm_head.weight I8",
    ]


def test_output_layer_beside_tied_embeddings_is_refused(tmp_path):
    """transformers itself ties them or does not, depending on the release and on whether they are equal."""
    tied = read_config(CONFIG | {"tie_word_embeddings": True}).weights
    with pytest.raises(UserError, match=r"unexpected: lm_head\.weight"):
        HuggingFaceCheckpoint.open(write(tmp_path, tensors())).check(tied.shapes())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("EMPTY", "has no config.json"),
        ("./nowhere", "there is no directory ./nowhere, nor can this be a name on the hub"),
        ("FILE", "there is no directory"),
    ],
)
def test_no_model_there(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    name = {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file")}.get(name, name)
    with pytest.raises(UserError, match=re.escape(message)):
        model_directory(name)


# Writing -------------------------------------------------------------------------------------------------------------


def wholes(holders: Callable[[str], tuple[int, ...]] = lambda key: (0,)) -> list[Whole]:
    """The Megatron tensors of the model on some ranks, with two rows that pad the vocabulary."""
    found, sizes = [], weights().sizes
    for key in weights().rules:
        for indices in [(layer,) for layer in range(sizes.layers)] if ".layers." in key else [()]:
            place = Place(key, indices)
            rows = sum(part.stop - part.start for part in weights().parts(place)) + 2 * ("embedding" in key)
            columns = weights().shapes()[weights().parts(place)[0].name][1:]
            found.append(Whole(place, (rows, *columns), torch.float32, holders(key)))
    return found


def size(file: ExportFile) -> int:
    """Of its tensors as they are in the index, by the shapes of the architecture."""
    names = {part.name for whole in file.wholes for part in weights().parts(whole.place)}
    return sum(4 * math.prod(weights().shapes()[name]) for name in names)


def test_files_of_bounded_size():
    files = lay_out(reversed(wholes()), weights(), file_bytes=40_000)
    assert [file.name for file in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, 5)]
    assert [len(file.wholes) for file in files if size(file) > 40_000] == [1, 1], "embedding and output layer"
    order = [in_order(whole.place) for file in files for whole in file.wholes]
    assert order == sorted(order) and len(order) == len(wholes())
    found = index(files, weights())
    assert found["weight_map"].keys() == weights().shapes().keys()
    assert found["metadata"]["total_size"] == sum(map(size, files)) == sum(t.nbytes for t in tensors().values())
    assert [file.name for file in lay_out(wholes(), weights())] == ["model.safetensors"]


def test_ranks_share_what_they_hold_by_size():
    """A stage of two ranks, which split all matrices, and one of a single rank; vectors are whole on the first ones."""

    def holders(key: str) -> tuple[int, ...]:
        ranks = (2,) if key.startswith(("decoder.final_layernorm", "output_layer")) else (0, 1)
        return ranks[:1] if "norm" in key else ranks

    files = lay_out(wholes(holders), weights(), file_bytes=40_000)
    assert all(file.writer in whole.holders for file in files for whole in file.wholes)
    held: dict[int, int] = Counter()
    for file in files:
        held[file.writer] += size(file)
    row = 4 * 32
    of_layers = 2 * row * (64 + 32 + 2 * 48) + 2 * 4 * 48 * 32
    assert held == {0: 1030 * row + 4 * row, 1: of_layers, 2: 1030 * row + row}, "the embedding outweighs the layers"
    written = rounds(files)
    assert [[file.writer for file in each] for each in written] == [[0, 1, 2], [0, 1, 2]]
    assert sorted(file.name for each in written for file in each) == [file.name for file in files]


def test_seventy_billion_parameters_on_32_ranks():
    """TP8 x PP4: what each of the ranks writes, and what goes from rank to rank, in bytes of bf16."""
    config = {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    }  # fmt: skip
    of_70b = read_config(config).weights
    found = []
    for key in of_70b.rules:
        for indices in [(layer,) for layer in range(80)] if ".layers." in key else [()]:
            first = 8 * (indices[0] // 20 if indices else 0 if "embedding" in key else 3)
            shapes = of_70b.shapes()
            parts = of_70b.parts(Place(key, indices))
            shape = (sum(part.stop - part.start for part in parts), *shapes[parts[0].name][1:])
            ranks = (first,) if len(shape) == 1 else tuple(range(first, first + 8))
            found.append(Whole(Place(key, indices), shape, torch.bfloat16, ranks))
    files = lay_out(found, of_70b)
    held: dict[int, int] = Counter()
    sent = 0
    for file in files:
        for whole in file.wholes:
            held[file.writer] += 2 * math.prod(whole.shape)
            sent += 2 * math.prod(whole.shape) * (len(whole.holders) - 1) // len(whole.holders)
    assert sum(held.values()) == index(files, of_70b)["metadata"]["total_size"] == 141_107_412_992
    assert (len(held), len(files), len(rounds(files))) == (32, 96, 3)
    assert max(held.values()) / 1e9 == pytest.approx(4.7, abs=0.1)
    assert sent / 1e9 == pytest.approx(123.5, abs=0.1), "none of it by way of one rank"


def test_tensors_that_are_not_there_are_named_before_anything_is_written():
    norm = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    found = [whole for whole in wholes() if whole.place != Place(norm, (1,))]
    with pytest.raises(UserError, match=re.escape(f"the source has no weights for {NORM}")):
        lay_out(found, weights())
    short = [dataclasses.replace(whole, shape=(10, *whole.shape[1:])) for whole in wholes()]
    with pytest.raises(UserError, match=r"word_embeddings\.weight has 10 rows, those of its Hugging Face family 1030"):
        lay_out(short, weights())


def test_what_the_disk_refuses_is_the_operating_systems_error(tmp_path):
    """safetensors has an exception of its own for it."""
    with pytest.raises(OSError, match="No such file or directory"):
        write_file(tmp_path / "nowhere" / "model.safetensors", tensors())


def test_split_undoes_grouping():
    """Queries of group 0, its key, its value, then those of group 1."""
    sizes = weights().sizes
    whole = torch.arange(sizes.queries + 2 * sizes.keys)[:, None] * torch.ones(1, sizes.hidden)
    place = place_of("decoder.layers.self_attention.linear_qkv.weight", (1,))
    parts = {name.split(".")[-2]: value[:, 0].tolist() for name, value in split(place, whole, weights()).items()}
    assert parts["q_proj"] == [*range(16), *range(32, 48)]
    assert parts["k_proj"] == [*range(16, 24), *range(48, 56)]
    assert parts["v_proj"] == [*range(24, 32), *range(56, 64)]


def test_places_of_stacked_and_of_numbered_layers():
    stacked = place_of("decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 1))
    assert stacked == place_of("decoder.layers.3.mlp.experts.experts.1.linear_fc1.weight", ())
    assert stacked.indices == (3, 1)


# Through the whole job: every rank ends with the same message ------------------------------------------------------


def refusals(cases: dict[str, list[str]]) -> dict[str, str]:
    """The UserErrors that this rank's runs end with."""
    found = {}
    for name, flags in cases.items():
        try:
            jobs.train(flags, pair_cache_dir=flags[-1], max_pairs=8)
            found[name] = "no error"
        except UserError as error:
            found[name] = str(error)
    return found


def test_every_rank_ends_with_the_message(ranks, tmp_path):
    good, missing, broken = tmp_path / "good", tmp_path / "missing", tmp_path / "broken"
    write(good, tensors())
    write(missing, {name: value for name, value in tensors().items() if name != NORM})
    write(broken, tensors(), config=CONFIG | {"logit_scale": 2})
    small = tmp_path / "small"
    few = CONFIG | {"vocab_size": 64}
    write(small, {name: value[:64] if len(value) == 1030 else value for name, value in tensors().items()}, config=few)
    layout, cache = ["--tensor-model-parallel-size", "2"], ["--pair-cache-dir", str(tmp_path)]
    start = {"good": good, "missing": missing, "broken": broken, "small": small}
    contradiction = ["--hidden-size", "48", "--normalization", "LayerNorm", "--num-layers", "2"]
    cases = {
        "missing tensor": ["--hf-model", str(start["missing"]), *layout, *cache],
        "a key of another architecture": ["--hf-model", str(start["broken"]), *layout, *cache],
        "contradiction": ["--hf-model", str(start["good"]), *contradiction, *layout, *cache],
        "small vocabulary": ["--hf-model", str(start["small"]), *layout, *cache],
        "two starts": ["--hf-model", str(good), "--pretrained-checkpoint", str(good), *cache],
        "save without a model": ["--save-hf", str(tmp_path / "out"), *cache],
    }
    expected = {
        "missing tensor": f"missing: {NORM}",
        "a key of another architecture": "config.json: logit_scale is 2, which models of the family 'llama' cannot",
        "contradiction": "--hidden-size (given 48, but 32 expected)",
        "small vocabulary": "has 1024 entries, the model",
        "two starts": "both say where the policy starts",
        "save without a model": "--save-hf writes the configuration of --hf-model",
    }
    found = ranks(2)(refusals, cases)
    assert found[0] == found[1]
    for name, message in expected.items():
        assert message in found[0][name], name
    assert "--normalization (given 'LayerNorm', but 'RMSNorm' expected)" in found[0]["contradiction"], (
        "a default, given"
    )
    assert "--num-layers" not in found[0]["contradiction"], "given, and right"


@pytest.mark.parametrize("weights", [True, False])
def test_weights_are_fetched_only_where_they_are_wanted(monkeypatch, weights):
    """The hub itself is out of reach here; what is asked of it is not."""
    asked: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool, revision: str | None) -> str:
        asked.extend(allow_patterns)
        return "somewhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert str(model_directory("org/model", weights=weights)) == "somewhere"
    assert ("*.safetensors" in asked) == weights
    assert "*.json" in asked
