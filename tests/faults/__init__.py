"""Ways to break a registry on purpose: kills, power cuts, storage faults, flipped bits, crowds."""
