#!/usr/bin/env bash
# A new user's first hour, with the installed package alone: the commands of the quick start as they stand there, from
# pairs and a model to an aligned model that transformers loads. In an empty directory, with the programs on PATH:
#
#   play.sh QUICKSTART MAKE_MODEL       docs/quickstart.md, and make_model.py for a model that is small enough for a CPU
set -euo pipefail
quickstart=$1 make_model=$2

# Shows a command and runs it. The training run is interrupted once: the same command goes on.
megatron-bdpo() {
    printf '\n$ megatron-bdpo %s\n' "$*"
    if [ "$1" = train ]; then
        command megatron-bdpo "$@" --exit-interval 3
        printf '\n$ again\n'
        set -- "$@" --save-hf ALIGNED
    fi
    command megatron-bdpo "$@"
}

python "$make_model" MODEL pairs.jsonl
commands=$(awk '/^## / { on = /On a CPU/ } on && /^    / { print substr($0, 5) }' "$quickstart")
eval "$commands"

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
