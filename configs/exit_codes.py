"""Exit codes that mean the same everywhere: in the stages, the `align` command, SLURM scripts and Kubernetes manifests."""

from __future__ import annotations

DONE = 0
USER_ERROR = 2
"""Something the user can mend; `error: …` says what. Starting the same again leads to the same error."""
REQUEUE = 85
"""Stopped because it was told to (a time limit, a preemption), not because anything is wrong: start the same command again and it
continues from its newest save. 85 is what Linux calls ERESTART; no shell, launcher or signal (128 + n) uses it for anything else."""
HANG = 110
"""Ended by its watchdog: no process had moved for as long as the config allows; `error: rank …` says which and where. Starting the same
again continues from the newest save, and helps where a machine or a network was at fault, so it is to be tried a few times only. 110 is
what Linux calls ETIMEDOUT."""
