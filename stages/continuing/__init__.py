"""Training on from a checkpoint with new data: the same adapter over the same base, and what got better and worse."""
