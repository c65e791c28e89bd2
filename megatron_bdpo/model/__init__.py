"""The GPT model with pair attention, and the reference beside it."""
