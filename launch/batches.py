"""Whether a stage's batches can be shared equally by its processes, asked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.errors import UserError


def check_batches(sections: Mapping[str, Any], processes: int, *, prefixed: bool = True) -> None:
    """Refuse batches of `sections` (stage -> its config) that `processes` cannot share; a stage would say so after a queue, and the data.

    `prefixed`: keys are written as a chain has them, sft.train.batch_size; else as a stage's own config has them.

    Raises UserError with every problem, each with a change that mends it: the micro-batch where that is enough, for it changes no result.
    """
    problems = [batch_problem(stage, cfg.train, processes, f"{stage}." if prefixed else "") for stage, cfg in sections.items()]
    if any(problems):
        raise UserError("\n".join(problem for problem in problems if problem))


def batch_problem(stage: str, train: Any, processes: int, prefix: str) -> str | None:
    """What is wrong with the batch of one stage and what mends it, or None."""
    if stage == "ppo":
        each, batch, key, other = train.num_minibatches * processes, train.rollout_batch_size, "rollout_batch_size", "num_minibatches"
    else:
        each, batch, key, other = train.micro_batch_size * processes, train.batch_size, "batch_size", "micro_batch_size"
    if batch % each == 0:
        return None
    change = f"{key}={each * max(1, round(batch / each))}"
    if stage != "ppo" and batch % processes == 0:
        share = batch // processes
        change = f"{other}={max(size for size in range(1, min(share, train.micro_batch_size) + 1) if share % size == 0)}"
    return (
        f"{prefix}train.{key} {batch} is not a multiple of {each} = {processes} process(es) x "
        f"{prefix}train.{other} {getattr(train, other)}; change one, such as {prefix}train.{change}"
    )
