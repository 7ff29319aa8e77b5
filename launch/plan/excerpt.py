"""A few steps out of a stage, to be measured: what of its config they run, which rows they see, and where they end.

What they hold in memory is what the stage holds: as many micro-batches a step as it has, up to the second, which finds the gradients of the
first; rollouts of as many completions as it generates at once; and twice an optimizer step, so that the second finds the optimizer's state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

Row = dict[str, Any]
LONGEST = 2  # optimizer steps of the longest rows, which tell the memory (PPO: iterations with the longest prompts)
TYPICAL = 3  # optimizer steps of rows as long as micro-batches are on average, which tell the time (PPO: one iteration with prompts in their order)
LOOKED_AT = 256  # optimizer steps of the stage whose micro-batches are averaged over


class MeasuredError(Exception):
    """The steps have been taken: nothing is evaluated on the test part, saved or published."""


def kept(accumulation: int) -> int:
    """Micro-batches of a measured optimizer step."""
    return min(accumulation, 2)


def shares(cfg: Any, processes: int) -> tuple[int, int]:
    """PPO: (completions of one process in a measured iteration, optimizer steps in it)."""
    train = cfg.train
    share = train.rollout_batch_size // processes
    step = share // train.num_minibatches
    sampled = min(cfg.sampling.generate_batch_size, share)
    if step > train.micro_batch_size:
        return max(sampled, min(2 * train.micro_batch_size, step)), 1
    parts = -(-sampled // step)
    return parts * step, parts


def excerpt(cfg: Any, stage: str, processes: int, folder: Path) -> Any:
    """The stage's config for a few steps, which work in `folder`."""
    if stage == "ppo":
        share, parts = shares(cfg, processes)
        train: dict[str, Any] = {
            "iterations": LONGEST + 1, "rollout_batch_size": share * processes, "num_ppo_epochs": 1, "num_minibatches": parts, "warmup_iterations": 0,
            "value_warmup_iterations": 0, "save_every": LONGEST + 2,
        }  # fmt: skip
        own: dict[str, Any] = {"sampling": cfg.sampling.model_copy(update={"stop_at_eos": False})}
        if cfg.evaluation is not None:
            prompts = -(-share * processes // cfg.evaluation.samples_per_prompt)
            own["evaluation"] = cfg.evaluation.model_copy(update={"every": LONGEST, "max_prompts": min(cfg.evaluation.max_prompts or prompts, prompts)})
    else:
        per_forward = cfg.train.micro_batch_size * processes
        train = {"max_steps": LONGEST + TYPICAL, "batch_size": kept(cfg.train.batch_size // per_forward) * per_forward, "early_stopping_patience": None, "epochs": 2.0}
        train |= {"eval_every": LONGEST, "save_every": LONGEST}
        own = {"evaluation": type(cfg.evaluation)(test=False)} if stage == "sft" else {}
    return cfg.model_copy(update=own | {"output": folder / "out", "train": cfg.train.model_copy(update=train)})


@contextmanager
def excerpted(stage: str, cfg: Any, batch: int) -> Iterator[None]:
    """Within the block the stage sees the rows of an excerpt, and leaves with MeasuredError after its last step. `batch`: rows of an optimizer
    step of the whole stage."""
    with ExitStack() as stack:
        for patch in _of_ppo() if stage == "ppo" else _supervised(cfg, batch):
            stack.enter_context(patch)
        yield


def _supervised(cfg: Any, batch: int) -> list[Any]:
    from stages.training import build, ranks, resume

    per_forward, dataset, train = cfg.train.micro_batch_size * ranks.world_size(), build.as_dataset, resume.train

    def in_order(rows: list[Row], plan: Any, seed: int) -> Any:
        return dataset(rows_of_steps(rows, plan, seed, batch=batch, micro_batch=cfg.train.micro_batch_size))

    def few(rows: list[Row]) -> Any:
        tokenised = bool(rows) and not rows[0].keys().isdisjoint(("input_ids", "chosen_ids"))  # DPO's placeholder is text
        return dataset(sorted(rows, key=width, reverse=True)[:per_forward] if tokenised else rows)

    def trained(trainer: Any, *args: Any) -> None:
        from transformers.trainer_utils import SaveStrategy

        trainer.args.save_strategy = SaveStrategy.NO
        train(trainer, *args)
        raise MeasuredError

    return [mock.patch.object(build, "in_order", in_order), mock.patch.object(build, "as_dataset", few), mock.patch.object(resume, "train", trained)]


def _of_ppo() -> list[Any]:
    import stages.data
    import stages.ppo.train as loop
    from stages.ppo.collect import PromptSet
    from stages.ppo.store import Store

    encode, chosen, run, done = stages.data.encode_prompts, PromptSet.chosen, loop.run_iteration, itertools.count(1)

    def encoded(*args: Any, **kwargs: Any) -> Any:
        rows, dropped = encode(*args, **kwargs)
        held_out = kwargs.get("may_be_empty")  # those of evaluations, of which there are few: all as long as the longest
        return ([max(rows, key=lambda row: len(row["prompt_ids"]))] * len(rows) if rows and held_out else rows), dropped

    def numbers(prompts: PromptSet, iteration: int, batch: int, seed: int) -> list[int]:
        longest = max(range(len(prompts.ids)), key=lambda index: len(prompts.ids[index]))
        return [longest] * batch if iteration < LONGEST else chosen(prompts, iteration, batch, seed)

    def iteration(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs)
        if next(done) > LONGEST:
            raise MeasuredError
        return out

    return [
        mock.patch.object(stages.data, "encode_prompts", encoded), mock.patch.object(PromptSet, "chosen", numbers),
        mock.patch.object(loop, "run_iteration", iteration), mock.patch.object(Store, "save_best", return_value=None),
    ]  # fmt: skip


def width(row: Row) -> int:
    """Tokens of a row (of a pair: of its longer side)."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row.get("prompt_ids", ())) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def rows_of_steps(rows: Sequence[Row], plan: Any, seed: int, *, batch: int, micro_batch: int) -> list[Row]:
    """The rows of the measured steps in turn. `plan`: of the measured steps; `batch`: rows of an optimizer step of the stage; `micro_batch`: rows of
    one process's forward pass.

    The longest row (of equals the one whose loss covers most) fills the first steps; where rows have different lengths, one of each micro-batch is a
    token shorter: attention to batches with padding keeps more. The other steps repeat those micro-batches of the stage whose longest row is
    nearest to the mean of all: all rows of a micro-batch, and all processes, take as long as that.
    """
    per_forward = plan.batch_size // plan.accumulation
    longest = max(rows, key=lambda row: (width(row), sum(label >= 0 for label in row.get("labels", ()))))
    padded = len({width(row) for row in rows}) > 1
    full = [longest] * (micro_batch - 1) + [shortened(longest) if padded and micro_batch > 1 else longest]
    forwards = micro_batches(rows, plan, seed, batch=batch, per_forward=per_forward)
    highest = [max(width(row) for row in forward) for forward in forwards]
    mean = sum(highest) / len(highest)
    typical = min(zip(highest, forwards, strict=True), key=lambda pair: abs(pair[0] - mean))[1]
    return full * (LONGEST * plan.batch_size // micro_batch) + typical * (TYPICAL * plan.accumulation)


def shortened(row: Row) -> Row:
    """A row without its last token; a pair whose sides are of one length without the last of its rejected side; a packed sequence as it is."""
    if "input_ids" in row:
        size = len(row["input_ids"])
        return row if "seq_lengths" in row else {key: value[:-1] if isinstance(value, list) and len(value) == size else value for key, value in row.items()}
    return row | {"rejected_ids": row["rejected_ids"][:-1]} if len(row["chosen_ids"]) == len(row["rejected_ids"]) > 1 else row


def micro_batches(rows: Sequence[Row], plan: Any, seed: int, *, batch: int, per_forward: int) -> list[list[Row]]:
    """The rows of the stage's first forward passes, those of all processes at once together."""
    from stages.training.build import lengths_of
    from stages.training.plan import sorted_steps

    own = max(1, (plan.batch_size - plan.general) * batch // plan.batch_size)
    steps = max(1, min(LOOKED_AT, -(-plan.rows // own)))
    whole = replace(plan, batch_size=batch, accumulation=batch // per_forward, steps=steps, general=batch - own if plan.general else 0)
    order = sorted_steps(lengths_of(list(rows)), whole, seed)
    return [[rows[index] for index in order[start : start + per_forward]] for start in range(0, len(order), per_forward)]
