"""Schema of a chain: what its stages share once, one section per stage, and preparation steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from configs.schema.common import NAME_PATTERN, Split, Strict, Watchdog
from configs.schema.evaluation import EvalSettings
from configs.schema.ppo import PPOStage
from configs.schema.scorers import Combination
from configs.schema.supervised import DPOStage, RewardStage, SFTStage
from configs.schema.sweep import Sweep

SHARED = ("registry", "seed", "template", "max_length", "split", "machine", "processes", "attn_implementation", "watchdog")
STAGES = ("sft", "reward", "dpo", "ppo")


class Prepare(Strict):
    """A step that writes files a later stage reads: a Python function run in a process of its own."""

    run: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:function; it is called with the keys of `with`.")
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with", description="Keyword arguments of the function.")
    writes: list[Path] = Field(min_length=1, description="Files it must have written; the step is skipped while they and its inputs are unchanged.")
    before: Literal["sft", "reward", "dpo", "ppo", "eval"] = Field(default="sft", description="The stage that needs the files.")


class Members(Combination):
    """Several reward models in the place of one, alike but for their seeds."""

    members: int = Field(ge=2, description="Reward models, trained with the seeds seed, seed + 1 … and published as reward/NAME, reward/NAME-2 …")


class ChainReward(RewardStage):
    """The reward stage of a chain."""

    ensemble: Members | None = Field(default=None, description="Train several reward models; PPO's scorer combines them. Null trains one.")

    def member(self, number: int) -> RewardStage:
        """The config of member `number`, counted from 1; the first is the model that a chain without an ensemble trains."""
        own = {} if number == 1 else {"name": member_name(self.name, number), "output": f"{self.output}-{number}", "seed": self.seed + number - 1}
        return RewardStage(**{name: getattr(self, name) for name in RewardStage.model_fields} | own)


def member_name(name: str, number: int) -> str:
    """What member `number`, counted from 1, of the ensemble `name` is published under."""
    return name if number == 1 else f"{name}-{number}"


class Chain(Strict):
    """A chain from a base model to aligned policies."""

    name: str = Field(pattern=NAME_PATTERN, description="Every stage publishes under this name.")
    base: str = Field(description="The base model: a Hugging Face folder or name.")
    output: Path | None = Field(default=None, description="Working folder; null is runs/NAME.")
    assets: Path | None = Field(default=None, description="A folder that paths may refer to as ${assets}.")
    registry: Path | None = Field(default=None, description="The checkpoint registry; null is OUTPUT/registry.")
    seed: int = Field(default=0, description="Seed of every stage.")
    template: str = Field(default="auto", description="Chat template of every stage.")
    max_length: int = Field(default=1024, ge=1, description="Tokens of the longest row, in every stage.")
    split: Split = Field(default_factory=Split, description="The split of prompts that every stage shares.")
    machine: str = Field(default="auto", description="Machine file of every stage.")
    processes: int | None = Field(default=None, ge=1, description="Number of processes of every stage; null is the machine file's.")
    attn_implementation: str | None = Field(default=None, description="Attention kernel of every stage.")
    watchdog: Watchdog = Field(default_factory=Watchdog, description="When a stage that hangs is ended, in every stage.")
    prepare: dict[str, Prepare] = Field(default_factory=dict, description="Steps that write files, by name, in order.")
    sft: SFTStage | None = Field(default=None, description="Supervised fine-tuning.")
    reward: ChainReward | None = Field(default=None, description="The reward model, or an ensemble of them.")
    dpo: DPOStage | None = Field(default=None, description="Direct preference optimisation, from the SFT model.")
    ppo: PPOStage | None = Field(default=None, description="PPO, from the SFT model.")
    eval: EvalSettings | None = Field(default=None, description="The evaluation at the end, on prompts no stage has seen.")
    sweep: Sweep | None = Field(default=None, description="What `align sweep` tries; `align run` leaves it aside.")

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, data: Any) -> Any:
        return fill_sections(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _has_a_stage(self) -> Chain:
        if not any(getattr(self, stage) for stage in STAGES):
            raise ValueError(f"the chain has no stage; give at least one of {', '.join(STAGES)}")
        return self

    @model_validator(mode="after")
    def _has_one_split(self) -> Chain:
        other = [stage for stage in STAGES if getattr(self, stage) is not None and getattr(self, stage).split != self.split]
        if other:
            raise ValueError(f"{', '.join(other)}: has a split of its own; the stages of a chain share one, or prompts held out in one are trained on in another: set split at the top only")
        return self


def fill_places(data: dict[str, Any]) -> dict[str, Any]:
    """Say where the chain works and publishes, where it does not itself."""
    output = data.get("output") or f"runs/{data.get('name')}"
    return {**data, "output": output, "registry": data.get("registry") or f"{output}/registry"}


def fill_sections(data: dict[str, Any]) -> dict[str, Any]:
    """Give each stage's section what the chain says once, where the section does not say otherwise."""
    data = fill_places(data)
    name, output = data.get("name"), data["output"]
    shared = {key: data[key] for key in SHARED if data.get(key) is not None}
    for stage in STAGES:
        section = data.get(stage)
        if not isinstance(section, dict):
            continue
        parent = data.get("base") if stage == "sft" or not data.get("sft") else f"sft/{name}"
        filled = {**shared, "name": name, "output": f"{output}/{stage}", "init_from": parent}
        if stage == "ppo" and isinstance(data.get("reward"), dict):
            filled["scorers"] = [_scorer(data["reward"])]
        data[stage] = {**filled, **section}
    return data


def forget_inherited(data: dict[str, Any]) -> None:
    """Take out of each section (and of the places) what the chain would fill in just so, before its keys are overridden.

    A resolved chain, as a run writes it, has every key in every section, where a section's own counts more than the chain's: an override of
    the chain's would reach nobody. What a section has otherwise than the chain is its own, and stays.
    """
    places = fill_places(data)
    for stage in STAGES:
        section = data.get(stage)
        if isinstance(section, dict):
            inherited = {key: data[key] for key in SHARED if key in data} | {"registry": places["registry"], "output": f"{places['output']}/{stage}"}
            for key in [key for key, value in inherited.items() if key in section and section[key] == value]:
                del section[key]
    if data.get("registry") == f"{places['output']}/registry":
        del data["registry"]  # it moves with the output


def _scorer(reward: dict[str, Any]) -> dict[str, Any]:
    """What PPO's scorer is in a chain: the reward model, or the ensemble."""
    ensemble = reward.get("ensemble")
    if not isinstance(ensemble, dict) or not isinstance(ensemble.get("members"), int):
        return {"kind": "model", "checkpoint": f"reward/{reward['name']}"}
    names = [f"reward/{member_name(reward['name'], number)}" for number in range(1, ensemble["members"] + 1)]
    return {"kind": "ensemble", "checkpoints": names} | {key: value for key, value in ensemble.items() if key != "members"}
