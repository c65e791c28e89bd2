r"""Try inputs by the million on what reads users' data and plans their packs.

    python -m tests.reliability.fuzz --inputs 1000000
    python -m tests.reliability.fuzz --replay runs/fuzz/rows-1f0c.bin

Every target gets its share of the inputs. Only our own errors may come out of bad input, and of good input only what
satisfies the invariants. Prints a table, and exits with 1 if something else came out; the input is then kept.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import time
from pathlib import Path

from tests.reliability.fuzz.engines import ENGINES, Outcome
from tests.reliability.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="default: atheris where it is installed")
    parser.add_argument("--target", choices=tuple(TARGETS), nargs="+", default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where inputs that fail are kept")
    parser.add_argument("--replay", type=Path, help="try one kept input again, in this process")
    arguments = parser.parse_args()
    if arguments.replay:
        name = arguments.replay.name.split("-")[0]
        TARGETS[name].make()(arguments.replay.read_bytes())
        return
    engine = arguments.engine or ("atheris" if importlib.util.find_spec("atheris") else "hypothesis")
    shares = {name: TARGETS[name].share for name in arguments.target}
    start, outcomes = time.perf_counter(), {}
    print(f"{engine}, seed {arguments.seed}\n{HEADER}", flush=True)
    for name, share in shares.items():
        inputs = max(1, round(arguments.inputs * share / sum(shares.values())))
        outcomes[name] = ENGINES[engine](name, inputs, arguments.seed)
        print(line(name, outcomes[name]), flush=True)
        if outcomes[name].crash is not None:
            print(keep(arguments.keep, name, outcomes[name]), flush=True)
    failed = sum(outcome.crash is not None for outcome in outcomes.values())
    total = sum(outcome.inputs for outcome in outcomes.values())
    print(f"{total:,} inputs, {failed} targets failed, {time.perf_counter() - start:.0f} s")
    sys.exit(failed > 0)


HEADER = f"{'target':<11}{'inputs':>10}{'accepted':>10}{'edges':>7}{'seconds':>9}  "


def line(name: str, outcome: Outcome) -> str:
    """A target's line of the table."""
    edges = "" if outcome.coverage is None else str(outcome.coverage)
    verdict = "ok" if outcome.crash is None else "FAILED"
    share = f"{outcome.accepted / max(1, outcome.inputs):.1%}"
    return f"{name:<11}{outcome.inputs:>10,}{share:>10}{edges:>7}{outcome.seconds:>9.1f}  {verdict}"


def keep(directory: Path, name: str, outcome: Outcome) -> str:
    """Keep a failing input; says where, and how it failed."""
    assert outcome.crash is not None
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{hashlib.sha256(outcome.crash).hexdigest()[:8]}.bin"
    path.write_bytes(outcome.crash)
    shown = outcome.trace[max(0, outcome.trace.find("Traceback")) :]
    return f"{shown[:2500]}\nkept: {path} (try it again with --replay)"


if __name__ == "__main__":
    main()
