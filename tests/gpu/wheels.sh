#!/usr/bin/env bash
# What a GPU machine without a network lacks, fetched where there is one:  tests/gpu/wheels.sh [DIR [PACKAGE ...]]
# For a machine with CUDA's PyTorch, Python 3.12 and x86-64 Linux. Its own packages stay as they are: only those named are
# fetched, without what they depend on. There, from the repository:
#   python3 -m pip install --no-index --no-deps --target SITE DIR/*.whl && PYTHONPATH=SITE tests/gpu/run_all.sh python3
# Transformer Engine's wheels are hundreds of megabytes; the tests and benchmarks that need it say so and are left out.
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
directory=${1:-.wheels}
packages=(megatron-core datasets multiprocess dill trl liger-kernel)
[[ $# -gt 1 ]] && packages=("${@:2}")
python=${PYTHON:-.venv/bin/python}
platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --constraint tools/constraints.txt --dest "$directory" \
    "${packages[@]}"
du -sh "$directory"
