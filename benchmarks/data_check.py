"""Time and memory of ``megatron-bdpo data check`` on large files, beside a plain load with Hugging Face's datasets.

    python benchmarks/data_check.py --rows 100000 1000000 --rounds 3

Rows are made from a seed, as those of benchmarks/tokenizing.py: chats of a few hundred tokens, 3 kB a row. Each run is
a whole process, imports included. *Load* is ``load_dataset("json", data_files=FILE)`` into an empty cache, which looks
at no pair; *parse* is ``json.loads`` of each line, the least that a reader in Python does. Peaks: resident memory.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import rounds
from benchmarks.tokenizing import write_rows

ROOT = Path(__file__).resolve().parents[1]
CHECK, LOAD, PARSE = "data check", "load", "parse"
#: What each runs, in a process of its own: argv holds the file, an empty directory, and where to leave the peak. (That
#: which the kernel tells a parent begins with the parent's own.)
SCRIPTS = {
    CHECK: "from megatron_bdpo.cli.main import main; sys.exit(main(['data', 'check', sys.argv[1]]))",
    LOAD: "import datasets; datasets.load_dataset('json', data_files=sys.argv[1], cache_dir=sys.argv[2])",
    PARSE: "import json\nwith open(sys.argv[1], 'rb') as file:\n    for line in file: json.loads(line)",
}
_LEAVE_PEAK = """import atexit, sys
atexit.register(lambda: open(sys.argv[3], "w").write(open("/proc/self/status").read()))
"""


def measure(script: str, file: Path) -> rounds.Record:
    """Of a process from its start to its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=file.parent) as directory:
        words = [sys.executable, "-c", _LEAVE_PEAK + script, str(file), directory, f"{directory}/status"]
        before, began = _used(), time.perf_counter()
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", (Path(directory) / "status").read_text(), re.M)
    return {"processor_seconds": _used() - before, "seconds": seconds, "peak_mib": int(peak) / 1024}


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    rounds.add_flags(parser, rounds=1)
    args = parser.parse_args()
    records: list[rounds.Record] = []
    print(rounds.machine(args.threads, "datasets"), "\n")
    table = []
    for count in args.rows:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "pairs.jsonl"
            write_rows(file, count)
            for number in range(args.rounds):
                for name, script in SCRIPTS.items():
                    found = measure(script, file)
                    records.append({"contender": name, "round": number, "rows": count, **found})
                    rounds.write_csv(args.csv, records)
        own = [record for record in records if record["rows"] == count]
        for name in SCRIPTS:
            used = [record["processor_seconds"] for record in own if record["contender"] == name]
            cells = [f"{count:,}", rounds.spread(used, ".1f"), f"{rounds.median(own, 'seconds', name):.1f}"]
            table.append([name, *cells, f"{rounds.median(own, 'peak_mib', name):,.0f}"])
    print(rounds.markdown(["", "rows", "processor, s", "clock, s", "peak, MiB"], table))


if __name__ == "__main__":
    main()
