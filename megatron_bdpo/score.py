"""``torchrun -m megatron_bdpo.score FLAGS``: score a training job's pairs ahead of it, with the job's own flags."""

from megatron_bdpo.training.entry import score_main

if __name__ == "__main__":
    score_main()
