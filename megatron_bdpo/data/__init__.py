"""Preference rows to tokens to packs: everything between a file on disk and the tensors of a microbatch."""
