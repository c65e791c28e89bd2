"""Configurations of other preference trainers as recipes of ours: a table per trainer, and what reads it. No torch."""
