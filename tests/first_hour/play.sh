#!/usr/bin/env bash
# A new user's first hour, with the installed package alone: from pairs and a model to an aligned model that
# transformers loads. In an empty directory, with the environment's programs on PATH:
#
#   play.sh MAKE_MODEL          MAKE_MODEL: tests/first_hour/make_model.py, for a model that is small enough for a CPU
set -euo pipefail
make_model=$1

step() { printf '\n$ %s\n' "$*"; "$@"; }

python "$make_model" MODEL pairs.jsonl

step megatron-bdpo --version
step megatron-bdpo data check pairs.jsonl
step megatron-bdpo data stats pairs.jsonl --hf-model MODEL

job=(--hf-model MODEL --pair-data pairs.jsonl --seq-length 256 --reference-cache SCORES)
training=(--pairs-per-step 8 --train-iters 6 --lr 1e-2 --save RUN --load RUN --save-interval 3)

step megatron-bdpo score "${job[@]}"
step megatron-bdpo train "${job[@]}" "${training[@]}" --exit-interval 3
step megatron-bdpo train "${job[@]}" "${training[@]}" --save-hf ALIGNED
step megatron-bdpo report RUN --output REPORT
step megatron-bdpo convert export --checkpoint RUN --hf-model MODEL --output EXPORTED

python - <<'EOF'
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("EXPORTED")
model = AutoModelForCausalLM.from_pretrained("EXPORTED", dtype=torch.float32)
prompt = tokenizer("Question: what is 3 plus 3?\nAnswer:", return_tensors="pt", return_token_type_ids=False)
generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
assert generated.shape[1] > prompt["input_ids"].shape[1]
print("generated:", repr(tokenizer.decode(generated[0])))
start, aligned, exported = (load_file(f"{name}/model.safetensors") for name in ("MODEL", "ALIGNED", "EXPORTED"))
assert all(torch.equal(aligned[name], exported[name]) for name in aligned), "the two exports differ"
assert any(not torch.equal(start[name].float(), exported[name].float()) for name in start), "nothing was learned"
EOF
