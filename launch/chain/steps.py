"""The steps of a chain in order, and what the command line asks of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from configs.errors import UserError
from configs.schema.chain import member_name

STAGES = ("sft", "reward", "dpo", "ppo")
ORDER = (*STAGES, "eval")

# normal: run unless done. force: run although done. given: take what is there, run only if there is nothing.
Mode = Literal["normal", "force", "given"]


@dataclass(frozen=True)
class Step:
    """One step: a prepare function, a stage or the evaluation. `before` is the stage that it trains, or that a prepare step belongs to."""

    kind: Literal["prepare", "stage", "eval"]
    name: str
    before: str
    mode: Mode = "normal"


def steps_of(chain: Any, only: str | None = None, start: str | None = None) -> list[Step]:
    """The steps to go through, in order. Raises UserError where `only` or `start` names a section the chain lacks."""
    present = [stage for stage in ORDER if getattr(chain, stage) is not None]
    chosen = only or start
    if chosen and chosen not in present:
        raise UserError(f"--{'only' if only else 'from'} {chosen}: the chain has no section {chosen!r}; it has {', '.join(present)}")
    steps: list[Step] = []
    for stage in ORDER:
        steps += [Step("prepare", name, stage, _prepare_mode(stage, chosen)) for name, p in chain.prepare.items() if p.before == stage]
        if stage in present:
            names = [name for name in sections(chain) if stage_of(name) == stage] if stage != "eval" else [stage]
            steps += [Step("eval" if stage == "eval" else "stage", name, stage, _stage_mode(stage, start)) for name in names]
    if only:
        last = ORDER.index(only)
        steps = [s for s in steps if (s.kind == "prepare" and ORDER.index(s.before) <= last) or (s.kind != "prepare" and s.before == only)]
    return steps


def sections(chain: Any) -> dict[str, Any]:
    """Step name -> config of every stage that a chain trains; the further members of a reward ensemble are reward-2, reward-3 …"""
    found: dict[str, Any] = {}
    for stage in STAGES:
        section = getattr(chain, stage)
        if stage == "reward" and section is not None:
            count = section.ensemble.members if section.ensemble is not None else 1
            found |= {member_name(stage, number): section.member(number) for number in range(1, count + 1)}
        elif section is not None:
            found[stage] = section
    return found


def stage_of(name: str) -> str:
    """The stage that a step trains: reward for reward-2."""
    return name.partition("-")[0]


def trains(name: Any) -> bool:
    """Whether a step of this name trains something."""
    return isinstance(name, str) and re.fullmatch(rf"({'|'.join(STAGES)})(-[0-9]+)?", name) is not None


def made_by(chain: Any, ref: str) -> str | None:
    """The name of the step that publishes what a reference such as reward/demo means; None where none of the chain's does."""
    return next((name for name, section in sections(chain).items() if ref == f"{stage_of(name)}/{section.name}"), None)


def _stage_mode(stage: str, start: str | None) -> Mode:
    if start is None:
        return "normal"
    return "force" if ORDER.index(stage) >= ORDER.index(start) else "given"


def _prepare_mode(before: str, chosen: str | None) -> Mode:
    return "given" if chosen and ORDER.index(before) < ORDER.index(chosen) else "normal"


def evaluation_config(chain: Any, output: Any) -> Any:
    """The EvalConfig of the chain's last step: base and every stage that yields a policy, against SFT where there is one."""
    from configs.schema import EvalConfig

    policies = [stage for stage in ("sft", "dpo", "ppo") if getattr(chain, stage) is not None]
    against = "sft" if "sft" in policies else "base"
    return EvalConfig(
        **dict(chain.eval),
        registry=chain.registry,
        checkpoints={"base": chain.base, **{stage: f"{stage}/{getattr(chain, stage).name}" for stage in policies}},
        against=against,
        reference=against,
        seed=chain.seed,
        template=chain.template,
        attn_implementation=chain.attn_implementation,
        split=chain.split,
        output=output,
    )
