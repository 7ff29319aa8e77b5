"""Proximal policy optimisation for language models."""
