"""From what --pair-data names to the tokens of pairs."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

from tests.reliability.fuzz.draw import Draw
from tests.reliability.fuzz.registry import Check, own_directory, target


@target("a row of any types to a record", share=0.40)
def rows() -> Check:
    from megatron_bdpo.data.problems import RowProblem
    from megatron_bdpo.data.records import parse_row
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
    labelled = draw.chance(6)
    for column in ("prompt", "completion") if labelled else ("prompt", "chosen", "rejected"):
        if not draw.chance(8):
            row[column] = value()
            if shared and isinstance(row[column], list):
                row[column] = shared + row[column]
    for column in ("label",) if labelled else ("chosen_safe", "rejected_safe"):
        if labelled or draw.chance(4):
            row[column] = draw.pick((True, False, 0, 1, None, draw.json(1)))
    if draw.chance(8):
        row[draw.text()] = draw.json(1)
    return row


@target("files of JSON lines, plain and gzip", share=0.03)
def lines() -> Check:
    from megatron_bdpo.data.check import check_rows
    from megatron_bdpo.data.sources import SourceSpec
    from megatron_bdpo.errors import UserError

    plain, packed = (own_directory() / name for name in ("rows.jsonl", "rows.jsonl.gz"))

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

    place = own_directory()
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

    from megatron_bdpo.data.problems import RowProblem
    from megatron_bdpo.data.records import PreferenceRecord
    from megatron_bdpo.data.tokenization import PairTokenizer
    from megatron_bdpo.data.truncation import truncate
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
            cut = truncate(whole, *limits, pairs.start.tokens)
        except RowProblem:
            return False
        start = whole.prompt[:1].tolist()
        assert start == [tokenizer.bos], "the start token, once"
        for text, answer in zip(texts[1:], whole.parts[1:], strict=True):
            assert answer[-1] == tokenizer.eod and answer.dtype == "int32"
            joint = [*whole.prompt[1:].tolist(), *answer.tolist()]
            ids = tokenizer.tokenize(texts[0] + text)
            ids = ids[1:] if ids[:1] == start else ids
            assert joint in (ids, [*ids, tokenizer.eod])
        for limit, before, after in zip((limits[0], limits[1], limits[1]), whole.parts, cut.parts, strict=True):
            assert 1 <= len(after) == min(len(before), limit or len(before))
        assert cut.chosen.tolist() == whole.chosen[: len(cut.chosen)].tolist() != cut.rejected.tolist()
        return True

    return check
