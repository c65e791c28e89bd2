"""``torchrun -m megatron_bdpo.train FLAGS``: a preference job, from Megatron's flags and ours."""

from megatron_bdpo.training.entry import main

if __name__ == "__main__":
    main()
