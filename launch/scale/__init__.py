"""A model of how long a step takes on more devices than there are here: compute, memory traffic, collectives.

`scale(facts, gpus, hardware)` is the whole of it; everything below it is a pure function of numbers.
"""

from launch.scale.facts import ModelShape, PlanFacts
from launch.scale.hardware import Device, Efficiency, Hardware, Network, named
from launch.scale.step import Phase, Row, overlapped, scale

__all__ = ["Device", "Efficiency", "Hardware", "ModelShape", "Network", "Phase", "PlanFacts", "Row", "named", "overlapped", "scale"]
