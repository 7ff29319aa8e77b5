"""The chain: which steps there are, which of them still have to run, running them, and what came out."""
