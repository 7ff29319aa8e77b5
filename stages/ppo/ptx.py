"""The PTX mix: demonstrations that are imitated beside PPO, so that what they teach is not forgotten.

PPO-ptx of Ouyang et al. 2022 (arXiv:2203.02155, equation 2 and appendix C.4): at every optimizer step the gradient of their loss,
times a coefficient, is added to PPO's before the step is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from configs.schema import PPOStage
from stages import data
from stages.nodes.once import once_per_node
from stages.ppo.modules import PolicyAndValue
from stages.ppo.order import stream
from stages.ppo.rollout import padded
from stages.tokens import ModelTokens
from stages.training import text
from stages.training.ranks import say

SALT = 0x707478  # or demonstrations and prompts of equal number would come in one order


@dataclass(frozen=True)
class Mix:
    """Encoded demonstrations and how they are mixed in."""

    rows: Sequence[dict[str, Any]]  # each with "input_ids" and "completion_mask", as long as each other
    coef: float
    ratio: float
    pad_id: int

    def chosen(self, step: int, completions: int, seed: int) -> list[int]:
        """Row numbers of an optimizer step (from 0, over the whole run) with so many completions: the same on every process."""
        count = max(1, round(self.ratio * completions))
        return stream(len(self.rows), step * count, count, seed + SALT)

    def add_gradients(
        self, module: PolicyAndValue, accelerator: Any, numbers: Sequence[int], micro_batch_size: int
    ) -> torch.Tensor:
        """Add this process's share of coef times the gradient of the loss, which is one mean over the completion tokens of the rows `numbers`.

        Processes' gradients are summed afterwards. Returns the loss over all processes, [], nats per token, at temperature 1 as in SFT.
        """
        total = sum(sum(map(bool, self.rows[n]["completion_mask"][1:])) for n in numbers)
        by_length = sorted(numbers, key=lambda n: len(self.rows[n]["input_ids"]), reverse=True)
        mine = by_length[accelerator.process_index :: accelerator.num_processes]
        loss_sum = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        for number in range(passes(len(numbers), accelerator, micro_batch_size)):
            part = mine[number * micro_batch_size :][:micro_batch_size]
            if not part and not module.lockstep:
                break
            # A process that has none left goes on with one that counts for nothing, where the others wait for its passes.
            loss = self._loss(module, accelerator, part or by_length[-1:]) * bool(part)
            module.backward(self.coef / total * loss, "policy")
            loss_sum += loss.detach()
        return accelerator.reduce(loss_sum, reduction="sum") / total

    def _loss(self, module: PolicyAndValue, accelerator: Any, numbers: Sequence[int]) -> torch.Tensor:
        """Minus the policy's log-probs of these rows' completion tokens, summed."""
        rows = [self.rows[n] for n in numbers]
        # A row's first token is predicted by nothing, so it stands where a rollout has its prompt.
        tokens = padded([r["input_ids"][:1] for r in rows], [r["input_ids"][1:] for r in rows], self.pad_id, accelerator.device)
        counts = torch.zeros_like(tokens.mask)
        for i, row in enumerate(rows):
            counts[i, : len(row["completion_mask"]) - 1] = torch.tensor(row["completion_mask"][1:], device=counts.device).bool()
        with accelerator.autocast():
            return -module.imitation(tokens, counts).sum()


def passes(demonstrations: int, accelerator: Any, micro_batch_size: int) -> int:
    """Micro-batches of the process that has the most of so many demonstrations."""
    return -(-demonstrations // (accelerator.num_processes * micro_batch_size))


def load_mix(cfg: PPOStage, tokens: ModelTokens, policy: Any) -> tuple[Mix | None, dict[str, Any]]:
    """The training part of `ptx.data`, encoded for the policy, and what the manifest says of it; (None, {}) where nothing is mixed in.

    Raises:
        UserError: unreadable demonstrations, or none left.
    """
    if cfg.ptx is None or not cfg.ptx.coef:
        return None, {}
    sources, limit = cfg.ptx.data, text.row_limit(policy, cfg)
    loaded = once_per_node("reading ptx.data", lambda: data.read_demonstrations(sources), node_0_first=True)
    splits = data.Splitter(cfg.split).split(loaded.rows)
    rows, too_long = once_per_node("tokenising ptx.data", lambda: data.encode_demonstrations(tokens.formatter, splits.train, limit, cfg.overlong))
    say(f"ppo: {len(rows)} demonstrations to mix in with coefficient {cfg.ptx.coef:g}, {too_long} too long")
    return Mix(rows, cfg.ptx.coef, cfg.ptx.ratio, tokens.pad_id), text.data_facts(loaded, splits, {"train": too_long})
