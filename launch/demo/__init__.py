"""The built-in demonstration: a small customer-support world, its gold rubric, and its base model."""
