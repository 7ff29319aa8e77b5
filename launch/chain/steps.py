"""The steps of a chain in order, and what the command line asks of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from configs.errors import UserError

STAGES = ("sft", "reward", "dpo", "ppo")
ORDER = (*STAGES, "eval")

# normal: run unless done. force: run although done. given: take what is there, run only if there is nothing.
Mode = Literal["normal", "force", "given"]


@dataclass(frozen=True)
class Step:
    """One step: a prepare function, a stage or the evaluation. `before` is the stage a prepare step belongs to."""

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
            steps.append(Step("eval" if stage == "eval" else "stage", stage, stage, _stage_mode(stage, start)))
    if only:
        last = ORDER.index(only)
        steps = [s for s in steps if (s.kind == "prepare" and ORDER.index(s.before) <= last) or s.name == only]
    return steps


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
