"""Balanced DPO and its sister losses on NVIDIA Megatron."""

__version__ = "0.1.0.dev0"
