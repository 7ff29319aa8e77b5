"""Several adapters of one base: which there are, one base held for all of them, and new ones composed of them."""
