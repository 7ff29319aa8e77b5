"""Techniques: which weights a stage trains, how they start, how fast each learns, and what of them is published."""
