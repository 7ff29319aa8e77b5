"""One evaluation of the policy: fixed prompts, fixed sampling noise, scores, KL to the reference, and what was written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from blake3 import blake3

from configs.schema import PPOStage
from rewards.combine import Scores
from rewards.protocol import text_of
from stages.evaluation.statistics import mean_and_se, win_rate
from stages.ppo import maths
from stages.ppo.build import PPOModels
from stages.ppo.collect import PromptSet, columns_of
from stages.ppo.rollout import cut, padded
from stages.ppo.sampling import sample
from stages.tokens import ModelTokens
from stages.training import watchdog


class Written(NamedTuple):
    """One completion and what was found of it; plain values, for they travel between processes."""

    prompt: str
    completion: str
    finished: bool
    length: int  # tokens
    proxy: float  # weighted sum of the training scorers
    heldout: float  # of the held-out scorers, else the same
    parts: dict[str, float | None]  # each held-out scorer's own value
    k1: float  # nats, summed over the completion
    k3: float


@dataclass(frozen=True)
class EvaluationSet:
    """What stays the same in every evaluation of a run: the prompts, each completed `samples` times."""

    prompts: PromptSet
    samples: int
    seed: int
    fingerprint: str  # of the prompts

    @property
    def groups(self) -> list[int]:
        """The prompt's number of each completion [N]."""
        return [number for number in range(len(self.prompts.ids)) for _ in range(self.samples)]

    def noise(self, index: int) -> int:
        """The seed of completion `index`: 128 bits that depend on the run's seed, the prompt and the sample's number, and on no iteration."""
        number, sample_number = divmod(index, self.samples)
        text = f"evaluation {self.seed} {sample_number} {self.prompts.ids[number]}"
        return int.from_bytes(blake3(text.encode()).digest(16), "big")


def complete(built: PPOModels, chosen: EvaluationSet, cfg: PPOStage, accelerator: Any, tokens: ModelTokens) -> list[Written]:
    """Every completion of the set by the policy as it is, scored: the same list on every process, each having made its share."""
    from accelerate.utils import gather_object

    share = math.ceil(len(chosen.groups) / accelerator.num_processes)
    mine = list(range(len(chosen.groups))[accelerator.process_index * share :][:share])
    # Where a forward pass is a collective, a process that has fewer goes along with copies that nobody sees.
    spare = [0] * (share - len(mine)) if built.trained.lockstep else []
    written = _complete(built, chosen, mine + spare, cfg, accelerator, tokens)[: len(mine)] if mine or spare else []
    return gather_object(written) if accelerator.num_processes > 1 else written


def _complete(built: PPOModels, chosen: EvaluationSet, mine: Sequence[int], cfg: PPOStage, accelerator: Any, tokens: ModelTokens) -> list[Written]:
    """The completions with the numbers `mine`."""
    built.trained.eval()
    numbers = [chosen.groups[i] for i in mine]
    prompt_ids = [chosen.prompts.ids[n] for n in numbers]
    with built.trained.for_sampling(), accelerator.autocast():
        samples = sample(
            built.trained.sampler, prompt_ids, sampling=cfg.sampling, eos_ids=tokens.eos_ids, pad_id=tokens.pad_id, seeds=[chosen.noise(i) for i in mine]
        )
    ids, texts = [s.completion_ids for s in samples], [tokens.formatter.completion_text(s.completion_ids) for s in samples]
    prompts = [chosen.prompts.texts[n] for n in numbers]
    columns = columns_of([chosen.prompts.columns[n] for n in numbers]) | {"finished": [s.finished for s in samples]}

    def scores(scorer: Any) -> Scores:
        return scorer.score(prompts, texts, token_key=tokens.key, prompt_ids=prompt_ids, completion_ids=ids, **columns)

    proxy = scores(built.scorer)
    heldout = scores(built.heldout_scorer) if built.heldout_scorer is not None else proxy
    with built.reference.at_hand():
        k1, k3 = _kl(built, prompt_ids, ids, cfg, accelerator, tokens.pad_id)
    return [
        Written(
            text_of(prompts[i]), texts[i], s.finished, len(s.completion_ids), proxy.total[i], heldout.total[i],
            {name: values[i] for name, values in heldout.parts.items()}, k1[i], k3[i],
        )
        for i, s in enumerate(samples)
    ]  # fmt: skip


