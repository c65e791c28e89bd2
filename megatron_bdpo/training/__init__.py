"""Wiring to ``megatron.training``: arguments, data, forward step, reference, progress."""
