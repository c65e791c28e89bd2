"""What a layout costs, by arithmetic alone: no Megatron, no torch, so that it answers in seconds on any machine."""
