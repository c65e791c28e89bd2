"""Broken and foreign weights end with one error that names what is wrong; rows are read, not files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.config import read_config
from megatron_bdpo.model.hf.export import SafetensorsWriter, new_directory, split
from megatron_bdpo.model.hf.hub import model_directory
from megatron_bdpo.model.hf.tensors import place_of
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
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is truncated or damaged: {size - 100} bytes instead of {size}" in refused(tmp_path)
    file.write_bytes(b"\x10")
    assert f"{file} is no safetensors file" in refused(tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"{file} is truncated, or no safetensors file" in refused(tmp_path)


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


def test_files_of_bounded_size(tmp_path):
    content = tensors()
    writer = SafetensorsWriter(tmp_path, file_bytes=40_000)
    for name, value in content.items():
        writer.add({name: value})
    writer.finish(weights().shapes())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    largest_tensor = max(value.nbytes for value in content.values())
    assert max(sizes.values()) < max(40_000, largest_tensor) + 4096
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = HuggingFaceCheckpoint.open(tmp_path)
    checkpoint.check(weights().shapes())
    for name, value in content.items():
        assert torch.equal(checkpoint.rows(name, 0, len(value)), value)


def test_an_unfinished_export_has_no_name(tmp_path):
    target = tmp_path / "model"
    with (
        pytest.raises(UserError, match=re.escape(f"the source has no weights for {NORM}")),
        new_directory(target) as at,
    ):
        writer = SafetensorsWriter(at)
        writer.add({name: value for name, value in tensors().items() if name != NORM})
        writer.finish(weights().shapes())
    assert list(tmp_path.iterdir()) == []


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
        "unknown key": ["--hf-model", str(start["broken"]), *layout, *cache],
        "contradiction": ["--hf-model", str(start["good"]), *contradiction, *layout, *cache],
        "small vocabulary": ["--hf-model", str(start["small"]), *layout, *cache],
        "two starts": ["--hf-model", str(good), "--pretrained-checkpoint", str(good), *cache],
        "save without a model": ["--save-hf", str(tmp_path / "out"), *cache],
    }
    expected = {
        "missing tensor": f"missing: {NORM}",
        "unknown key": "the key 'logit_scale' (2) is not known",
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

    def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.extend(allow_patterns)
        return "somewhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert str(model_directory("org/model", weights=weights)) == "somewhere"
    assert ("*.safetensors" in asked) == weights
    assert "*.json" in asked
