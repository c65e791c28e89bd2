"""PKU-SafeRLHF to preference pairs for a safety alignment run: 10,000 + 10,000 queries, and a held-out part.

    python examples/paper/prepare.py --source PKU-Alignment/PKU-SafeRLHF:train --output data/paper
    python examples/paper/prepare.py --source train.jsonl --output data/paper --unsafe 20000 --safe 0

A row of that data set has a prompt, two responses, whether each of them is safe, which is the better and which the
safer one. Two kinds of rows make pairs:

    unsafe  one response is safe and one is not: the safe one is chosen, the unsafe one rejected
    safe    both are safe: the better one is chosen

Rows with two unsafe responses have no answer to learn and are left out, as are those whose two responses are equal or
empty. Every query is used once: of several rows with the same prompt, one is drawn. The draw depends on the seed and on
the rows, not on their order. Held-out queries are never trained on.

Written are OUTPUT/train.jsonl and OUTPUT/heldout.jsonl: chat messages, for the model's own chat template, with the
labels chosen_safe and rejected_safe that the loss `safedpo` reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_bdpo.data.sources import parse_sources, read_rows
from megatron_bdpo.errors import UserError

UNSAFE, SAFE = "unsafe", "safe"

#: What a row has to have, and of which type.
COLUMNS: dict[str, type] = {
    "prompt": str,
    "response_0": str,
    "response_1": str,
    "is_response_0_safe": bool,
    "is_response_1_safe": bool,
    "better_response_id": int,
}

Pair = dict[str, Any]


def classify(row: dict[str, Any]) -> tuple[str, Pair | None]:
    """The kind of a row's pair, and the pair; for a row that makes none the reason, and None.

    Raises:
        UserError: a column is missing, or of another type.
    """
    for name, required in COLUMNS.items():
        if not isinstance(row.get(name), required):
            raise UserError(f"the column {name} should be {required.__name__}, found {row.get(name)!r:.60}")
    responses = [row["response_0"].strip(), row["response_1"].strip()]
    is_safe = [row["is_response_0_safe"], row["is_response_1_safe"]]
    if not all(responses) or not row["prompt"].strip():
        return "an empty text", None
    if responses[0] == responses[1]:
        return "equal responses", None
    if not any(is_safe):
        return "both responses unsafe", None
    kind = SAFE if all(is_safe) else UNSAFE
    chosen = row["better_response_id"] if kind == SAFE else is_safe.index(True)
    if chosen not in (0, 1):
        raise UserError(f"better_response_id should be 0 or 1, found {chosen}")
    return kind, {
        "prompt": [{"role": "user", "content": row["prompt"].strip()}],
        "chosen": [{"role": "assistant", "content": responses[chosen]}],
        "rejected": [{"role": "assistant", "content": responses[1 - chosen]}],
        "chosen_safe": is_safe[chosen],
        "rejected_safe": is_safe[1 - chosen],
    }


def read_pairs(sources: Iterable[str]) -> tuple[list[tuple[str, Pair]], Counter[str]]:
    """All pairs with their kinds, and what the rows were.

    Raises:
        UserError: naming source and row.
    """
    pairs: list[tuple[str, Pair]] = []
    counts: Counter[str] = Counter()
    for source in parse_sources(sources):
        for number, row in read_rows(source):
            if not isinstance(row, dict):
                raise UserError(f"{source.path}, row {number}: {row.detail}")
            try:
                kind, pair = classify(row)
            except UserError as error:
                raise UserError(f"{source.path}, row {number}: {error}") from error
            counts[kind] += 1
            if pair is not None:
                pairs.append((kind, pair))
    return pairs, counts


def draw(pairs: list[tuple[str, Pair]], wanted: dict[str, tuple[int, int]], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: as many of each kind as wanted, each query once, in an order that means nothing.

    Args:
        wanted: kind -> (training pairs, held-out pairs).

    Raises:
        UserError: there are fewer.
    """
    ordered = sorted(pairs, key=lambda entry: _rank(entry[1], seed))
    taken: dict[str, list[Pair]] = {kind: [] for kind in wanted}
    seen: set[str] = set()
    # The rarer kind first, or a query that has rows of both kinds could be spent on the common one.
    for kind in sorted(wanted, key=lambda kind: sum(found == kind for found, _ in pairs)):
        for found, pair in ordered:
            query = pair["prompt"][0]["content"]
            if found == kind and query not in seen and len(taken[kind]) < sum(wanted[kind]):
                seen.add(query)
                taken[kind].append(pair)
    for kind, counts in wanted.items():
        if len(taken[kind]) < sum(counts):
            raise UserError(
                f"{sum(counts)} {kind} queries are wanted ({counts[0]} to train on, {counts[1]} held out), but there "
                f"are {len(taken[kind])} that are not used already. Ask for fewer: --{kind}, --heldout-{kind}."
            )
    train = [pair for kind, (count, _) in wanted.items() for pair in taken[kind][:count]]
    held_out = [pair for kind, (count, _) in wanted.items() for pair in taken[kind][count:]]
    return sorted(train, key=lambda pair: _rank(pair, seed)), sorted(held_out, key=lambda pair: _rank(pair, seed))


def _rank(pair: Pair, seed: int) -> bytes:
    """A place that depends on the pair's content and the seed alone."""
    return hashlib.sha256(json.dumps([seed, pair], sort_keys=True).encode()).digest()


def write(path: Path, pairs: list[Pair]) -> None:
    """One JSON object per line; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), "utf-8")
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", nargs="+", required=True, metavar="PATH", help="files, directories, or NAME[:SPLIT] on the hub")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--unsafe", type=int, default=10_000, help="queries with a safe and an unsafe response (10000)")
    add("--safe", type=int, default=10_000, help="queries with two safe responses (10000)")
    add("--heldout-unsafe", type=int, default=500, help="(500)")
    add("--heldout-safe", type=int, default=500, help="(500)")
    add("--seed", type=int, default=0, help="of the draw (0)")
    options = parser.parse_args(argv)
    wanted = {UNSAFE: (options.unsafe, options.heldout_unsafe), SAFE: (options.safe, options.heldout_safe)}
    try:
        pairs, counts = read_pairs(options.source)
        train, held_out = draw(pairs, wanted, options.seed)
        write(options.output / "train.jsonl", train)
        write(options.output / "heldout.jsonl", held_out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{sum(counts.values())} rows: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    print(f"{options.output}: {len(train)} pairs to train on, {len(held_out)} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
