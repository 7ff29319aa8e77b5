"""What every engine that samples a rollout does, and what it may give back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from configs.errors import UserError
from configs.schema import Sampling
from stages.ppo.sampling import Sample, completion_seed

SLACK = 1e-3  # nats that rounding may put a log-prob above 0


@dataclass(frozen=True)
class Policy:
    """The model to sample from, and how: what an engine is made of."""

    model: Any  # a transformers language model; with adapters the policy's is on
    sampling: Sampling
    eos_ids: tuple[int, ...]
    pad_id: int
    seed: int
    autocast: Callable[[], AbstractContextManager[Any]]  # the arithmetic of the update


class Engine(Protocol):
    """Samples completions from the policy."""

    def sample(self, prompt_ids: Sequence[Sequence[int]], *, iteration: int, indices: Sequence[int]) -> list[Sample]:
        """One completion for each unpadded prompt, in order. `indices` are their numbers in the batch of all processes.

        Log-probs are in nats at the sampling temperature. The same arguments and weights give the same samples again on a CPU;
        another iteration or another share of the batch gives others. Every process calls it at the same time.
        """
        ...

    def sync(self) -> None:
        """Take over the policy's weights. Every process calls it after every update."""
        ...


def completion_stream(seed: int, iteration: int, index: int) -> int:
    """A completion's seed in 63 bits, for engines whose generators take no more."""
    return int(np.random.SeedSequence(completion_seed(seed, iteration, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def share_seed(seed: int, iteration: int, indices: Sequence[int]) -> int:
    """One seed for a process's share of an iteration, for engines that draw for all of it from one stream."""
    assert indices, "a share without prompts draws nothing"
    return completion_stream(seed, iteration, indices[0])


def checked(engine: str, samples: Sequence[Sample], policy: Policy) -> list[Sample]:
    """The samples, once they are what was asked for: PPO would learn nonsense from anything else without a sign of it.

    Raises:
        UserError: tokens after an EOS, a completion that stops without one, missing or impossible log-probs.
    """
    limit, eos = policy.sampling.max_new_tokens, set(policy.eos_ids) if policy.sampling.stop_at_eos else set()
    for number, (ids, logprobs, finished, _) in enumerate(samples):
        ended = bool(ids) and ids[-1] in eos
        wrong = None
        if not 0 < len(ids) <= limit or (len(ids) < limit and not ended):
            wrong = f"has {len(ids)} tokens and ends with {ids[-1:]}; expected {limit}, or fewer with one of the EOS ids {sorted(eos)} at the end"
        elif eos.intersection(ids[:-1]):
            wrong = f"goes on after an EOS id ({ids})"
        elif len(logprobs) != len(ids) or not all(math.isfinite(x) and x <= SLACK for x in logprobs):
            wrong = f"has {len(ids)} tokens and the log-probs {logprobs}; expected one finite number per token, not above 0"
        elif finished != (ended or not policy.sampling.stop_at_eos):
            wrong = f"ends with {ids[-1]} and says finished: {finished}"
        if wrong:
            raise UserError(f"engine.kind {engine}: completion {number} {wrong}; use another engine.kind (native always works)")
    return list(samples)
