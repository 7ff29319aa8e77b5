"""What `make reliability` runs: one module an area, each with its CASES; the figures go to RELIABILITY.md."""
