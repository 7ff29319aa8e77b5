"""`align sft --find-lr`: the process that tests learning rates, and how its result is shown."""
