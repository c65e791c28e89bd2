#!/usr/bin/env bash
# All tests that need a GPU, and a table of what came out:  tests/gpu/run_all.sh [python]
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${1:-.venv/bin/python}
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=1

"$python" -c 'import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
else:
    print("no GPU: every test is skipped")'
"$python" -m pytest -q -m gpu tests --junitxml "$results/tests.xml" "${@:2}"
code=$?
"$python" - "$results/tests.xml" << 'PYTHON'
import collections
import sys
import xml.etree.ElementTree

rows = collections.defaultdict(collections.Counter)
for case in xml.etree.ElementTree.parse(sys.argv[1]).iter("testcase"):
    row = rows[case.get("classname").removeprefix("tests.")]
    failed = case.find("failure") is not None or case.find("error") is not None
    row["failed" if failed else "skipped" if case.find("skipped") is not None else "passed"] += 1
    row["seconds"] += float(case.get("time"))
print(f"\n{'tests':<32}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
for name, row in sorted(rows.items()):
    print(f"{name:<32}{row['passed']:>8}{row['failed']:>8}{row['skipped']:>8}{row['seconds']:>9.1f}")
PYTHON
exit "$code"
