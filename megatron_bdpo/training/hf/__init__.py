"""Hugging Face models at the start and at the end of a run."""
