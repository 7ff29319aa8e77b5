"""Collecting a rollout: prompts, samples, scores, and the log-probs and values that the update starts from."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from configs.schema import PPOStage
from rewards.combine import Scores, WeightedSum
from rewards.shaping import per_token_rewards, shape_scores
from stages.guard.verdict import GoneBadError
from stages.models import uses_bf16
from stages.ppo import maths
from stages.ppo.engines.protocol import Engine
from stages.ppo.modules import PolicyAndValue, Reference
from stages.ppo.order import stream
from stages.ppo.rollout import Experience, Rollout, Tokens, cut, padded
from stages.tokens import ModelTokens
from stages.training import watchdog


@dataclass(frozen=True)
class PromptSet:
    """Encoded prompts and what the scorers see of them."""

    ids: list[list[int]]
    texts: list[Any]
    columns: list[dict[str, Any]]

    def chosen(self, iteration: int, batch: int, seed: int) -> list[int]:
        """Prompt numbers of an iteration."""
        return stream(len(self.ids), iteration * batch, batch, seed)


@dataclass
class Clock:
    """Seconds that the parts of an iteration took."""

    rollout: float = 0.0
    scoring: float = 0.0
    update: float = 0.0


def collect_rollout(
    module: PolicyAndValue, reference: Reference, scorer: WeightedSum, prompts: PromptSet, cfg: PPOStage, accelerator: Any, *,
    engine: Engine, iteration: int, tokens: ModelTokens, clock: Clock,
) -> Rollout:  # fmt: skip
    """Sample this process's share of the batch, score it, and exchange it: the result is the same on every process."""
    started = time.monotonic()
    total = cfg.train.rollout_batch_size
    share = total // accelerator.num_processes
    mine = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    numbers = prompts.chosen(iteration, total, cfg.seed)
    prompt_ids = [prompts.ids[numbers[i]] for i in mine]
    module.eval()
    watchdog.phase("rollout", iteration)
    samples = engine.sample(prompt_ids, iteration=iteration, indices=mine)
    clock.rollout = time.monotonic() - started
    started = time.monotonic()
    watchdog.phase("scoring")
    completion_ids = [s.completion_ids for s in samples]
    columns = columns_of([prompts.columns[numbers[i]] for i in mine])
    scores = scorer.score(
        [prompts.texts[numbers[i]] for i in mine], [tokens.formatter.completion_text(ids) for ids in completion_ids], token_key=tokens.key, prompt_ids=prompt_ids,
        completion_ids=completion_ids, **(columns | {"finished": [s.finished for s in samples]}),
    )  # fmt: skip
    batch = padded(prompt_ids, completion_ids, tokens.pad_id, accelerator.device)
    with reference.at_hand():
        old, values, entropy, ref = _forward(module, reference, batch, cfg, accelerator)
    theirs = _right_padded([s.logprobs for s in samples], ref)
    if starts_from_sampler(cfg):
        # Without a distribution's entropy, minus the log-prob of what came from it: right on average.
        old, entropy = theirs, _right_padded([s.entropies if s.entropies is not None else [-x for x in s.logprobs] for s in samples], ref)
    rollout = Rollout(
        batch, torch.tensor([s.finished for s in samples], device=accelerator.device), old, ref, values,
        torch.tensor(scores.total, device=accelerator.device), entropy, *_parts(scores, accelerator.device), theirs,
    )  # fmt: skip
    rollout = exchange(rollout, accelerator, tokens.pad_id)
    clock.scoring = time.monotonic() - started
    return rollout


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns of the prompts as lists; a column some prompts lack is None there."""
    names = {name for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in sorted(names)}


def _parts(scores: Scores, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each scorer's own values [B, S] and where it applies [B, S]."""
    rows = list(zip(*scores.parts.values(), strict=True))
    values = torch.tensor([[0.0 if value is None else value for value in row] for row in rows], device=device)
    return values, torch.tensor([[value is not None for value in row] for row in rows], device=device)


def starts_from_sampler(cfg: PPOStage) -> bool:
    """Whether the sampler's log-probs are the old ones, if they are those of a training forward."""
    return _one_arithmetic(cfg) if cfg.engine.old_logprobs == "auto" else cfg.engine.old_logprobs == "sampler"


def compares_all(cfg: PPOStage) -> bool:
    """Whether that is seen from a forward pass over the whole rollout, before the update: nothing but this comparison guards against what another engine does.

    An update's own first forward pass compares what its first step is of, for nothing: the whole rollout where there is one minibatch. Where sampler and
    update are one code in one arithmetic the rows of a first minibatch, drawn anew in every iteration, are sample enough.
    """
    return starts_from_sampler(cfg) and cfg.train.num_minibatches > 1 and not _one_arithmetic(cfg)


def _one_arithmetic(cfg: PPOStage) -> bool:
    return cfg.engine.kind == "native" and not uses_bf16(cfg.train.precision)


def recomputed(rollout: Rollout, module: PolicyAndValue, cfg: PPOStage, accelerator: Any) -> Rollout:
    """The rollout with the log-probs of a training forward for old ones. Every process computes its share."""
    share = len(rollout) // accelerator.num_processes
    old = torch.zeros((share, rollout.tokens.mask.shape[1]), device=accelerator.device)
    for rows in torch.arange(share).split(cfg.train.micro_batch_size):
        part = cut(rollout.tokens, rows + accelerator.process_index * share)
        watchdog.beat()
        with torch.no_grad(), accelerator.autocast():
            old[rows, : part.mask.shape[1]] = module.logprobs(part).logprobs
    return replace(rollout, old_logprobs=accelerator.gather(old))


