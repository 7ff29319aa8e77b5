"""The most memory that training takes, of a technique and not of the process that runs it."""

from __future__ import annotations

from types import TracebackType


class Meter:
    """Bytes at the peak: of a GPU what its allocator has handed out at most, elsewhere the highest sum of torch's tensors that are alive at once.

    What a process on a CPU holds grows with its first use of everything, by far more than a small technique takes; its tensors are the same
    every time. To count them each operation is looked at, which takes time: what is timed goes on between `rest` and `go_on`. A GPU counts always.
    """

    def __init__(self) -> None:
        import torch

        from launch.plan.allocations import Allocations

        self.on_gpu = torch.cuda.is_available()
        self.tracker = Allocations()
        self.follows = False

    def __enter__(self) -> Meter:
        self.go_on()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.rest()

    def begin(self) -> None:
        """Forget the peak so far; what is alive now counts on."""
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            self.tracker.begin("training")

    def go_on(self) -> None:
        """Look at each operation from now on."""
        if not self.on_gpu and not self.follows:
            self.tracker.__enter__()
            self.follows = True

    def rest(self) -> None:
        """Look at no operation from now on; what is freed meanwhile is known all the same, what is made when it is next read."""
        if self.follows:
            self.tracker.__exit__(None, None, None)
            self.follows = False

    @property
    def peak(self) -> float:
        """Bytes, since `begin`."""
        if self.on_gpu:
            import torch

            return float(torch.cuda.max_memory_allocated())
        return float(self.tracker.peaks["training"].total)
