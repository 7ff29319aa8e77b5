"""What the tests of PPO runs share: a tiny base that ends its completions, reward models made by hand, configs, runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from configs.schema import Lora, PPOStage
from stages import models
from stages.ppo.build import PPOModels, build_models
from stages.ppo.collect import Clock, collect_rollout, experience_of
from stages.ppo.engines.build import build_engine
from stages.ppo.optimizer import optimizer_of
from stages.ppo.prompts import load_prompts
from stages.ppo.rollout import Rollout
from stages.ppo.train import main, start
from stages.ppo.update import update_policy
from stages.registry import Checkpoint, Parent, Registry
from stages.tokens import ModelTokens, load_tokens
from stages.tuning.adapters import lora_config
from tests.tiny import tiny_model

HELD_OUT = ["blue", "a long day", "who", "the moon and a hat", "six", "old men sing", "no", "a red dog"]
PROMPTS = ["a dog", "the cat sat on", "why", "tell me of the sea and of ships", "red"]
TRAIN = {"iterations": 3, "rollout_batch_size": 8, "num_ppo_epochs": 2, "num_minibatches": 2, "micro_batch_size": 3, "learning_rate": 1e-3}
LORA = {"rank": 4, "alpha": 8}
WHOLE, ADAPTER = ({"kind": "model", "checkpoint": f"reward/{name}"} for name in ("whole", "adapter"))


def workspace(folder: Path) -> Path:
    """A folder with base/ (a Llama that ends about one completion in two), prompts.jsonl, demonstrations.jsonl, a registry with sft/one."""
    tiny_model(folder / "base", initializer_range=0.2)
    _let_it_end(folder / "base")
    for name, texts in (("prompts", PROMPTS), ("held_out", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    rows = [{"prompt": text, "completion": text[::-1]} for text in PROMPTS]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    publish_policy(folder, "one")
    return folder


def _let_it_end(base: Path) -> None:
    """Turn the EOS embedding towards the mean hidden state."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        mean = model.model(torch.randint(0, 256, (8, 20), generator=torch.Generator().manual_seed(0))).last_hidden_state.mean((0, 1))
        model.get_input_embeddings().weight[258] = 4.0 * mean / mean.norm()
    model.save_pretrained(base)


def publish_policy(folder: Path, name: str, template: str = "raw") -> Checkpoint:
    """The base as sft/NAME."""
    origin = models.Origin(str(folder / "base"), None, None)
    tokens = load_tokens(origin, template)
    policy = models.load_policy(origin)
    write = lambda place: models.save_model(policy, tokens.tokenizer, place, eos_ids=tokens.eos_ids)  # noqa: E731
    return Registry(folder / "registry").publish("sft", name, write, parents=[origin.parent("init_from")], info={"tokenizer": tokens.facts})


def publish_reward(
    folder: Path, name: str, *, lora: bool = False, base: str = "sft/one", seed: int = 5, mean: float = 0.3, std: float = 2.0, tokens: ModelTokens | None = None,
    dropout: float = 0.0, bias: float | None = None, positions: int | None = None,
) -> Checkpoint:
    """A random reward model as reward/NAME: a whole model, or an adapter with a score head on `base`."""
    origin = models.find(base, folder / "registry")
    tokens = tokens or load_tokens(origin)
    scorer = models.scorer_from_policy(models.load_policy(origin), pad_id=tokens.pad_id, seed=seed)
    if bias is not None:
        scorer.score = models.scalar_head(scorer.score.in_features, seed=seed)
        scorer.score.bias.data.fill_(bias)
    scorer.config.max_position_embeddings = positions or scorer.config.max_position_embeddings
    stage_info: dict[str, Any] = {"score_position": "last_token", "mean": mean, "std": std, "n": 10}
    torch.manual_seed(seed)
    if lora:
        from peft import get_peft_model

        scorer = get_peft_model(scorer, lora_config(Lora(rank=3, alpha=5.0, dropout=dropout), "SEQ_CLS"))
        stage_info["adapter"] = models.adapter_facts(origin)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    under = origin if lora else None
    write = lambda place: models.save_model(scorer, tokens.tokenizer, place, eos_ids=tokens.eos_ids, base=under)  # noqa: E731
    parents: list[Parent] = [origin.parent("init_from")]
    return Registry(folder / "registry").publish("reward", name, write, parents=parents, info={"tokenizer": tokens.facts, "stage_info": stage_info})


