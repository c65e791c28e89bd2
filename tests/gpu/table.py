"""What ``run_all.sh`` has left in a directory, as one table and as ``gpu.json``."""

from __future__ import annotations

import collections
import csv
import json
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

#: Of a benchmark's columns, those that the table shows: name -> (heading, format).
SHOWN = {
    "milliseconds": ("ms", "{:.2f}"),
    "seconds": ("ms", "{:.1f}"),
    "step_seconds": ("s/step", "{:.3f}"),
    "pairs_per_second": ("pairs/s", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak": ("GiB", "{:.2f}"),
}


def main(results: Path) -> int:
    """Returns an exit code: 1 if a test or a step has failed, was cut off or has left nothing."""
    steps = list(csv.reader((results / "steps.csv").open()))
    tests = {path.stem: outcomes(path) for path in sorted(results.glob("*.xml"))}
    benchmarks = {path.stem: list(csv.DictReader(path.open())) for path in sorted(results.glob("*.csv"))}
    benchmarks.pop("steps", None)
    whole = {"machine": machine(), "steps": steps, "tests": tests, "benchmarks": benchmarks}
    (results / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(f"\n{json.dumps(whole['machine'])}")
    for name, ended, seconds in steps:
        print(f"{name:<24}{ended:>10}{seconds:>6} s  {counted(tests.get(name, {}))}")
        for record in benchmarks.get(name, []):
            print(f"    {record.get('contender') or record.get('variant') or '':<32}{figures(record)}")
    print(f"all of it: {results / 'gpu.json'}")
    failed = [name for name, ended, _ in steps if ended in ("failed", "cut off")]
    return int(bool(failed) or any(test["failed"] or not test["passed"] + test["skipped"] for test in tests.values()))


def machine() -> dict[str, str]:
    from megatron_bdpo.platform.installation import libraries
    from megatron_bdpo.platform.versions import installed_versions

    return {**libraries(), **installed_versions()}


def outcomes(path: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and the names of what has failed."""
    found: dict[str, Any] = collections.Counter({"passed": 0, "failed": 0, "skipped": 0})
    names = []
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        found["failed" if failed else "skipped" if case.find("skipped") is not None else "passed"] += 1
        if failed:
            names.append(f"{case.get('classname')}::{case.get('name')}")
    return {**found, "failures": names}


def counted(test: dict[str, Any]) -> str:
    parts = [f"{test[name]} {name}" for name in ("passed", "failed", "skipped") if test.get(name)]
    return ", ".join(parts + test.get("failures", []))


def figures(record: dict[str, str]) -> str:
    shown = []
    for name, (heading, form) in SHOWN.items():
        if record.get(name):
            value = float(record[name])
            value = value / 2**30 if name == "peak" else value * 1e3 if name == "seconds" else value
            shown.append(f"{form.format(value)} {heading}")
    return ", ".join(shown)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
