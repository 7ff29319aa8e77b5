"""What an SFT run measures on held-out rows beside its loss: generated completions against the rows' own, labels, your own metrics, and the final test."""
