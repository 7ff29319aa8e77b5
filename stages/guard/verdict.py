"""Whether an optimizer step is taken: no if its loss or gradient norm is not finite or far above what the last steps had.

All of it stays on the device: a step costs some thirty operations on a few numbers and no synchronisation. What was decided is read
when something is logged or saved anyway.

A spike is judged by a robust z-score of the logarithm: how many deviations (1.4826 times the median absolute deviation, which for normal
numbers is the standard deviation) it lies above the median. Of the logarithm, because gradient norms are spread by factors: a model that
has nearly learned its rows has norms over several orders of magnitude, and a hard row is no fault. Skipping by running statistics of
loss and gradient norm, on the device: OLMo-core's SkipStepOptimizer (mean + 6 standard deviations of the last 128 steps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema.guard import Guard as GuardConfig

WINDOW = 64  # good steps that are remembered
JUDGED_AFTER = 32  # good steps before a spike is looked for: a warm-up, or a run too short to have statistics
LEAST_SPREAD = 0.15  # of the logarithm: steps that are all alike must not make a small difference a spike
MAD_TO_DEVIATION = 1.4826


class GoneBadError(UserError):
    """The numbers of a run have gone bad; it may go back to a save."""


class Verdict(NamedTuple):
    """What is decided of one optimizer step with S signals (loss, norms). All tensors on the device."""

    skip: Tensor  # [] bool
    finite: Tensor  # [S] bool
    spike: Tensor  # [S] bool
    times: Tensor  # [S] how many times the median; NaN while there is none


class Skipped(NamedTuple):
    """A step that was not taken."""

    step: int
    not_finite: tuple[str, ...]  # names of the signals that are NaN or infinite
    spikes: tuple[tuple[str, float], ...]  # (signal, how many times its median)

    def __str__(self) -> str:
        broken = [f"the {name} is not finite" for name in self.not_finite]
        return " and ".join(broken or [f"the {name} is {times:.3g} times its median" for name, times in self.spikes])


def verdict(values: Tensor, history: Tensor, seen: Tensor, deviations: float | None) -> Verdict:
    """Judge `values` [S] by `history` [S, W]: logarithms of earlier good values, NaN where there is none yet; `seen` [S] counts those.

    A value of 0 (a norm of what is not trained in this step) is neither judged nor remembered.
    """
    finite = torch.isfinite(values)
    logs = values.abs().log()
    median = history.nanmedian(dim=1).values
    spread = MAD_TO_DEVIATION * (history - median[:, None]).abs().nanmedian(dim=1).values
    if deviations is None:
        spike = torch.zeros_like(finite)
    else:
        spike = finite & (seen >= JUDGED_AFTER) & (logs - median > deviations * spread.clamp(min=LEAST_SPREAD))
    return Verdict(~finite.all() | spike.any(), finite, spike, (logs - median).exp())


class Guard:
    """The verdicts of one run. `signals` names what is judged, in the order of the values that `judge` is given.

    Every rank is given the same values, which were reduced over all of them, so all decide alike.
    """

    def __init__(self, cfg: GuardConfig, signals: Sequence[str], device: torch.device | str) -> None:
        self.cfg, self.signals = cfg, tuple(signals)
        self.history = torch.full((len(signals), WINDOW), math.nan, device=device)
        self.seen = torch.zeros(len(signals), dtype=torch.int64, device=device)
        self.slots = torch.arange(WINDOW, device=device)[None]
        self.unread: list[tuple[int, Tensor]] = []
        self.streak = 0  # steps skipped in a row, when it was last read
        self.longest = 0  # the most that were skipped in a row up to a step of the last reading: they may be over by now
        self.longest_end = 0  # the last step of those
        self.skipped = 0  # steps skipped since the run began, when it was last read

    @torch.no_grad()
    def judge(self, step: int, values: Tensor) -> Tensor:
        """Whether the step must not be taken: 1 or 0, [] float32, on the device. `values` [S]."""
        values = values.float()
        found = verdict(values, self.history, self.seen, self.cfg.spike_deviations if self.cfg.enabled else None)
        kept = ~found.skip & (values != 0)
        slot = (self.slots == (self.seen % WINDOW)[:, None]) & kept[:, None]
        self.history = torch.where(slot, values.abs().log()[:, None], self.history)
        self.seen = self.seen + kept
        skip = found.skip.float()
        self.unread.append((step, torch.cat([skip[None], found.finite.float(), found.spike.float(), found.times])))
        return skip

    def read(self) -> list[Skipped]:
        """The steps skipped since it was last called: the one place that waits for the device. Without any step since then nothing changes."""
        if not self.unread:
            return []
        found, self.longest = [], 0
        rows = torch.stack([row for _, row in self.unread]).tolist()
        for (step, _), row in zip(self.unread, rows, strict=True):
            self.streak = self.streak + 1 if row[0] else 0
            if row[0]:
                found.append(self._named(step, row[1:]))
            if self.streak > self.longest:
                self.longest, self.longest_end = self.streak, step
        self.unread.clear()
        self.skipped += len(found)
        return found

    def _named(self, step: int, row: list[float]) -> Skipped:
        count = len(self.signals)
        finite, spike, times = (row[i * count : (i + 1) * count] for i in range(3))
        return Skipped(
            step, tuple(name for name, good in zip(self.signals, finite, strict=True) if not good),
            tuple((name, times[i]) for i, name in enumerate(self.signals) if spike[i]),
        )  # fmt: skip

    def forget_streak(self) -> None:
        """Count anew: the run has gone back to a save."""
        assert not self.unread, "steps that were not read would count towards it"
        self.streak = self.longest = 0

    def state(self) -> dict[str, Any]:
        """For a save, once everything was read; floats survive JSON to the bit."""
        assert not self.unread, "verdicts that were not read would be missing from the save"
        history = [[None if math.isnan(x) else x for x in row] for row in self.history.tolist()]
        return {"signals": list(self.signals), "history": history, "seen": self.seen.tolist(), "streak": self.streak, "skipped": self.skipped}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from what `state` gave; of other signals only the count is taken."""
        self.skipped, self.streak = saved["skipped"], saved["streak"]
        device = self.history.device
        if saved["signals"] == list(self.signals):
            self.history = torch.tensor([[math.nan if x is None else x for x in row] for row in saved["history"]], device=device)
            self.seen = torch.tensor(saved["seen"], device=device)
