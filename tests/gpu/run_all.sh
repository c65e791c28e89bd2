#!/usr/bin/env bash
# All that needs a GPU:  tests/gpu/run_all.sh [python [DIR]]
# The tests, then the benchmarks, each cut off after a time of its own; twelve minutes at most. Ends in one table, and in
# DIR/gpu.json (default: a new directory), which holds every figure. What is not installed is left out.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${1:-.venv/bin/python}
results=${2:-$(mktemp -d)}
mkdir -p "$results"
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=2 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

# step NAME SECONDS COMMAND ...: its output, and a line for the table. 2 is a benchmark's refusal, which says what is missing.
step() {
    local name=$1 limit=$2 start=$SECONDS ended=0
    shift 2
    printf '\n== %s: %s\n' "$name" "$*"
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log" || ended=$?
    case $ended in
        0) ended="done" ;;
        2) [[ -e $results/$name.xml ]] && ended=failed || ended=refused ;;
        124) ended="cut off" ;;
        *) ended=failed ;;
    esac
    printf '%s,%s,%s\n' "$name" "$ended" "$((SECONDS - start))" >> "$results/steps.csv"
}

# benchmark NAME SECONDS SCRIPT [FLAG ...]
benchmark() {
    local name=$1 limit=$2 script=$3
    shift 3
    step "$name" "$limit" "$python" "benchmarks/$script" "$@" --csv "$results/$name.csv"
}

tests() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --tb=short -m gpu --junitxml "$results/$name.xml" "$@"
}

rm -f "$results/steps.csv"
if ! has_gpu; then
    echo "no GPU: every test is skipped"
    tests all 240 tests
else
    "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
    # At the same time: most of it is starting, compiling and CPU work. The benchmarks have the GPU to themselves.
    tests kernels 120 tests/gpu/test_backends.py tests/unit/model/test_attention.py tests/unit/logprobs/test_fused_linear.py \
        tests/unit/logprobs/test_softmax_passes.py &
    tests first_steps 120 tests/gpu/test_training.py -k "first_step" &
    tests training 120 tests/gpu/test_training.py tests/gpu/test_waits.py -k "not first_step" &
    # Of the families' 38 models, each a quarter of a minute, those whose layers differ most.
    has transformer_engine && tests transformer_engine 180 tests/gpu/test_te_layers.py \
        -k "add_up or adapters or gemma2 or mixtral or gpt-oss or deepseek" &
    wait
    # Ours, TRL and the bare products at the shape that TRL states its own figures for.
    trl=(); has trl && trl=(trl)
    liger=(); has liger_kernel && liger=(liger)
    benchmark loss_head 100 logprobs.py --positions 8192 --hidden 4096 --vocab 151936 --dtype bf16 --repeats 1 \
        --variants plain fused "fused, main_grad" "fused, main_grad, made again" "bare products" "${trl[@]}" "${liger[@]}"
    benchmark attention 40 attention.py
    step_of=(--dtype bf16 --heads 32 --groups 8 --vocab 128256 --lengths 400 200 --pairs-per-step 32 --trl-batch 8
        --pack 8192 --max-prompt-length 4096 --steps 8 --rounds 1)
    benchmark step_1b 180 vs_trl.py "${step_of[@]}" --hidden 2048 --layers 16 --ffn 8192 --contenders ours "${trl[@]}"
    # Layers of Llama 3 8B, as many as one GPU of 80 GB has room for with their optimizer.
    benchmark step_8b_layers 120 vs_trl.py "${step_of[@]}" --hidden 4096 --layers 8 --ffn 14336 --contenders ours
    if has transformer_engine; then
        benchmark fp8 75 fp8.py --hidden 1024 --layers 8 --heads 16 --groups 8 --ffn 2816 --vocab 32000 --steps 30 \
            --pairs-per-step 32
    fi
fi
"$python" tests/gpu/table.py "$results"
