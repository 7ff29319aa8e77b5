"""Faults injected into the registry: kills, power cuts, full disks, flipped bits, many writers at once."""

from __future__ import annotations

from tests.reliability.case import Case

CASES: list[Case] = []