@torch.no_grad()
def _forward(module: PolicyAndValue, reference: Reference, tokens: Tokens, cfg: PPOStage, accelerator: Any) -> tuple[Tensor, ...]:
    """Old log-probs, values, entropy and reference log-probs, in micro-batches of rows of similar length; no policy where the sampler was one."""
    width = tokens.mask.shape[1]
    old, ref, entropy = (torch.zeros(tokens.mask.shape, device=accelerator.device) for _ in range(3))
    values = torch.zeros((len(tokens.mask), width + 1), device=accelerator.device)
    order = torch.argsort(tokens.attention_mask.sum(dim=1), descending=True, stable=True)
    for rows in order.split(cfg.train.micro_batch_size):
        part = cut(tokens, rows)
        size = part.mask.shape[1]
        watchdog.beat()
        with accelerator.autocast():
            ref[rows, :size] = reference.logprobs(part)
            if starts_from_sampler(cfg):
                with module.value_pass():
                    values[rows, : size + 1] = module.values(part)
                continue
            outputs = module(part, entropy=True)
        old[rows, :size], values[rows, : size + 1] = outputs.logprobs, outputs.values
        if outputs.entropy is not None:
            entropy[rows, :size] = outputs.entropy
    return old, values, entropy, ref


def _right_padded(rows: list[list[float]], like: Tensor) -> Tensor:
    """Rows of numbers as [B, T], shaped as `like`, 0 after a row's end."""
    width = like.shape[1]
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=like.dtype).reshape(like.shape).to(like.device)


def exchange(rollout: Rollout, accelerator: Any, pad_id: int) -> Rollout:
    """The rollouts of all processes, one after the other, padded to common widths."""
    if accelerator.num_processes == 1:
        return rollout

    def gather(x: Tensor, *, left: bool = False, fill: float = 0) -> Tensor:
        if x.dim() == 2:
            x = accelerator.pad_across_processes(x, dim=1, pad_index=fill, pad_first=left)
        return accelerator.gather(x)

    t = rollout.tokens
    tokens = Tokens(
        gather(t.prompt_ids, left=True, fill=pad_id), gather(t.prompt_mask.long(), left=True).bool(),
        gather(t.completion_ids, fill=pad_id), gather(t.mask.long()).bool(),
    )  # fmt: skip
    # The values' extra column follows each row's last token, so padding on the right keeps its meaning.
    return Rollout(
        tokens, gather(rollout.finished.long()).bool(), gather(rollout.old_logprobs), gather(rollout.ref_logprobs), gather(rollout.values),
        gather(rollout.scores), gather(rollout.entropy), gather(rollout.parts), gather(rollout.parts_mask.long()).bool(),
        gather(rollout.sampler_logprobs),
    )  # fmt: skip


def experience_of(rollout: Rollout, cfg: PPOStage, *, kl_coef: float, mean: float, std: float) -> tuple[Experience, Tensor]:
    """Rewards, advantages and returns of a rollout; also the rewards [B, T or T + 1] for the metrics.

    Raises:
        GoneBadError: scores or log-probs that are not finite.
    """
    mask = rollout.tokens.mask
    for name, x in (("scores", rollout.scores), ("log-probs", rollout.old_logprobs[mask]), ("values", rollout.values[:, :-1][mask])):
        if not torch.isfinite(x).all():
            raise GoneBadError(f"the rollout holds {name} that are not finite numbers")
    scores = shape_scores(
        rollout.scores, rollout.finished, mean=mean if cfg.center_scores else 0.0, std=std if cfg.scale_scores else 1.0, clip=cfg.score_clip,
        missing_eos=cfg.missing_eos, missing_eos_penalty=cfg.missing_eos_penalty,
    )  # fmt: skip
    kl = maths.k1(rollout.old_logprobs, rollout.ref_logprobs, mask)
    lengths = mask.sum(dim=1, keepdim=True)
    room = lengths < cfg.sampling.max_new_tokens  # for a position after the last token
    rewards = per_token_rewards(scores, kl, mask, kl_coef=kl_coef, reward_at=cfg.reward_at, room=room.squeeze(1))
    value_mask = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
    if cfg.reward_at == "post_eos":
        value_mask |= torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1) & (lengths > 0) & room
    else:
        rewards = torch.cat([rewards, torch.zeros_like(rewards[:, :1])], dim=1)
    if cfg.whiten_rewards:
        rewards = maths.whiten(rewards, value_mask, shift_mean=False)
    after = rollout.values.gather(1, lengths).squeeze(1)
    cut_off = ~rollout.finished & (cfg.bootstrap_cut_off and cfg.reward_at == "last_token")
    advantages, returns = maths.gae(
        rewards, rollout.values, value_mask, torch.where(cut_off, after, 0.0), gamma=cfg.gamma, gae_lambda=cfg.gae_lambda
    )
    advantages = advantages[:, :-1]
    if cfg.whiten_advantages:
        advantages = maths.whiten(advantages, mask)
    return Experience(rollout.tokens, rollout.old_logprobs, advantages, rollout.values, returns, value_mask, _importance(rollout, cfg)), rewards


def _importance(rollout: Rollout, cfg: PPOStage) -> Tensor | None:
    """Weights of the policy loss; None for the native engine, which samples with the policy itself in the update's arithmetic."""
    if cfg.engine.kind == "native" or cfg.engine.importance_cap is None:
        return None
    return maths.importance_weights(rollout.old_logprobs, rollout.sampler_logprobs, rollout.tokens.mask, cap=cfg.engine.importance_cap)
