"""Answers of the policy to the user's prompts while it is trained: ``--eval-prompts``."""
