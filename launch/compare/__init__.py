"""`align sft --compare`: every technique of SFT on one model and its data, measured."""
