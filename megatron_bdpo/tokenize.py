"""``torchrun -m megatron_bdpo.tokenize FLAGS``: tokenize a training job's pairs ahead of it, on any number of nodes."""

from megatron_bdpo.training.entry import tokenize_main

if __name__ == "__main__":
    tokenize_main()
