"""Values out of a fuzzer's bytes: the same bytes give the same values, and changed bytes give similar ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

#: Pieces of text that have made trouble somewhere: encodings, separators, markers, templates, numbers, paths.
ODD_TEXTS = (
    "", " ", "\n", "\r\n", "\t", "\x00", "\x1b[2J", "\ufeff", "\u2028", "\u200b", "\u0301", "\ud800", "\udfff", "é",
    "漢字", "🙂", "👩\u200d👩\u200d👧", "\U0010ffff", "a", "the ", "\n\nAssistant:", "\n\nHuman:", "assistant", "user",
    "system", "<s>", "</s>", "{{ x }}", "{% if", "\\", '"', "'", "{", "[", "]", "}", ":", "- ", "#", "&a ", "*a",
    "!!bool ", "!!python/object:os.system ", "null", "true", "nan", "1e999", "-0", "0x7", "../", "/", "~", "~nobody/x",
    "%s", "${HOME}", "${", "$(id)", "x" * 300,
)  # fmt: skip

ODD_NUMBERS = (
    0, 1, -1, 2, 3, 7, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64,
    10**30, 0.5, -0.0, 1.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


class Draw:
    """Reads bytes from the front; when they are spent, everything is the first or smallest."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._next = 0

    def byte(self) -> int:
        """0 ... 255."""
        if self._next >= len(self._data):
            return 0
        self._next += 1
        return self._data[self._next - 1]

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        span = high - low + 1
        value = self.byte() if span <= 256 else self.byte() << 16 | self.byte() << 8 | self.byte()
        return low + value % span

    def chance(self, one_in: int) -> bool:
        """True in one of so many cases; False when the bytes are spent."""
        return self.byte() % one_in == one_in - 1

    def pick[Item](self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.integer(0, len(items) - 1)]

    def raw(self, most: int) -> bytes:
        """Bytes as they are."""
        count = self.integer(0, most)
        part = self._data[self._next : self._next + count]
        self._next += len(part)
        return part

    def rest(self) -> bytes:
        """All bytes that are left."""
        part = self._data[self._next :]
        self._next = len(self._data)
        return part

    def text(self, pieces: int = 4) -> str:
        """A short text of odd and of plain pieces; half a surrogate pair now and then."""
        return "".join(
            self.pick(ODD_TEXTS) if self.chance(2) else chr(97 + self.byte() % 26)
            for _ in range(self.integer(0, pieces))
        )

    def number(self) -> int | float:
        """A whole number or a float, at the edges of types more often than not."""
        return self.pick(ODD_NUMBERS) if self.chance(2) else self.integer(-2, 1000)

    def json(self, depth: int = 3) -> Any:
        """Anything that JSON can hold, and the numbers that only Python's JSON can."""
        kind = self.byte() % (9 if depth else 6)
        match kind:
            case 0:
                return None
            case 1:
                return self.chance(2)
            case 2 | 3:
                return self.number()
            case 4 | 5:
                return self.text()
            case 6 | 7:
                return [self.json(depth - 1) for _ in range(self.integer(0, 3))]
            case _:
                return {self.text(2): self.json(depth - 1) for _ in range(self.integer(0, 3))}

    def changed(self, document: Any, value: Callable[[], Any] | None = None) -> Any:
        """The JSON document with some of its values, keys or items replaced, added or taken away."""
        value = value or self.json
        for _ in range(self.integer(0, 3)):
            document = self._change(document, value)
        return document

    def _change(self, node: Any, value: Callable[[], Any]) -> Any:
        if not isinstance(node, (dict, list)) or not node or self.chance(8):
            return value()
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = self.pick(keys)
        changed: Any = dict(node) if isinstance(node, dict) else list(node)
        match self.byte() % 8:
            case 0:
                del changed[key]
            case 1 if isinstance(changed, dict):
                changed[self.text(2)] = value()
            case 1:
                changed.append(value())
            case _:
                changed[key] = self._change(node[key], value)
        return changed

    def damaged(self, content: bytes) -> bytes:
        """The bytes, sometimes cut, with a few changed or with others put in."""
        if not self.chance(3):
            return content
        data = bytearray(content)
        for _ in range(self.integer(1, 3)):
            at = self.integer(0, len(data))
            match self.byte() % 4:
                case 0:
                    del data[at:]
                case 1:
                    data[at:at] = self.raw(8)
                case 2:
                    del data[at : at + self.integer(1, 8)]
                case _:
                    data[at : at + 1] = bytes([self.byte()])
        return bytes(data)
