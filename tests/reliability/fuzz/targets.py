"""What is fuzzed: each target takes bytes, makes an input of them, and checks what comes out.

Only a ``UserError`` or a row that is counted may come out of bad input; that is every target's first rule. Checks are
made by functions, so that a fuzzer can instrument what they import.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.fuzz.draw import Draw

#: True: the input was good, and what came of it right. False: it was refused as it should be.
type Check = Callable[[bytes], bool]

#: Files of a target lie in memory where the machine has such a place.
_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Target:
    """Something to fuzz."""

    name: str
    what: str
    """In a few words."""
    make: Callable[[], Check]
    share: float
    """Of all inputs: cheap targets get more of them."""


TARGETS: dict[str, Target] = {}


def target(what: str, share: float) -> Callable[[Callable[[], Check]], Callable[[], Check]]:
    """Registers a function that makes a check."""

    def register(make: Callable[[], Check]) -> Callable[[], Check]:
        TARGETS[make.__name__] = Target(make.__name__, what, make, share)
        return make

    return register


def _directory() -> Path:
    """A directory of this process's own."""
    holder = tempfile.TemporaryDirectory(prefix="fuzz", dir=_MEMORY if _MEMORY.is_dir() else None)
    _HELD.append(holder)
    return Path(holder.name)


_HELD: list[tempfile.TemporaryDirectory[str]] = []

# Records -------------------------------------------------------------------------------------------------------------


@target("a row of any types to a record", share=0.40)
def rows() -> Check:
    from megatron_bdpo.data.records import RowProblem, parse_row
    from tests.reliability.fuzz.invariants import check_record

    def check(data: bytes) -> bool:
        try:
            record = parse_row(draw_row(Draw(data)))
        except RowProblem as problem:
            assert len(problem.detail) < 2000, "a message nobody can read"
            str(problem).encode()  # it is printed
            return False
        check_record(record)
        return True

    return check


def draw_row(draw: Draw) -> dict[str, Any]:
    """Something like a row: mostly of one of the right forms, with values between right and absurd."""
    form = draw.byte() % 8

    def message() -> Any:
        if draw.chance(6):
            return draw.json(2)
        content = draw.text() if not draw.chance(6) else draw.json(1)
        return {"role": draw.pick(("user", "assistant", "assistant", "system", draw.text(1))), "content": content}

    def value() -> Any:
        match draw.byte() % 8 if draw.chance(8) else form:
            case 0:
                return draw.json(3)
            case 1 | 2 | 3:
                return draw.text() + draw.pick(("", "yes", "no"))
            case 4:
                return "\n\nHuman: " + draw.text(2) + "\n\nAssistant:" + draw.text(3)
            case 5:
                return [message()]
            case 6 if "prompt" in row:
                return [{"role": "assistant", "content": draw.text(2) + draw.pick(("yes", "no"))}]
            case _:
                return [message() for _ in range(draw.integer(1, 3))]

    row: dict[str, Any] = {}
    shared = [{"role": "user", "content": draw.text(2)}] if draw.chance(4) else []
    for column in ("prompt", "chosen", "rejected"):
        if not draw.chance(8):
            row[column] = value()
            if shared and isinstance(row[column], list):
                row[column] = shared + row[column]
    for column in ("chosen_safe", "rejected_safe"):
        if draw.chance(4):
            row[column] = draw.pick((True, False, 0, 1, None, draw.json(1)))
    if draw.chance(8):
        row[draw.text()] = draw.json(1)
    return row


@target("files of JSON lines, plain and gzip", share=0.03)
def lines() -> Check:
    from megatron_bdpo.data.check import check_rows
    from megatron_bdpo.data.sources import SourceSpec
    from megatron_bdpo.errors import UserError

    plain, packed = (_directory() / name for name in ("rows.jsonl", "rows.jsonl.gz"))

    def check(data: bytes) -> bool:
        draw = Draw(data)
        path = packed if draw.chance(3) else plain
        content = b"".join(_line(draw) for _ in range(draw.integer(0, 4)))
        content = draw.pick((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"[")) + draw.damaged(content)
        path.write_bytes(draw.damaged(gzip.compress(content, 1)) if path is packed else content)
        try:
            report = check_rows((SourceSpec(str(path)),), lambda where, problem: str(problem).encode())
        except UserError as error:
            error.as_text().encode()
            return False
        assert sum(report.rows_read) == sum(report.pairs_kept) + report.dropped_rows
        report.format().encode()
        json.dumps(report.to_json())
        return not report.dropped_rows

    return check