def settings(folder: Path, output: str = "out", train: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A PPO config as a mapping; `train` and `changes` replace defaults."""
    values = {
        "name": output, "registry": str(folder / "registry"), "output": str(folder / output), "init_from": "sft/one",
        "prompts": str(folder / "prompts.jsonl"), "split": {"validation": 0, "test": 0}, "max_length": 64,
        "scorers": [{"kind": "python", "function": "tests.stage.ppo_runs:share_of_vowels"}],
        "sampling": {"max_new_tokens": 10}, "train": TRAIN | (train or {}),
    }  # fmt: skip
    return values | changes


def run(values: dict[str, Any]) -> Checkpoint:
    """Run PPO in this process, as its command does, and return what it published."""
    run_alone(values)
    return Registry(values["registry"]).resolve(f"ppo/{values['name']}")


def run_alone(values: dict[str, Any]) -> None:
    """The same, of this one process among others: only rank 0 publishes."""
    main(models.pinned(PPOStage.model_validate(values)))


def assembled(values: dict[str, Any]) -> tuple[PPOStage, Any, ModelTokens, PPOModels, Any]:
    """What `main` has in hand before it trains: config, accelerator, tokens, models, prompts."""
    cfg = PPOStage.model_validate(values)
    accelerator = start(cfg)
    origin = models.find(cfg.init_from, cfg.registry, stages=("sft", "dpo", "ppo"))
    tokens = load_tokens(origin, cfg.template)
    built = build_models(cfg, origin, tokens, accelerator.device)
    prompts, _ = load_prompts(cfg, tokens.formatter, cfg.max_length)
    return cfg, accelerator, tokens, built, prompts


def rollout_of(cfg: PPOStage, accelerator: Any, tokens: ModelTokens, built: PPOModels, prompts: Any, iteration: int = 0) -> Rollout:
    """A rollout with the config's engine."""
    engine = build_engine(cfg, built, tokens, accelerator)
    return collect_rollout(built.trained, built.reference, built.scorer, prompts, cfg, accelerator, engine=engine, iteration=iteration, tokens=tokens, clock=Clock())


def one_update(values):
    """Build, roll out, update once; (models, rollout, parameters before by name)."""
    cfg, accelerator, tokens, built, prompts = assembled(values)
    before = {name: p.detach().clone() for name, p in built.trained.named_parameters()}
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    experience, _ = experience_of(rollout, cfg, kl_coef=cfg.kl_coef, mean=built.scorer.mean, std=built.scorer.std)
    update_policy(built.trained, optimizer_of(cfg, built), accelerator, experience, cfg, 0)
    return built, rollout, before


def check_values_are_centred_scores(built, scorer):
    from tests.unit.ppo_samples import tokens_of

    prompts, completions = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    with torch.no_grad():
        values = built.trained(tokens_of(prompts, completions, pad=256)).values
    last = torch.stack([values[0, 2], values[1, 3]])  # the value after the last token reads the state the score reads
    torch.testing.assert_close(last, scorer.score_ids(prompts, completions) - 0.3, atol=1e-5, rtol=0)


def metrics(values: dict[str, Any], timed: bool = False) -> list[dict[str, float]]:
    """Lines of metrics.jsonl, without what a clock measured."""
    rows = [json.loads(line) for line in (Path(values["output"]) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if timed or not (k.startswith("time/") or k.endswith("_per_second"))} for row in rows]


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The published tensors."""
    from safetensors.torch import load_file

    return load_file(next(checkpoint.model_dir.glob("*.safetensors")))


# -- scorers


def share_of_vowels(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """A score that differs between completions."""
    return [sum(c in "aeiou" for c in str(text)) / 10 + 0.01 * len(str(text)) for text in completions]


def bonus(prompts: list[Any], completions: list[Any], bonus: list[int], finished: list[bool], **_: Any) -> list[float]:
    """A score that stands beside the prompt."""
    assert len(finished) == len(bonus)
    return [float(value) for value in bonus]


def sometimes(prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
    """A score that does not apply to every completion."""
    return [None if len(str(text)) % 2 else 0.1 * len(str(text)) for text in completions]


calls = 0


def mortal(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """The same score; in the call that PPO_TEST_DIES_AT counts, the process is killed as if by the kernel, or fails."""
    global calls
    calls += 1
    how, _, at = os.environ.get("PPO_TEST_DIES_AT", "").partition(":")
    if at and calls == int(at):
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt
    return share_of_vowels(prompts, completions, **columns)


def broken(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """A scorer that returns NaN."""
    return [float("nan")] * len(completions)
