"""What reference scores and a run's metrics say, as pictures, a page and text. No Megatron, no GPU."""
