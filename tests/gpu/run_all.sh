#!/usr/bin/env bash
# All that needs a GPU, and a table of what came out:  tests/gpu/run_all.sh [python [pytest's flags]]
# The tests, then the benchmarks at sizes of a minute each. Eight minutes at most: what is not done by then is cut off.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${1:-.venv/bin/python}
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
code=0

has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

# benchmark SECONDS NAME [FLAG ...]: its output, and a line for the table. 2 is a refusal, which says what is missing.
benchmark() {
    local limit=$1 name=$2 start=$SECONDS ended=0
    shift 2
    printf '\n== benchmarks/%s %s\n' "$name" "$*"
    timeout "$limit" "$python" "benchmarks/$name" "$@" || ended=$?
    case $ended in
        0) ended="done" ;;
        2) ended=refused ;;
        124) ended="cut off" code=1 ;;
        *) ended=failed code=1 ;;
    esac
    printf '%-32s%24s%9s\n' "benchmarks/$name" "$ended" "$((SECONDS - start))" >> "$results/benchmarks"
}

if has_gpu; then
    "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
else
    echo "no GPU: every test is skipped"
fi
timeout 240 "$python" -m pytest -q -m gpu tests --junitxml "$results/tests.xml" "${@:2}" || code=$?

if has_gpu; then
    wide=(--hidden 1024 --layers 8 --heads 16 --groups 8 --ffn 2816 --vocab 32000)
    benchmark 45 logprobs.py --repeats 1 --variants plain fused
    benchmark 60 vs_trl.py --dtype bf16 "${wide[@]}" --steps 8 --rounds 1 --contenders ours trl
    benchmark 45 sharing.py --dtype bf16 "${wide[@]}" --rounds 1 --shares 50
    benchmark 75 fp8.py "${wide[@]}" --steps 30 --pairs-per-step 32
fi

"$python" - "$results/tests.xml" << 'PYTHON'
import collections
import pathlib
import sys
import xml.etree.ElementTree

path = pathlib.Path(sys.argv[1])
if not path.exists():
    sys.exit("the tests were cut off")
rows = collections.defaultdict(collections.Counter)
for case in xml.etree.ElementTree.parse(path).iter("testcase"):
    row = rows[case.get("classname").removeprefix("tests.")]
    failed = case.find("failure") is not None or case.find("error") is not None
    row["failed" if failed else "skipped" if case.find("skipped") is not None else "passed"] += 1
    row["seconds"] += float(case.get("time"))
print(f"\n{'tests':<32}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
for name, row in sorted(rows.items()):
    print(f"{name:<32}{row['passed']:>8}{row['failed']:>8}{row['skipped']:>8}{row['seconds']:>9.1f}")
PYTHON
[[ -f $results/benchmarks ]] && cat "$results/benchmarks"
exit "$code"
