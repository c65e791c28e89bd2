"""What a run says: on the terminal, in files, to TensorBoard and W&B."""
