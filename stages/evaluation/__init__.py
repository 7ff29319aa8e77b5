"""Evaluation of checkpoints on held-out prompts: scores, win rates, KL to a reference, length, and what was forgotten."""