def _line(draw: Draw) -> bytes:
    match draw.byte() % 8:
        case 0:
            line = json.dumps(draw.json(3)).encode()
        case 1:
            line = draw.raw(60)
        case 2:
            depth = draw.pick((10, 900, 1100, 100_000))
            line = (
                b'{"prompt": "p", "chosen_safe": ' + b"[" * depth + b"]" * depth + b', "chosen": "a", "rejected": "b"}'
            )
        case 3:
            line = b'{"chosen_safe": ' + b"7" * draw.pick((10, 4299, 4301, 50_000)) + b"}"
        case _:
            line = json.dumps(draw_row(draw), ensure_ascii=draw.chance(2)).encode("utf-8", "surrogatepass")
    return line + draw.pick((b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"\x00\n", b""))


@target("what --pair-data names", share=0.03)
def sources() -> Check:
    from megatron_bdpo.data.sources import check_sources, describe_row, parse_sources
    from megatron_bdpo.errors import UserError

    place = _directory()
    (place / "a.jsonl").write_text("{}\n")

    def check(data: bytes) -> bool:
        draw = Draw(data)
        words = [
            draw.pick((str(place / "a.jsonl"), str(place), draw.text(), f"{place}/{draw.text()}", str(draw.number())))
            for _ in range(draw.integer(0, 4))
        ]
        try:
            specs = parse_sources(words)
            assert all(math.isfinite(spec.weight) and spec.weight > 0 for spec in specs)
            check_sources(specs)
        except UserError as error:
            error.as_text()
            return False
        for spec in specs:
            describe_row(spec, 1)
        return True

    return check


@target("texts to tokens with SentencePiece, and their limits", share=0.10)
def tokens() -> Check:
    import sentencepiece

    from megatron_bdpo.data.records import PreferenceRecord, RowProblem
    from megatron_bdpo.data.tokenization import PairTokenizer
    from tests.harness.jobs import DATA

    class Tokenizer:
        """As Megatron wraps the library, without Megatron."""

        library = "sentencepiece"
        chat_template = None

        def __init__(self) -> None:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))
            self.bos, self.eod = self.model.bos_id(), self.model.eos_id()

        def tokenize(self, text: str) -> list[int]:
            return self.model.encode_as_ids(text)  # type: ignore[no-any-return]

    tokenizer = Tokenizer()
    pairs = PairTokenizer(tokenizer)  # type: ignore[arg-type]

    def check(data: bytes) -> bool:
        draw = Draw(data)
        texts = [draw.text(6).encode("utf-8", "replace").decode() for _ in range(3)]
        limits = [draw.pick((None, 1, 2, 5)) for _ in range(2)]
        try:
            whole = pairs.encode(PreferenceRecord(*texts))
            cut = pairs.truncate(whole, *limits)
        except RowProblem:
            return False
        start = whole.prompt[:1].tolist()
        assert start == [tokenizer.bos], "the start token, once"
        for text, answer in zip(texts[1:], whole[1:], strict=True):
            assert answer[-1] == tokenizer.eod and answer.dtype == "int32"
            joint = [*whole.prompt[1:].tolist(), *answer.tolist()]
            ids = tokenizer.tokenize(texts[0] + text)
            ids = ids[1:] if ids[:1] == start else ids
            assert joint in (ids, [*ids, tokenizer.eod])
        for limit, before, after in zip((limits[0], limits[1], limits[1]), whole, cut, strict=True):
            assert 1 <= len(after) == min(len(before), limit or len(before))
        assert cut.chosen.tolist() == whole.chosen[: len(cut.chosen)].tolist() != cut.rejected.tolist()
        return True

    return check


# Packs and plans -----------------------------------------------------------------------------------------------------


