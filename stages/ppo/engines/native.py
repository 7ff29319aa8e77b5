"""Our own loop: what a completion is depends neither on its batch nor on its process."""

from __future__ import annotations

from collections.abc import Sequence

from stages.ppo.engines.protocol import Policy
from stages.ppo.sampling import Sample, completion_seed, sample


class NativeEngine:
    """Samples with the policy itself, in the arithmetic of the update; each completion has a seed of its own."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sample(self, prompt_ids: Sequence[Sequence[int]], *, iteration: int, indices: Sequence[int]) -> list[Sample]:
        """One completion for each prompt; see `Engine`."""
        p = self.policy
        seeds = [completion_seed(p.seed, iteration, i) for i in indices]
        with p.autocast():
            return sample(p.model, prompt_ids, sampling=p.sampling, eos_ids=p.eos_ids, pad_id=p.pad_id, seeds=seeds)

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's."""
