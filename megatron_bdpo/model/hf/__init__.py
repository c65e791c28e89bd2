"""Hugging Face checkpoints in and out: one table of tensors per family, read in both directions."""
