"""A preference job one of whose ranks fails, for a launcher to run: ``faulty_job.py FAULT RANK FLAGS...``.

raises      the rank raises in the middle of the second step, where others wait for it
bad data    it alone reads a pair that it cannot use (a disk that answers one machine with nonsense)
dies        it is killed
reads       it reads what never comes
holds       it does the same, and no other thread of Python's runs meanwhile
tokenizes   it reads what never comes as it tokenizes, while the others wait for its tokens
freezes     it is stopped as by a debugger: not even a thread in C runs
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    from megatron_bdpo.platform.boot import prepare_platform

    fault, rank, *flags = sys.argv[1:]
    prepare_platform()
    from megatron_bdpo.data import tokenization
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training import batches, entry

    if fault == "tokenizes":
        tokenization.PairTokenizer.encode = lambda *_: os.read(os.pipe()[0], 1)  # type: ignore[method-assign]
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
    packs = 0
    original = batches.PackMaker.__call__

    def make(self: batches.PackMaker, ids: batches.IntArray, length: int) -> batches.PackBatch:
        nonlocal packs
        packs += 1
        if os.environ["RANK"] == rank and packs == 3:
            Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
            if fault == "raises":
                raise RuntimeError("THE FIRST CAUSE")
            if fault == "bad data":
                raise UserError("pairs.jsonl, line 17: THE FIRST CAUSE")
            if fault == "reads":
                os.read(os.pipe()[0], 1)
            while fault == "holds":  # signals interrupt it
                ctypes.PyDLL(None).pause()
            os.kill(os.getpid(), signal.SIGSTOP if fault == "freezes" else signal.SIGKILL)
        return original(self, ids, length)

    batches.PackMaker.__call__ = make  # type: ignore[method-assign]
    entry.main(flags)


if __name__ == "__main__":
    main()
