"""The program ``megatron-bdpo``: a sub-command per module."""
