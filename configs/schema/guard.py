"""Schema of the guard: which optimizer steps are not taken, and when a run goes back to a save."""

from __future__ import annotations

from pydantic import Field

from configs.schema.common import PositiveInt, Strict


class Guard(Strict):
    """Steps whose numbers have gone bad are skipped; after several in a row the run goes back to its newest healthy save, once."""

    enabled: bool = Field(default=True, description="Skip optimizer steps whose loss or gradient is not a finite number, or is a spike; false takes every step.")
    spike_deviations: float | None = Field(
        default=10.0, gt=0,
        description="A spike: the logarithm of a step's loss or gradient norm is this many robust standard deviations above the median of the last 64 good "
        "steps (4.5 times the median at the least; judged from the 33rd good step on). null skips only what is not finite.",
    )  # fmt: skip
    max_skipped_in_row: PositiveInt = Field(
        default=5,
        description="Optimizer steps skipped in a row after which the run goes back to its newest healthy save; the second time in a row it stops. Verdicts are read, and "
        "so many skipped steps noticed, when something is logged, evaluated or saved next, even if they are over by then (PPO: at the end of the iteration): up to "
        "train.log_every steps later. SFT, reward and DPO that notice it at their very end publish what they learned, if at least half of all steps were taken.",
    )
