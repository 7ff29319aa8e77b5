"""Seconds per step of SFT, reward model, DPO and PPO on a number of devices, and what bounds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.errors import UserError
from launch.scale.collectives import gather_or_scatter
from launch.scale.facts import PlanFacts
from launch.scale.hardware import Hardware
from launch.scale.passes import Cost, forward_pass, sampling, training_step

SHARES = tuple(eighth / 8 for eighth in range(1, 8))  # of the devices, that only sample


@dataclass(frozen=True)
class Phase:
    """A part of a step. Seconds: wall time, and of it arithmetic, memory traffic, communication that nothing hides, host."""

    name: str
    seconds: float
    compute: float
    memory: float
    network: float
    host: float
    bound: str


@dataclass(frozen=True)
class Row:
    """One number of devices. seconds: per step (PPO: iteration). tokens_per_second: of all devices; PPO counts prompts and completions.
    efficiency: tokens per second and device against the smallest number asked for. bound: compute, memory, network or host.
    """

    gpus: int
    nodes: int
    seconds: float
    tokens_per_second: float
    hours: float
    efficiency: float
    bound: str
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()


def scale(facts: PlanFacts, gpus: Sequence[int], hardware: Hardware) -> list[Row]:
    """A row for each number of devices, in the order asked. Raises UserError for a number that cannot be."""
    for count in gpus:
        if count < 1:
            raise UserError(f"--scale: found {count}; expected numbers of GPUs of 1 or more, such as 8,64,512")
    costs = {count: step_costs(facts, count, hardware) for count in gpus}
    rate = {count: facts.rows * (facts.tokens + facts.new_tokens) / wall(facts, costs[count], hardware) for count in gpus}
    smallest = min(gpus, default=1)
    return [_row(facts, count, hardware, costs[count], rate[count], rate[count] / count / (rate[smallest] / smallest)) for count in gpus]


def overlapped(facts: PlanFacts, count: int, hardware: Hardware) -> tuple[float, float] | None:
    """(share, seconds an iteration) if that share of `count` devices, the best of SHARES, only sampled while the others train on the rollout before.

    None for other stages than PPO and for one device. No stage runs so: it is what rollouts one policy behind would save.
    """
    if facts.stage != "ppo" or count == 1:
        return None
    apart = {share: replace(facts, rollout_share=share) for share in SHARES}
    times = {share: wall(plan, step_costs(plan, count, hardware), hardware) for share, plan in apart.items()}
    best = min(times, key=lambda share: times[share])
    return _groups(apart[best], count)[0] / count, times[best]


def _row(facts: PlanFacts, count: int, hardware: Hardware, costs: dict[str, Cost], rate: float, efficiency: float) -> Row:
    seconds = wall(facts, costs, hardware)
    phases = tuple(Phase(name, cost.seconds, cost.compute, cost.memory, cost.exposed, cost.host, cost.bound) for name, cost in costs.items())
    total = sum(costs.values(), Cost())
    return Row(count, hardware.nodes(count), seconds, rate, facts.steps * seconds / 3600, efficiency, total.bound, phases, tuple(_notes(facts, count)))


def _notes(facts: PlanFacts, count: int) -> list[str]:
    notes = []
    if facts.rows < count:
        notes.append(f"{count - facts.rows} of {count} GPUs have no row of a batch of {facts.rows}")
    elif facts.rows % count:
        notes.append(f"{facts.rows} rows do not divide by {count} GPUs: some wait for others")
    if facts.stage == "ppo" and facts.rows // facts.minibatches < count:
        notes.append(f"a minibatch of {facts.rows // facts.minibatches} rows is smaller than {count} GPUs")
    if facts.rows // count < facts.micro_batch:
        notes.append(f"{max(1, facts.rows // count)} row(s) per GPU: micro_batch_size {facts.micro_batch} is not reached")
    return notes


def step_costs(facts: PlanFacts, devices: int, hardware: Hardware) -> dict[str, Cost]:
    """Phase -> what one device spends on it in a step."""
    if facts.stage != "ppo":
        rows = math.ceil(facts.rows / devices)
        costs = {"training": training_step(facts.policy, rows, facts.tokens, facts, devices, hardware)}
        if facts.reference is not None:
            costs["reference"] = forward_pass(facts.reference, rows, facts.tokens, facts, devices, hardware)
        return costs
    samplers, trainers = _groups(facts, devices)
    rows = math.ceil(facts.rows / trainers)
    length = facts.tokens + facts.new_tokens
    scored = [model for model in (facts.policy, facts.reference, facts.value, *facts.rewards) if model is not None]
    scoring = sum((forward_pass(model.frozen(), rows, length, facts, trainers, hardware) for model in scored), Cost())
    share = math.ceil(facts.rows / facts.minibatches / trainers)
    learnt = [model for model in (facts.policy, facts.value) if model is not None]
    update = sum((training_step(model, share, length, facts, trainers, hardware) for model in learnt), Cost())
    rollout = sampling(facts, math.ceil(facts.rows / samplers), samplers, hardware)
    return {"rollout": rollout, "scoring": scoring, "update": update.times(facts.epochs * facts.minibatches)}


def _groups(facts: PlanFacts, devices: int) -> tuple[int, int]:
    """(devices that sample, devices that score and train): all and all, or two groups of whole devices."""
    if not facts.rollout_share or devices == 1:
        return devices, devices
    samplers = min(devices - 1, max(1, round(devices * facts.rollout_share)))
    return samplers, devices - samplers


def wall(facts: PlanFacts, costs: dict[str, Cost], hardware: Hardware) -> float:
    """Seconds of a step: its phases one after the other; with devices that only sample, the slower group and the transfer of the weights."""
    if facts.stage != "ppo" or not facts.rollout_share:
        return sum(cost.seconds for cost in costs.values())
    sent = gather_or_scatter(facts.policy.parameters * facts.weight_bytes, 2 * hardware.network.node_size, hardware)
    return max(costs["rollout"].seconds, costs["scoring"].seconds + costs["update"].seconds) + sent
