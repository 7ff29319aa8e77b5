"""The update: clipped policy and value losses over a rollout, reduced so that the cut into batches does not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.schema import PPOStage
from stages.guard.skip import skip_all_if
from stages.guard.verdict import GoneBadError, Guard
from stages.ppo import maths
from stages.ppo.modules import PolicyAndValue
from stages.ppo.ptx import Mix, passes
from stages.ppo.rollout import Experience
from stages.training import watchdog

SIGNALS = ("policy's gradient", "value function's gradient")  # what the guard judges a step by, in the order of `settle`
SKIPPED = "policy/skipped_steps"
MAX_GAP = 1e-3  # nats between the sampler's log-prob of a token and a training forward's: 200 times less than what clips a ratio


@dataclass
class Totals:
    """Sums over the tokens of one optimizer step, on this process, then over all."""

    policy_loss: Tensor
    value_loss: Tensor
    clipped: Tensor
    value_clipped: Tensor
    approx_kl: Tensor
    max_ratio: Tensor
    gap: Tensor  # largest |log-prob - old log-prob|
    gap_sum: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> Totals:
        """No token yet."""
        return cls(*(torch.zeros((), device=device, dtype=torch.float64) for _ in range(8)))

    def add_policy(self, policy: maths.PolicyLoss) -> None:
        """Add a micro-batch's policy loss."""
        self.policy_loss += policy.loss.detach()
        self.clipped += policy.clipped
        self.approx_kl += policy.approx_kl
        self.max_ratio = torch.maximum(self.max_ratio, policy.max_ratio.double())

    def add_gap(self, gap: Tensor) -> None:
        """Add a micro-batch's distances [B, T] of log-probs from old ones, 0 where masked."""
        self.gap, self.gap_sum = torch.maximum(self.gap, gap.max().double()), self.gap_sum + gap.sum()

    def add_value(self, value: maths.ValueLoss) -> None:
        """Add a micro-batch's value loss."""
        self.value_loss += value.loss.detach()
        self.value_clipped += value.clipped


class SamplerDiffersError(Exception):
    """The old log-probs, which are the sampler's, are not those of a training forward: nothing has been learned from them yet."""


def minibatches(count: int, num_minibatches: int, *, seed: int, iteration: int, epoch: int) -> list[Tensor]:
    """Row numbers of each optimizer step of one pass: a permutation that every process draws alike."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + iteration) * 1_009 + epoch) % 2**63)
    return list(torch.randperm(count, generator=generator).chunk(num_minibatches))


def micro_batches(experience: Experience, rows: Tensor, *, rank: int, world: int, size: int) -> list[Tensor]:
    """This process's share of a minibatch, in micro-batches of rows of similar length, equally many on every process.

    The longest come first: what a later one takes fits where an earlier one's was, and memory that does not suffice is found out at once.
    """
    by_length = rows[torch.argsort(experience.lengths().cpu()[rows], descending=True, stable=True)]
    mine = by_length[rank::world]
    return list(mine.split(size))


def update_policy(
    module: PolicyAndValue, optimizer: Any, accelerator: Any, experience: Experience, cfg: PPOStage, iteration: int, mix: Mix | None = None,
    max_gap: float = math.inf, guard: Guard | None = None,
) -> dict[str, float]:  # fmt: skip
    """Every epoch and minibatch of one iteration. Returns metrics, means over the real tokens of all processes.

    Each minibatch is one optimizer step. Its loss is one mean over all its completion tokens on all processes: tokens of a
    micro-batch are summed and divided by the whole count. A step that the guard (by default a new one) finds bad is skipped and counted;
    that is decided on the device, and nothing waits for it until the last step.

    Raises:
        SamplerDiffersError: before the first step an old log-prob is further than `max_gap` nats from now's; no gradient is left.
        GoneBadError: all steps were skipped.
    """
    guard = guard or Guard(cfg.guard, SIGNALS, accelerator.device)
    steps: list[dict[str, Tensor]] = []
    for epoch in range(cfg.train.num_ppo_epochs):
        parts = minibatches(len(experience.tokens.mask), cfg.train.num_minibatches, seed=cfg.seed, iteration=iteration, epoch=epoch)
        for number, rows in enumerate(parts, (iteration * cfg.train.num_ppo_epochs + epoch) * len(parts)):
            policy_learns, micro = iteration >= cfg.train.value_warmup_iterations, cfg.train.micro_batch_size
            demonstrations = mix.chosen(number, len(rows), cfg.seed) if mix is not None and policy_learns else []
            shares = micro_batches(experience, rows, rank=accelerator.process_index, world=accelerator.num_processes, size=micro)
            module.expect(policy=len(shares) + passes(len(demonstrations), accelerator, micro), value=len(shares))
            totals = _accumulate(module, accelerator, experience, rows, shares, cfg, policy=policy_learns or module.lockstep)
            if max_gap < math.inf and epoch == 0 and rows is parts[0] and not largest(totals.gap, accelerator) <= max_gap:
                optimizer.zero_grad(set_to_none=True)
                raise SamplerDiffersError
            mixed = {}
            if mix is not None and demonstrations:
                mixed["ptx/loss"] = mix.add_gradients(module, accelerator, demonstrations, micro)
            norms = module.settle(accelerator, cfg.train.max_grad_norm, policy_learns=policy_learns)
            skip = guard.judge(number + 1, torch.stack([norm.double() for norm in norms.values()]))  # of all processes' gradients: all decide alike
            if cfg.guard.enabled:
                skip_all_if(skip, optimizer)
            optimizer.step()
            steps.append({SKIPPED: skip} | _step_metrics(totals, experience, rows, accelerator) | norms | mixed)
            optimizer.zero_grad(set_to_none=True)
    return _means(read_together(steps), iteration)


def read_together(steps: Sequence[dict[str, Tensor]]) -> list[dict[str, float]]:
    """The metrics of all steps as numbers, waiting for the device once."""
    values = iter(torch.stack([value.double() for step in steps for value in step.values()]).tolist())
    return [{key: next(values) for key in step} for step in steps]


def _means(every: Sequence[dict[str, float]], iteration: int) -> dict[str, float]:
    """The metrics of an iteration, means over the steps that were taken. Raises GoneBadError where there is none."""
    steps = [step for step in every if not step[SKIPPED]]
    if not steps:
        raise GoneBadError(f"no optimizer step of iteration {iteration + 1} had gradients that are finite numbers, and no spike, so nothing was learned from it")
    means = {key: sum(step[key] for step in steps) / len(steps) for key in steps[0] if not key.startswith("policy/gap")}
    return means | {"policy/max_ratio": max(step["policy/max_ratio"] for step in steps), "policy/first_ratio": steps[0]["policy/max_ratio"],
                    "policy/first_approx_kl": steps[0]["policy/approx_kl"], "policy/first_clip_fraction": steps[0]["policy/clip_fraction"],
                    "policy/first_gap": steps[0]["policy/gap"], "policy/first_gap_mean": steps[0]["policy/gap_mean"],
                    "policy/first_gap_tokens": steps[0]["policy/gap_tokens"], SKIPPED: len(every) - len(steps)}  # fmt: skip


def largest(value: Tensor, accelerator: Any) -> Tensor:
    """The largest of all processes' numbers, []."""
    return accelerator.gather(value.reshape(1)).max()