@target("pairs to packs, and these to context-parallel parts", share=0.06)
def packs() -> Check:
    import numpy as np

    from megatron_bdpo.data.layout import PairGroup, group_tokens, lay_out
    from tests.reliability.fuzz.invariants import check_pack, check_parts

    def check(data: bytes) -> bool:
        draw = Draw(data)
        groups, first = [], 1
        for _ in range(draw.integer(0, 3)):
            lengths = [draw.pick((1, 1, 2, 3, 4, 7)) for _ in range(3)]
            ids = np.arange(first, first + sum(lengths), dtype=np.int32)
            groups.append(PairGroup(draw.integer(0, 10**6), *np.split(ids, np.cumsum(lengths)[:2])))
            first += len(ids)
        shared = not draw.chance(3)
        lengths_of = np.array([[len(g.prompt), len(g.chosen), len(g.rejected)] for g in groups]).reshape(-1, 3)
        used = int(group_tokens(lengths_of, share_prompts=shared).sum())
        ranks = draw.integer(1, 4)
        unit = ranks * draw.pick((1, 2, 4, 8))
        length = max(1, -(-(used + draw.integer(0, 9)) // unit)) * unit
        pack = lay_out(groups, length, share_prompts=shared)
        check_pack(pack, groups, length, shared=shared)
        check_parts(pack, ranks)
        if used:
            with contextlib.suppress(ValueError):
                lay_out(groups, used - 1, share_prompts=shared)
                raise AssertionError("more than fits")
        return True

    return check


@target("pairs, weights and settings to step plans", share=0.04)
def plans() -> Check:
    import numpy as np

    from megatron_bdpo.data.plan import PlanSettings, epoch_pairs, plan_steps
    from megatron_bdpo.errors import UserError
    from tests.reliability.fuzz.invariants import check_plan, check_same_steps, check_visits, steps_of_whole_epochs

    def check(data: bytes) -> bool:
        draw = Draw(data)
        count = draw.integer(1, 20)
        spread = draw.pick((1, 8, 60))
        sizes = np.array([3 + draw.integer(0, spread) for _ in range(count)], np.int64)
        pools = _pools(draw, count)
        multiple = draw.pick((1, 8, 16))
        longest = int(sizes.max())
        limit = multiple * (-(-longest // multiple) * draw.integer(1, 3) + draw.integer(0, 2) - draw.chance(16))

        def settings() -> PlanSettings:
            return PlanSettings(
                pairs_per_step=per_step,
                data_parallel=draw.integer(1, 4),
                max_pack_length=limit,
                microbatch_multiple=draw.integer(1, 3),
                length_multiple=multiple,
                one_length=draw.chance(3),
                seed=draw.integer(0, 3),
                pack_pairs=not draw.chance(8),
            )

        per_step = draw.integer(1, 8)
        try:
            chosen = settings()
            steps = steps_of_whole_epochs(pools, per_step, most=24) if epoch_pairs(pools) >= per_step else None
            whole, steps = steps is not None, steps or draw.integer(1, 12)
            plan = plan_steps(sizes, chosen, steps, pools)
        except UserError:
            return False
        check_plan(plan, sizes, chosen, steps)
        if whole:
            check_visits(plan, pools)
        with contextlib.suppress(UserError):
            other = PlanSettings(**{**vars(settings()), "seed": chosen.seed})
            check_same_steps(plan, sizes, chosen, pools, draw.integer(1, steps), other)
        return True

    return check


def _pools(draw: Draw, count: int) -> list[tuple[Any, float]]:
    """All or some of the pairs in one to three sources, with weights."""
    import numpy as np

    cuts = sorted(draw.integer(0, count) for _ in range(draw.integer(1, 3)))
    parts = np.split(np.arange(count), cuts)
    return [(part, draw.pick((1.0, 1.0, 2.0, 0.5, 1.5, 0.01, 3.2))) for part in parts if len(part) or draw.chance(4)]


@target("pairs to the fewest packs, and to even ones", share=0.10)
def packings() -> Check:
    import numpy as np

    from megatron_bdpo.data.packing import pack_all, pack_evenly
    from megatron_bdpo.data.pool import hold_out
    from megatron_bdpo.errors import UserError

    def check(data: bytes) -> bool:
        draw = Draw(data)
        sizes = np.array([draw.integer(1, 64) for _ in range(draw.integer(0, 24))], np.int64)
        ids = np.arange(len(sizes)) * 3 + 5
        unit, multiple = draw.pick((1, 8)), draw.integer(1, 5)
        limit = unit * -(-draw.integer(64, 200) // unit)
        size_of = dict(zip(ids.tolist(), sizes.tolist(), strict=True))
        tight = pack_all(ids, sizes, limit, multiple)
        even, length = pack_evenly(ids, sizes, limit, multiple, unit)
        assert length <= limit and length % unit == 0
        for packs, most in ((tight, limit), (even, length)):
            assert len(packs) == len(tight) and len(packs) % multiple == 0
            assert sorted(np.concatenate([np.zeros(0, int), *packs]).tolist()) == ids.tolist()
            assert all(sum(size_of[i] for i in pack.tolist()) <= most for pack in packs)
        assert (len(tight) - multiple) * limit < 2 * max(1, sizes.sum()), "half of the packs' room is wasted"
        with contextlib.suppress(UserError):
            train, held_out = hold_out(ids, draw.pick((0.0, 0.1, 0.5, 0.99, 1.0, -1.0, math.nan)), draw.byte())
            assert sorted([*train.tolist(), *held_out.tolist()]) == ids.tolist()
        return True

    return check


# Files that a user gives ---------------------------------------------------------------------------------------------

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

    path = _directory() / "config.json"

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

    single, sharded = _directory(), _directory()
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

    path = _directory() / "recipe.yaml"
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


@target("token stores", share=0.02)
def stores() -> Check:
    import numpy as np

    from megatron_bdpo.data.pool import PairPool
    from megatron_bdpo.data.records import PreferenceRecord
    from megatron_bdpo.data.report import DataReport
    from megatron_bdpo.data.sources import SourceSpec
    from megatron_bdpo.data.store import PairStore, PairStoreWriter, StoreInfo
    from megatron_bdpo.data.tokenization import PairTokens
    from megatron_bdpo.errors import UserError

    directory = _directory()
    parts = [np.arange(n, dtype=np.int32) for n in (3, 2, 4)]
    report = DataReport(["a.jsonl"], [3], [2])
    with PairStoreWriter(directory) as writer:
        for row in (1, 3):
            writer.append(PairTokens(*parts), 0, row, PreferenceRecord("p", "a", "b", True))
        report.set_lengths(writer.lengths)
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
        damaged.write_bytes(content)
        try:
            store = PairStore.open(directory)
            store.verify()
            pool = PairPool([store])
        except UserError as error:
            error.as_text()
            return False
        finally:
            damaged.write_bytes(files[damaged])
        store.report.format()
        assert len(store) == 2 and store.pair(1).rejected.tolist() == parts[2].tolist()
        pool.describe(1), pool.group(1, unconditional=True), pool.sizes(share_prompts=True)
        assert store.report.malformed_share >= 0 and sum(len(ids) for ids, _ in pool.pools(0, np.arange(2))) == 2
        return True

    return check


@target("reference scores", share=0.02)
def scores() -> Check:
    import numpy as np

    from megatron_bdpo.data.scores import ScoreCache, open_scores
    from megatron_bdpo.errors import UserError

    directory = _directory() / "scores"
    identity = {"weights": "abc", "pairs": [1, 2]}
    cache = ScoreCache.open(directory, identity, {"sources": ["a.jsonl"]}, shard_pairs=2)
    arrays = {
        "conditional": np.array([[-1.0, -2.0], [-3.0, -4.0]]), "unconditional": np.full((2, 2), np.nan),
        "tokens": np.ones((2, 2), np.int32), "source": np.zeros(2, np.int16), "row": np.arange(1, 3, dtype=np.int64),
    }  # fmt: skip
    cache.add(0, arrays)
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
        damaged.write_bytes(content)
        try:
            found = open_scores(directory, unfinished=draw.chance(2))
            assert found.conditional.tolist() == arrays["conditional"].tolist() or damaged == manifest
            ScoreCache.open(directory, identity, {}).finish(2, {"conditional": 2}, {})
        except UserError as error:
            error.as_text()
            return False
        finally:
            damaged.write_bytes(files[damaged])
        return True

    return check
