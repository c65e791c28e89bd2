"""Other files that a user gives: models, recipes, and what an earlier run has left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.reliability.fuzz.draw import Draw
from tests.reliability.fuzz.registry import Check, own_directory, target

CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 100,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 100, "use_sliding_window": True,
        "sliding_window": 16, "max_window_layers": 2, "tie_word_embeddings": True,
    },
    {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 100, "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 100, "num_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
)  # fmt: skip


@target("config.json of Hugging Face models", share=0.14)
def configs() -> Check:
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.model.hf.checkpoint import read_json
    from megatron_bdpo.model.hf.config import read_config

    path = own_directory() / "config.json"

    def check(data: bytes) -> bool:
        draw = Draw(data)
        config = draw.changed(draw.pick(CONFIGS))
        try:
            if draw.chance(4):
                path.write_bytes(draw.damaged(json.dumps(config).encode()))
                config = read_json(path)
            architecture = read_config(config if isinstance(config, dict) else {})
        except UserError as error:
            error.as_text()
            return False
        sizes = architecture.weights.sizes
        if sizes.layers * max(1, sizes.experts) <= 64:
            architecture.weights.shapes()
        whole = (sizes.layers, sizes.hidden, sizes.ffn, sizes.heads, sizes.groups, sizes.head, sizes.vocab)
        assert all(type(size) is int and size >= 1 for size in whole), sizes
        kinds = (int, float, str, list, tuple, type(None))
        assert all(isinstance(value, kinds) for value in architecture.arguments.values())
        return True

    return check


@target("headers and indexes of safetensors files", share=0.04)
def headers() -> Check:
    import struct

    from megatron_bdpo.errors import UserError
    from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint

    single, sharded = own_directory(), own_directory()
    good = {"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    index = {"metadata": {"total_size": 24}, "weight_map": {"a.weight": "part.safetensors"}}

    def check(data: bytes) -> bool:
        draw = Draw(data)
        header = json.dumps(draw.changed(good)).encode()
        length = len(header) + draw.pick((0, 0, 0, 0, 0, 1, -1, 2**40, 2**63))
        content = struct.pack("<Q", length) + header + bytes(draw.pick((24, 24, 24, 0, 25)))
        directory = sharded if draw.chance(3) else single
        if directory is sharded:
            (directory / "model.safetensors.index.json").write_bytes(
                draw.damaged(json.dumps(draw.changed(index)).encode())
            )
        name = "part.safetensors" if directory is sharded else "model.safetensors"
        (directory / name).write_bytes(draw.damaged(content))
        try:
            checkpoint = HuggingFaceCheckpoint.open(directory)
            checkpoint.check({"a.weight": (2, 3)})
            checkpoint.rows("a.weight", 0, 2)
            checkpoint.close()
        except UserError as error:
            error.as_text()
            return False
        return True

    return check


@target("recipes in YAML", share=0.02)
def recipes() -> Check:
    import argparse

    import yaml

    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.flags import arguments, recipe

    path = own_directory() / "recipe.yaml"
    good = {"pair-data": ["2", "a.jsonl", "b"], "lr": "5e-7", "eval-share": None, "pack-pairs": False, "beta": "0.1"}

    def refuse(message: str) -> None:
        raise UserError(message)

    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(allow_abbrev=False)
        made.error = refuse  # type: ignore[assignment]
        made.add_argument("--lr", type=float)
        made.add_argument("--bf16", action="store_true")
        arguments.add_preference_arguments(made)
        return made

    flags = parser()

    def check(data: bytes) -> bool:
        draw = Draw(data)
        changed = draw.changed(good)
        text = (
            yaml.safe_dump(changed) if draw.chance(2) else "".join(
                f"{draw.pick(('', '', '!!bool ', '!!python/name:os.system ', '&a ', '? '))}{key}: {draw.text(3)}\n"
                for key in [*good, draw.text(2)]
            )
        )  # fmt: skip
        path.write_bytes(draw.damaged(text.encode("utf-8", "surrogatepass")))
        try:
            tokens = recipe.expand(flags, ["--recipe", text if draw.chance(3) else str(path)])
            known, unknown = flags.parse_known_args(tokens)
            assert not unknown
        except UserError as error:
            error.as_text()
            return False
        given = recipe.given(parser(), tokens)
        kept = recipe.to_yaml(given)
        path.write_text(kept, "utf-8")
        again = recipe.expand(flags, ["--recipe", str(path)])
        found = vars(flags.parse_known_args(again)[0])
        same = {name: value for name, value in vars(known).items() if value == value}  # NaN differs from itself
        assert {name: found[name] for name in same} == same, "the kept recipe says something else"
        return True

    return check


@contextlib.contextmanager
def _damaged(files: Mapping[Path, bytes], path: Path, content: bytes) -> Iterator[None]:
    """One file has another content inside the block. After it all are as they were, for the next input."""
    path.write_bytes(content)
    try:
        yield
    finally:
        for each, before in files.items():
            each.write_bytes(before)


@target("token stores", share=0.02)
def stores() -> Check:
    import numpy as np

    from megatron_bdpo.data.pool import PairPool, by_source
    from megatron_bdpo.data.prompt_kinds import PromptKind
    from megatron_bdpo.data.records import PreferenceRecord
    from megatron_bdpo.data.row_report import DataReport
    from megatron_bdpo.data.sources import SourceSpec
    from megatron_bdpo.data.store import PairStore, PairStoreWriter, StoreInfo
    from megatron_bdpo.data.tokenization import PairTokens
    from megatron_bdpo.data.tokenized_rows import RowsBuilder
    from megatron_bdpo.errors import UserError

    directory = own_directory()
    parts = [np.arange(n, dtype=np.int32) for n in (3, 2, 4)]
    report = DataReport(["a.jsonl"], [4], [4])
    with PairStoreWriter(directory) as writer:
        rows = RowsBuilder()
        for row in (1, 3, 3):  # the latter is a group
            scored = np.array([True, False, True, True])
            rows.append(PairTokens(*parts, None, scored), row, PreferenceRecord("p", "a", "b", True), parts[1] + row)
        labelled = PreferenceRecord("p", "a", "a", label=True)
        rows.append(PairTokens(parts[0], parts[1], parts[1]), 4, labelled)
        writer.extend(rows.finish(), 0)
        report.set_lengths(writer.lengths, writer.starts, writer.label)
        writer.finish(StoreInfo("0" * 64, {"data": ["x"]}, [1], (SourceSpec("a.jsonl"),), report))
    files = {path: path.read_bytes() for path in sorted(directory.iterdir())}
    meta = directory / "meta.json"
    good = json.loads(files[meta])

    def check(data: bytes) -> bool:
        draw = Draw(data)
        damaged = draw.pick(list(files))
        content = draw.damaged(files[damaged])
        if damaged is meta or draw.chance(2):
            damaged, content = meta, draw.damaged(json.dumps(draw.changed(good)).encode())
        try:
            with _damaged(files, damaged, content):
                store = PairStore.open(directory)
                store.verify()
                pool = PairPool([store])
        except UserError as error:
            error.as_text()
            return False
        store.report.format()
        assert len(store) == 4 and len(pool.grouping) == 3 and store.pair(2).rejected.tolist() == parts[2].tolist()
        assert store.label.tolist() == [-1, -1, -1, 1] and len(pool.group(2).group.answers) == 1
        pool.describe(1), pool.group(1, PromptKind.EMPTY), pool.sizes(share_prompts=True)
        assert store.report.malformed_share >= 0 and sum(len(ids) for ids, _ in by_source(pool, 0, np.arange(3))) == 3
        return True

    return check


@target("reference scores", share=0.02)
def scores() -> Check:
    import numpy as np

    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.reference.cache import ScoreCache, open_scores

    directory = own_directory() / "scores"
    identity = {"weights": "abc", "pairs": [1, 2]}
    cache = ScoreCache.open(directory, identity, {"sources": ["a.jsonl"]})
    arrays = {
        "conditional": np.array([[-1.0, -2.0], [-3.0, -4.0]]), "unconditional": np.full((2, 2), np.nan),
        "tokens": np.ones((2, 2), np.int32), "source": np.zeros(2, np.int16), "row": np.arange(1, 3, dtype=np.int64),
    }  # fmt: skip
    cache.add(np.arange(2), arrays, 2)
    cache.finish(2, {"conditional": 2}, {"ranks": 1})
    files = {path: path.read_bytes() for path in sorted(directory.iterdir())}
    manifest = directory / "manifest.json"
    good = json.loads(files[manifest])

    def check(data: bytes) -> bool:
        draw = Draw(data)
        damaged = draw.pick(list(files))
        content = draw.damaged(files[damaged])
        if damaged == manifest:
            content = draw.damaged(json.dumps(draw.changed(good)).encode())
        try:
            with _damaged(files, damaged, content):
                found = open_scores(directory, unfinished=draw.chance(2))
                assert found.conditional.tolist() == arrays["conditional"].tolist() or damaged == manifest
                ScoreCache.open(directory, identity, {}).finish(2, {"conditional": 2}, {})
        except UserError as error:
            error.as_text()
            return False
        return True

    return check
