"""The plan of a run before it starts: memory, time and disk of every stage, without loading weights."""
