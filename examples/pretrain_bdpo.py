r"""Align a language model on preference pairs with Balanced DPO, through Megatron's own trainer.

Without a job of yours this runs recipes/tiny.yaml: a tiny Llama-style model learns the pairs in examples/data, on the
CPU if there is no GPU.

    python examples/pretrain_bdpo.py
    torchrun --nproc-per-node 4 examples/pretrain_bdpo.py \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

With --recipe, --pair-data or --hf-model it is your job: Megatron's flags as for pretrain_gpt.py, and ours (--help,
"preference pairs").
"""

import sys
from pathlib import Path

from megatron_bdpo.training.entry import main

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"

if __name__ == "__main__":
    flags = sys.argv[1:]
    is_own_job = any(flag.split("=")[0] in ("--recipe", "--pair-data", "--hf-model") for flag in flags)
    main(flags if is_own_job else ["--recipe", str(TINY), *flags])
