"""Prompt-, prefix- and P-tuning: vectors before the text that are trained in place of weights."""
