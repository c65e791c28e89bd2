"""What the fuzzer has found: files of a user's that once ended in a traceback."""

from __future__ import annotations

import json
import re
import struct

import pytest

from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.data.records import parse_row
from megatron_bdpo.data.sources import SourceSpec, check_sources, read_rows
from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import Each, Maybe, is_count, schema_error
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.config import read_config
from megatron_bdpo.training.reference.cache import KINDS, ScoreCache, open_scores
from tests.reliability.fuzz.files import CONFIGS

LLAMA = CONFIGS[0]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"\ud800": 1}, id="half a surrogate in a column's name"),
        pytest.param({"\x1b[2J": 1}, id="a terminal's command"),
        pytest.param({"chosen": "a", "rejected": [], "x" * 10_000: 1}, id="a long name"),
        pytest.param({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_safe": ["x" * 10_000]}, id="a long label"),
        pytest.param(
            {"prompt": [{"role": "\udfff", "content": "a"}], "chosen": "a", "rejected": "b"}, id="half a role"
        ),
    ],
)
def test_what_a_row_brings_into_a_message_can_be_printed(row):
    with pytest.raises(RowProblem) as caught:
        parse_row(row)
    assert caught.value.detail.isprintable() and len(caught.value.detail) < 1000


@pytest.mark.parametrize(
    "path", ["~nobody-of-this-name/pairs.jsonl", "x" * 5000 + ".jsonl", "a\0.jsonl", "~\0/a.jsonl"]
)
def test_names_that_cannot_be_looked_for(path):
    with pytest.raises(UserError, match=r"cannot be looked for|no such file"):
        check_sources([SourceSpec(path)])


@pytest.mark.parametrize("depth", [900, 1100, 100_000])
def test_nesting_is_no_matter(tmp_path, depth):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b", "x": ' + "[" * depth + "]" * depth + "}\n")
    ((_, row),) = read_rows(SourceSpec(str(path)))
    assert isinstance(row, RowProblem) or parse_row(row).chosen == "a"


CONFIG_CASES = {
    "layers that fill the memory": ({"num_hidden_layers": 10**12}, "num_hidden_layers must be a positive whole number"),
    "true for a number": ({"hidden_size": True}, "hidden_size must be a positive whole number, not True"),
    "no feed-forward size": ({"intermediate_size": None}, "intermediate_size must be a positive whole number"),
    "a word": ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, not 'small'"),
    "not finite": ({"rope_theta": float("inf")}, "rope_theta must be a positive number, not inf"),
    "a list": ({"rope_scaling": [1]}, "rope_scaling must be an object, not [1]"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number, not None"),
    "heads that do not divide": ({"num_attention_heads": 5}, "hidden_size 64 is no multiple of num_attention_heads 5"),
    "groups that do not divide": (
        {"num_key_value_heads": 3},
        "num_attention_heads 4 is no multiple of num_key_value_heads 3",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), CONFIG_CASES.values(), ids=CONFIG_CASES)
def test_values_of_a_config_that_their_keys_cannot_hold(changes, expected):
    with pytest.raises(UserError, match=re.escape(f"config.json: {expected}")):
        read_config(LLAMA | changes)


def test_more_experts_asked_for_than_there_are():
    with pytest.raises(UserError, match="num_experts_per_tok must lie between 1 and 4, not 9"):
        read_config(CONFIGS[2] | {"num_experts_per_tok": 9})


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ([], "invalid type: sequence"),
        ({"a": []}, "invalid"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "missing field `data_offsets`"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "integer `-1`"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "expected 2 elements"),
        ({"a": {"dtype": {}, "shape": [1], "data_offsets": [0, 4]}}, "invalid"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "invalid shape, data type, or offset"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "not fully covered"),
    ],
)
def test_headers_of_safetensors_files(tmp_path, header, expected):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(UserError, match=rf"is no safetensors file, or truncated: .*{re.escape(expected)}"):
        HuggingFaceCheckpoint.open(tmp_path)


def test_an_index_that_names_no_files(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": {}}}')
    with pytest.raises(UserError, match=r"names no files: weight_map\.a is \{\}"):
        HuggingFaceCheckpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"complete": {"pairs": 1}}, "complete.scored is missing"),
        ({"identity": None}, "identity is None"),
        ({"jobs": 7}, "jobs is 7"),
        (
            {"complete": {"pairs": 2**32, "scored": dict.fromkeys(KINDS, 0)}},
            "it speaks of 4294967296 pairs, and the files",
        ),
    ],
)
def test_manifests_of_scores(tmp_path, changes, expected):
    cache = ScoreCache.open(tmp_path, {}, {})
    (tmp_path / "manifest.json").write_text(json.dumps(cache.manifest | changes))
    with pytest.raises(UserError, match=rf"manifest.json is damaged: {expected}.*Delete the directory"):
        open_scores(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16: !!bool maybe\n", "line 1, bf16: 'maybe' is neither true nor false"),
        ("? &a [*a]\n: 1\n", "line 1: a key has to be a flag"),
        ("lr: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_recipes(tmp_path, text, expected):
    import argparse

    from megatron_bdpo.training.flags import recipe

    parser = argparse.ArgumentParser()
    parser.add_argument("--bf16", action="store_true")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(expected)):
        recipe.expand(parser, ["--recipe", str(path)])
    for name in ("a\0", "\ud800", "~nobody-of-this-name/x"):
        with pytest.raises(UserError, match="cannot be read"):
            recipe.expand(parser, ["--recipe", name])


def test_a_value_that_looks_like_a_flag(tmp_path):
    """What has been given as one value is kept as a list, and read again."""
    import argparse

    from megatron_bdpo.training.flags import recipe

    parser = argparse.ArgumentParser()
    parser.add_argument("--pair-data", nargs="+")
    path = tmp_path / "recipe.yaml"
    for text in ("pair-data: -.inf\n", "pair-data: [-.inf]\n"):
        path.write_text(text)
        assert parser.parse_args(recipe.expand(parser, ["--recipe", str(path)])).pair_data == ["-.inf"]
    path.write_text("pair-data: [a, -x-y, b]")
    with pytest.raises(UserError, match="'-x-y' looks like a flag and cannot be one of several values"):
        recipe.expand(parser, ["--recipe", str(path)])


def test_shapes():
    shape = {"a": [is_count], "b": Maybe(str), "c": Each({"d": int})}
    good = {"a": [1, 2], "b": None, "c": {"x": {"d": 1}}, "more": 0}
    assert schema_error(good, shape) == ""
    for change, expected in (
        ({"a": [1, -1]}, "a.1 is -1"),
        ({"a": [True]}, "a.0 is True"),
        ({"b": 3}, "b is 3"),
        ({"c": {"x": {}}}, "c.x.d is missing"),
        ({"c": []}, "c is []"),
    ):
        assert schema_error(good | change, shape) == expected
    assert schema_error([], shape) == "it is []"
