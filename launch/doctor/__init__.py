"""`align doctor`: what a machine has, what stands in the way of training on it, and what to do about that."""
