r"""Align a language model on preference pairs with Balanced DPO, through Megatron's own trainer.

Without arguments this trains a tiny Llama-style model on the pairs in examples/data, on the CPU if there is no GPU:

    python examples/pretrain_bdpo.py
    torchrun --nproc-per-node 4 examples/pretrain_bdpo.py \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

With --pair-data or --hf-model it is your job: Megatron's flags as for pretrain_gpt.py, and ours (--help, "preference
pairs").
"""

import sys
from pathlib import Path

from megatron_bdpo.training.entry import main

DATA = Path(__file__).parent / "data"

TINY_LLAMA = {
    "num_layers": 4,
    "hidden_size": 96,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}

TINY_JOB = {
    "pair_data": [str(DATA / "train.jsonl")],
    "eval_pair_data": [str(DATA / "heldout.jsonl")],
    "eval_at_start": True,
    "tokenizer_type": "SentencePieceTokenizer",
    "tokenizer_model": str(DATA / "tokenizer.model"),
    "seq_length": 512,
    "pairs_per_step": 32,
    "train_iters": 40,
    "lr": 1e-3,
    "lr_warmup_fraction": 0.1,
    "lr_decay_style": "cosine",
}

if __name__ == "__main__":
    is_own_job = any(argument.split("=")[0] in ("--pair-data", "--hf-model") for argument in sys.argv)
    run = main(defaults={} if is_own_job else TINY_LLAMA | TINY_JOB)
    run.print_table()
