"""``python -m megatron_bdpo``: the program ``megatron-bdpo``, where its script is not on the PATH."""

from megatron_bdpo.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