@torch.no_grad()
def _kl(
    built: PPOModels, prompt_ids: list[list[int]], completion_ids: list[list[int]], cfg: PPOStage, accelerator: Any, pad_id: int
) -> tuple[list[float], list[float]]:
    """KL to the reference of each completion, k1 and k3, nats at the sampling temperature, in micro-batches of rows of similar length."""
    tokens = padded(prompt_ids, completion_ids, pad_id, accelerator.device)
    k1, k3 = torch.zeros(len(prompt_ids), dtype=torch.float64), torch.zeros(len(prompt_ids), dtype=torch.float64)
    for rows in torch.argsort(tokens.attention_mask.sum(dim=1), descending=True, stable=True).split(cfg.train.micro_batch_size):
        part = cut(tokens, rows)
        watchdog.beat()
        with accelerator.autocast():
            ours = built.trained.logprobs(part).logprobs
            theirs = built.reference.logprobs(part)
        k1[rows.cpu()] = maths.k1(ours, theirs, part.mask).double().sum(dim=1).cpu()
        k3[rows.cpu()] = maths.k3(ours, theirs, part.mask).double().sum(dim=1).cpu()
    return k1.tolist(), k3.tolist()


def metrics_of(written: Sequence[Written], groups: Sequence[int], start: Sequence[float] | None, cfg: PPOStage) -> dict[str, float]:
    """Means over completions with standard errors clustered by prompt, and the win rate of the held-out score against `start` [N].

    `start` are the starting policy's held-out scores; None where this is the start. A standard error that a single prompt
    can't give is left out.
    """
    heldout = [w.heldout for w in written]
    found = {}
    columns = {
        "score": [w.proxy for w in written], "heldout_score": heldout, "kl": [w.k1 for w in written], "kl_k3": [w.k3 for w in written],
        "length": [float(w.length) for w in written],
    }  # fmt: skip
    for name, values in columns.items():
        estimate = mean_and_se(values, groups)
        found[f"evaluation/{name}"] = estimate.mean
        if estimate.se is not None:
            found[f"evaluation/{name}_se"] = estimate.se
    for name in written[0].parts:
        known = [w.parts[name] for w in written if w.parts[name] is not None]
        if known:
            found[f"evaluation/heldout_score/{name}"] = float(np.mean(known))  # type: ignore[arg-type]
    found["evaluation/eos_rate"] = float(np.mean([w.finished for w in written])) if cfg.sampling.stop_at_eos else 0.0
    ours, theirs = ranks(heldout, heldout if start is None else start)
    won = win_rate(ours, groups, theirs, groups, seed=cfg.seed)
    return found | {"evaluation/win_rate": won.rate, "evaluation/win_rate_low": won.low, "evaluation/win_rate_high": won.high}


def ranks(ours: Sequence[float], theirs: Sequence[float]) -> tuple[Any, Any]:
    """The scores' places among all of them, equal where neighbours differ by less than 1e-5 of the largest of ours.

    A completion that both have written is a tie, although a reward model's rounding differs between batches. Places, not multiples of
    that unit: two numbers that differ by rounding may lie on both sides of a multiple's end.
    """
    scores = np.asarray([*ours, *theirs])
    order = np.argsort(scores, kind="stable")
    places = np.empty(len(scores))
    places[order] = np.cumsum(np.diff(scores[order], prepend=scores[order[:1]]) > 1e-5 * max(1e-30, *map(abs, ours)))
    return places[: len(ours)], places[len(ours) :]