def _accumulate(
    module: PolicyAndValue, accelerator: Any, experience: Experience, rows: Tensor, shares: Sequence[Tensor], cfg: PPOStage, *, policy: bool
) -> Totals:
    """Gradients of this process's `shares` of the minibatch `rows`, micro-batch after micro-batch; the policy's only where they are used."""
    tokens, value_tokens = (mask[rows].sum().clamp(min=1) for mask in (experience.tokens.mask, experience.value_mask))
    totals = Totals.zero(accelerator.device)

    def policy_loss(logprobs: Tensor, batch: Experience) -> Tensor:
        loss = maths.policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.tokens.mask, clip_range=cfg.clip_range,
            clip_range_high=cfg.clip_range_high, dual_clip=cfg.dual_clip, weights=batch.importance,
        )  # fmt: skip
        totals.add_policy(loss)
        totals.add_gap(torch.where(batch.tokens.mask, (logprobs.detach() - batch.old_logprobs).abs(), 0.0))
        return loss.loss / tokens

    def value_loss(values: Tensor, batch: Experience) -> Tensor:
        value = maths.value_loss(values, batch.old_values, batch.returns, batch.value_mask, clip_range=cfg.value_clip_range)
        totals.add_value(value)
        return cfg.vf_coef * value.loss / value_tokens

    for part in shares:
        batch = experience.select(part)
        watchdog.beat()
        if module.shares_trunk:
            with accelerator.autocast():
                outputs = module(batch.tokens)
            module.backward(policy_loss(outputs.logprobs, batch) + value_loss(outputs.values, batch), "policy")
            continue
        # One graph at a time: the policy's is gone when the value function's is built.
        with accelerator.autocast(), torch.set_grad_enabled(policy):
            logprobs = module.logprobs(batch.tokens).logprobs
        module.backward(policy_loss(logprobs, batch), "policy")
        with module.value_pass():  # around the backward pass too: layers recomputed in it must find the same adapter
            with accelerator.autocast():
                values = module.values(batch.tokens)
            module.backward(value_loss(values, batch), "value")
    return totals


def _step_metrics(totals: Totals, experience: Experience, rows: Tensor, accelerator: Any) -> dict[str, Tensor]:
    """One optimizer step's metrics over all processes, each []."""
    sums = torch.stack([totals.policy_loss, totals.value_loss, totals.clipped, totals.value_clipped, totals.approx_kl, totals.gap_sum])
    policy_loss, value_loss, clipped, value_clipped, approx_kl, gap_sum = accelerator.reduce(sums, reduction="sum")
    tokens, value_tokens = (mask[rows].sum().clamp(min=1) for mask in (experience.tokens.mask, experience.value_mask))
    return {
        "policy/loss": policy_loss / tokens,
        "policy/approx_kl": approx_kl / tokens,
        "policy/clip_fraction": clipped / tokens,
        "policy/max_ratio": largest(totals.max_ratio, accelerator),
        "policy/gap": largest(totals.gap, accelerator),
        "policy/gap_mean": gap_sum / tokens,
        "policy/gap_tokens": tokens,
        "value/loss": value_loss / value_tokens,
        "value/clip_fraction": value_clipped / value_tokens,
    }
