"""SFT by every technique: what is published computes what was trained, with our loader, merged, and with plain transformers and peft."""

from __future__ import annotations

import json
import math

import pytest

from stages import merging, models
from stages.tokens import load_tokens
from tests.stage.runs import run
from tests.stage.technique_runs import ADAPTERS, TECHNIQUES, Trained, dashed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("techniques"))


def gap(first, second) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_what_is_published_computes_what_was_trained(place, name):
    """Logits of 8 prompts: in the trainer's hands, by our loader (merged), by plain transformers or peft on the untouched base."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    origin = place.origin(name)
    tokens, trained = load_tokens(origin), place.logits[name]
    start = merging.logits(models.load_policy(models.Origin(str(place.folder / "base"), None, None)), tokens)
    assert gap(trained, start) > 1e-2, "it has learned nothing, so the rest would prove nothing"
    assert gap(trained, merging.logits(models.load_policy(origin), tokens)) < 1e-4
    plain = (AutoPeftModelForCausalLM if name in ADAPTERS else AutoModelForCausalLM).from_pretrained(origin.folder).eval()
    assert gap(trained, merging.logits(plain, tokens)) < 1e-4
    if name in ADAPTERS:
        assert gap(trained, merging.logits(models.load_policy(models.Origin(str(place.merged(name)), None, None)), tokens)) < 1e-4
        config = json.loads((origin.checkpoint.model_dir / "adapter_config.json").read_text())
        assert config.get("init_lora_weights", True) in (True, "gaussian"), "a loader would change the base before it loads this"
        assert config["base_model_name_or_path"] == str(place.folder / "base")


# -- children: reward, DPO and PPO on every technique, in full and with adapters

VARIANTS = ({}, {"dora": True}, {"init": "pissa"}, {"rslora": True}, {"init": "olora", "learning_rate_ratio": 4.0})
PARENTS = [name for name in TECHNIQUES if name not in ("thaw", "pissa_fast", "dora_pissa")]
# Full and adapted children take turns; the adapted ones are of all variants. Of two parents there are both.
PAIRS = [(name, child) for number, name in enumerate(PARENTS) for child in ("full", "lora") if name in ("full", "dora") or (number % 2 == 0) == (child == "full")]


def lora_of(stage: str, name: str, child: str):
    """The child's adapters: for PPO one of the variants that it takes."""
    variants = VARIANTS if stage != "ppo" else [variant for variant in VARIANTS if not {"init", "learning_rate_ratio"} & variant.keys()]
    return None if child == "full" else {"rank": 2, "alpha": 4} | variants[PARENTS.index(name) % len(variants)]


def numbers(place, stage: str, name: str, init_from: str, lora) -> list[dict[str, float]]:
    """metrics.jsonl of a child, without what a clock measured; what it publishes computes what it trained."""
    trained = place.trained(stage, place.settings(stage, name, init_from=init_from, lora=lora))
    checkpoint = place.registry.resolve(f"{stage}/{dashed(name)}")
    origin = models.Origin(checkpoint.ref, checkpoint, place.registry)
    assert gap(trained, merging.logits((models.load_scorer if stage == "reward" else models.load_policy)(origin), load_tokens(origin))) < 1e-4
    rows = [json.loads(line) for line in (place.folder / f"{stage}-{name}" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/") and "per_second" not in key} for row in rows]


def alike(first, second) -> bool:
    return len(first) == len(second) and all(a.keys() == b.keys() and all(b[key] == pytest.approx(a[key], abs=1e-5, nan_ok=True) for key in a) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("stage", ["reward", "dpo"])
@pytest.mark.parametrize(("name", "child"), PAIRS)
def test_every_technique_is_a_parent_of_reward_and_dpo(place, stage, name, child):
    """The child's numbers are those of a child of the merged model that was exported."""
    checkpoint, lora = place.checkpoint(name), lora_of(stage, name, child)
    own = numbers(place, stage, f"{name}-{child}", checkpoint.ref, lora)
    if stage == "dpo":
        assert own[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5), "policy and reference are the same model at the start, also where init takes a part of the base"
    if name in ADAPTERS:
        assert alike(own, numbers(place, stage, f"{name}-{child}-merged", str(place.merged(name)), lora))


@pytest.mark.parametrize(("name", "child"), PAIRS)
def test_every_technique_is_a_parent_of_ppo(place, name, child):
    """The same, with a reward model trained on the technique in place where PPO has adapters (one backbone)."""
    from tests.stage import ppo_runs

    place.checkpoint(name)
    rows, lora = [], lora_of("ppo", name, child)
    for label, start in (("own", f"sft/{dashed(name)}"), *((("merged", str(place.merged(name))),) if name in ADAPTERS else ())):
        scorers = [{"kind": "python", "function": "tests.stage.ppo_runs:share_of_vowels"}]
        if lora is not None:
            reward = f"{name}-{label}-scorer"
            run("reward", place.settings("reward", reward, init_from=start, lora={"rank": 2, "alpha": 4}))
            scorers = [{"kind": "model", "checkpoint": f"reward/{dashed(reward)}"}]
        values = ppo_runs.settings(
            place.folder, dashed(f"ppo-{name}-{child}-{label}"), {"iterations": 1, "rollout_batch_size": 4, "num_ppo_epochs": 1, "num_minibatches": 1}, init_from=start,
            prompts=str(place.folder / "sft.jsonl"), scorers=scorers, lora=lora, evaluation=None, sampling={"max_new_tokens": 4}, split={"validation": 0.1, "test": 0},
        )  # fmt: skip
        ppo_runs.run(values)
        rows.append([{key: value for key, value in row.items() if not key.startswith("objective/score/")} for row in ppo_runs.metrics(values)])
    assert rows[0][0]["objective/kl"] == pytest.approx(0, abs=1e-5), "policy and reference are the same model at the start"
    assert alike(rows[0], rows[-1])
