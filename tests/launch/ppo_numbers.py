"""PPO in two processes, one of which meets numbers gone bad; each writes what it saw."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.ppo import train
from stages.ppo.modules import PolicyAndValue
from stages.ppo.zero.trained import ShardedPolicyAndValue
from stages.training.ranks import rank
from tests.launch.ppo_mortal import run_in_processes


def state_of(built: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """This process's share of what is trained, and of the optimizer's state."""
    weights = {f"weights.{n}": getattr(p, "ds_tensor", p).detach().clone() for n, p in built.trained.named_parameters() if p.requires_grad}
    if hasattr(optimizer, "shard"):
        return weights | optimizer.shard()
    return weights | {f"{i}.{name}": value.clone() for i, entry in optimizer.state_dict()["state"].items() for name, value in entry.items()}


def run_with_faults(values: dict[str, Any], zero_stage: int, folder: Path) -> tuple[list[int], list[dict[str, bool]]]:
    """Rank 1 has a gradient of NaN in the first step of iteration 2, and weights of NaN from iteration 4 on. How the processes ended, and
    for each whether iteration 5 began with the state that iteration 4 began with."""
    run_iteration = train.run_iteration
    began: dict[int, dict[str, torch.Tensor]] = {}
    now = {"iteration": -1, "passes": 0}

    def watched(cfg: Any, accelerator: Any, built: Any, engine: Any, optimizer: Any, prompts: Any, tokens: Any, iteration: int, *rest: Any) -> Any:
        began[iteration] = state_of(built, optimizer)
        now.update(iteration=iteration, passes=0)
        if iteration == 4:
            same = began[3].keys() == began[4].keys() and all(torch.equal(value, began[4][name]) for name, value in began[3].items())
            (folder / f"ppo-seen-{rank()}.json").write_text(json.dumps({"back": same, "moved": not torch.equal(*(next(iter(began[i].values())) for i in (2, 3)))}))
        if iteration == 3 and rank() == 1:
            for parameter in built.trained.policy_parameters():
                getattr(parameter, "ds_tensor", parameter).detach().fill_(math.nan)
        return run_iteration(cfg, accelerator, built, engine, optimizer, prompts, tokens, iteration, *rest)

    def faulty(original: Any) -> Any:
        def backward(self: Any, loss: torch.Tensor, of: str) -> None:
            now["passes"] += 1
            original(self, loss * math.nan if rank() == 1 and now["iteration"] == 1 and now["passes"] == 1 else loss, of)

        return backward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run_iteration", watched)
        for module in (PolicyAndValue, ShardedPolicyAndValue):
            patch.setattr(module, "backward", faulty(module.backward))
        ended = run_in_processes(values, 2, zero_stage=zero_stage)
    return ended, [json.loads(file.read_text()) for file in sorted(folder.glob("ppo-seen-*.json"))]
