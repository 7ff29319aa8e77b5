"""Run under accelerate launch by test_ppo_zero: every case of PPO's equality matrix in these processes, one after the other.

python -m tests.launch.ppo_zero_worker FOLDER LABEL [CASE ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from stages.ppo import train
from stages.ppo.modules import POLICY, is_of
from stages.ppo.zero import trained
from stages.ppo.zero.steps import Stepped
from stages.training.ranks import rank
from stages.zero.leave import leave
from tests.stage.ppo_runs import LORA, run_alone, settings

ADAPTER = {"kind": "model", "checkpoint": "reward/adapter"}
ENSEMBLE = {"kind": "ensemble", "checkpoints": ["reward/adapter", "reward/adapter-2"]}
WHOLE = {"kind": "model", "checkpoint": "reward/whole"}
# Two micro-batches per optimizer step on each of two processes, four on one; the first iteration trains the value function alone.
TRAIN = {"iterations": 3, "rollout_batch_size": 8, "micro_batch_size": 1, "num_ppo_epochs": 2, "num_minibatches": 2, "learning_rate": 3e-4, "value_warmup_iterations": 1,
         "max_grad_norm": 0.05, "save_every": 2, "weight_decay": 0.1}  # fmt: skip


def cases(folder: Path, label: str) -> dict[str, dict[str, Any]]:
    """Case -> config. Two processes can't share out 15 evaluated completions equally, nor 3 demonstrations of an optimizer step."""
    watched = {"evaluation": {"every": 1, "prompts": str(folder / "held_out.jsonl"), "max_prompts": 5, "samples_per_prompt": 3}}
    mix = {"ptx": {"data": str(folder / "demonstrations.jsonl"), "coef": 0.7, "ratio": 0.75}}
    # The others sample all rows of a process at once, so 8 or 4 by the number of processes, and float32 rounds products of other shapes otherwise:
    # which the smallest of the KLs shows, a difference of two sums of log-probs that are hundreds of times as large.
    one_by_one = {"sampling": {"max_new_tokens": 10, "generate_batch_size": 1}}
    kinds = {
        "full": {"scorers": [WHOLE], **mix},
        "lora": {"lora": LORA, **one_by_one, "scorers": [ADAPTER], "evaluation": watched["evaluation"] | {"scorers": [ENSEMBLE]}},
        "head": {"value_function": "head"},
        "layer": {"engine": {"gather": "layer"}, **watched},
        # Its metric, which grows with KL, has a policy published that has moved.
        "averaged": {"ema_decay": 0.8, "towards_start": 0.3, "evaluation": watched["evaluation"] | {"metric": "evaluation/kl_k3_se"}},
    }
    return {kind: settings(folder, f"{kind}-{label}", TRAIN, **changes) for kind, changes in kinds.items()}


def held(model: Any) -> list[int]:
    """Numbers of a model that this process holds, and all of them."""
    parameters = list(model.parameters())
    return [sum(getattr(p, "ds_tensor", p).numel() for p in parameters), sum(getattr(p, "ds_numel", p.numel()) for p in parameters)]


def work(folder: Path, label: str, chosen: list[str]) -> None:
    """Every case, or those chosen; each process writes what it held of each model, and how often it sampled on for the others."""
    facts: dict[str, dict[str, Any]] = {}
    equip, begin, whole = train.equip, Stepped.__init__, trained.whole
    stepped: list[Stepped] = []

    def noted(cfg: Any, accelerator: Any, built: Any, *rest: Any) -> Any:
        equipped = equip(cfg, accelerator, built, *rest)
        scorers = [part.scorer.model for part in built.scorer.parts.values() if hasattr(part.scorer, "model")]
        policy = [p for n, p in built.trained.policy.named_parameters() if ".lora_" not in n or is_of(n, POLICY)]
        facts[case] = {"trained": held(built.trained), "reference": held(built.reference.model), "scorers": [held(model) for model in scorers],
                       "policy": sum(getattr(p, "ds_numel", p.numel()) for p in policy), "gathered": []}  # fmt: skip
        return equipped

    def gathered(parameters: Any, **keywords: Any) -> Any:
        facts[case]["gathered"].append(sum(p.ds_numel for p in parameters))  # type: ignore[attr-defined]
        return whole(parameters, **keywords)

    def counted(self: Stepped, *arguments: Any) -> None:
        begin(self, *arguments)
        stepped.append(self)

    train.equip, Stepped.__init__, trained.whole = noted, counted, gathered  # type: ignore[assignment, method-assign]
    for case, values in cases(folder, label).items():
        if not chosen or case in chosen:
            run_alone(values)
    facts["idle"] = {"steps": sum(one.idle_steps for one in stepped)}
    (folder / f"facts-{label}-{rank()}.json").write_text(json.dumps(facts))
    train.equip, Stepped.__init__, trained.whole = equip, begin, whole  # type: ignore[method-assign]


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    leave()
