"""What published PPO recipes do, as data: for every row of the table that a source settles, the field, the value and where it says so.

Sources:
    nplus: Huang et al. 2024, arXiv:2403.17031; code vwxyzjn/summarize_from_feedback_details, ppo.py and reward.py at 3f14a17.
    instructgpt: Ouyang et al. 2022, arXiv:2203.02155, section 3.5 and appendix C.
    openrlhf: OpenRLHF at f5b3f08, the defaults of cli/train_ppo_ray.py, under the flags of examples/scripts/train_ppo_ray_hybrid_engine.sh.

Sizes (completions per iteration, iterations, lengths, micro-batches) are a matter of task and machine: no preset sets them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


class Share(NamedTuple):
    """A number of iterations that the source gives as a share of all of them."""

    of_iterations: float


class Setting(NamedTuple):
    """One field, what the source sets it to, and where that is written. `within`: only where the config has that section."""

    field: str
    value: Any
    source: str
    within: str | None = None


class Preset(NamedTuple):
    """A recipe: its settings, and what of it can't be set or is not printed."""

    settings: tuple[Setting, ...]
    notes: tuple[str, ...]


NPLUS = Preset(
    settings=(
        Setting("kl_coef", 0.05, "PpoHParams.kl_coef"),
        Setting("adaptive_kl", None, "the coefficient stays"),
        Setting("missing_eos", "replace", "non_eos_penalty: torch.where, not a subtraction"),
        Setting("missing_eos_penalty", 1.0, "penalty_reward_value -1"),
        Setting("reward_at", "post_eos", "rewards[sequence_lengths + 1] += scores, or on the last token where there is no position after it"),
        Setting("center_scores", True, "reward.py stores the mean score of the demonstrations as the reward model's bias"),
        Setting("scale_scores", False, "a bias and no gain"),
        Setting("score_clip", None, "scores are not clipped"),
        Setting("gamma", 1.0, "PpoHParams.gamma"),
        Setting("gae_lambda", 0.95, "PpoHParams.lam"),
        Setting("bootstrap_cut_off", False, "the value after the last token is 0"),
        Setting("whiten_advantages", True, "masked_whiten(advantages)"),
        Setting("whiten_rewards", False, "PpoHParams.whiten_rewards"),
        Setting("clip_range", 0.2, "PpoHParams.cliprange"),
        Setting("clip_range_high", None, "symmetric"),
        Setting("dual_clip", None, "no such bound"),
        Setting("value_clip_range", 0.2, "PpoHParams.cliprange_value"),
        Setting("vf_coef", 0.1, "PpoHParams.vf_coef"),
        Setting("value_function", "auto", "the critic is a copy of the reward model"),
        Setting("ema_decay", None, "the last weights are published"),
        Setting("towards_start", None, "the weights as they were trained"),
        Setting("sampling.temperature", 0.7, "Args.temperature"),
        Setting("sampling.stop_at_eos", True, "samples a fixed length and cuts at the first EOS: the same tokens"),
        Setting("train.num_ppo_epochs", 4, "PpoHParams.noptepochs"),
        Setting("train.num_minibatches", 1, "PpoHParams.nminibatches"),
        Setting("train.learning_rate", 3e-6, "Args.lr"),
        Setting("train.value_learning_rate", None, "one learning rate"),
        Setting("train.schedule", "linear", "frac = 1 - (update - 1) / num_updates"),
        Setting("train.learning_rate_floor", 0.0, "falls to 0"),
        Setting("train.warmup_iterations", 0, "Args.warm_up_steps"),
        Setting("train.adam_beta1", 0.9, "torch's default, which it leaves"),
        Setting("train.adam_beta2", 0.999, "torch's default, which it leaves"),
        Setting("train.adam_epsilon", 1e-5, "Args.eps"),
        Setting("train.weight_decay", 0.01, "torch.optim.AdamW's default, which it leaves"),
        Setting("train.max_grad_norm", None, "gradients are not clipped"),
        Setting("train.value_warmup_iterations", 0, "policy and critic start together"),
    ),
    notes=(
        "its 53 tokens per completion (sampling.max_new_tokens) and 512 completions per iteration (train.rollout_batch_size) are for TL;DR and are not set",
        "advantages are whitened and losses averaged over all processes; its code does both per process",
    ),
)

INSTRUCTGPT = Preset(
    settings=(
        Setting("kl_coef", 0.02, "C.4: beta = 0.02"),
        Setting("adaptive_kl", None, "C.4: the coefficient stays"),
        Setting("center_scores", True, "3.5: a bias makes the demonstrations' mean score 0"),
        Setting("scale_scores", False, "3.5: a bias and no gain"),
        Setting("gamma", 1.0, "C.4: no discount"),
        Setting("clip_range", 0.2, "C.4: PPO clip ratio"),
        Setting("clip_range_high", None, "C.4: one clip ratio"),
        Setting("dual_clip", None, "not in Schulman et al. 2017, which it follows"),
        Setting("value_function", "auto", "C.4: the value function is initialised from the reward model"),
        Setting("ema_decay", 0.992, "C.4: exponential moving averages of the weights"),
        Setting("towards_start", None, "the weights as they were trained"),
        Setting("ptx.coef", 27.8, "C.4: gamma = 27.8", within="ptx"),
        Setting("ptx.ratio", 8.0, "C.4: 8 times more pretraining examples than episodes", within="ptx"),
        Setting("sampling.temperature", 1.0, "C.4"),
        Setting("train.num_ppo_epochs", 1, "C.4: a single inner epoch"),
        Setting("train.num_minibatches", 8, "C.4: batches of 512 in minibatches of 64"),
        Setting("train.value_learning_rate", 9e-6, "C.4: for policies of 1.3B and 6B; 5e-6 for 175B"),
        Setting("train.schedule", "constant", "C.4: constant after the warm-up"),
        Setting("train.warmup_iterations", 10, "C.4: 10 iterations, from a tenth of the peak"),
        Setting("train.adam_beta1", 0.9, "C: all models"),
        Setting("train.adam_beta2", 0.95, "C: all models"),
    ),
    notes=(
        "not printed in the paper and left alone: the policy's learning rate (E.9 tries 2.55e-6 to 2.55e-5; 9.65e-6 is that of its SFT models), gae_lambda, vf_coef, "
        "value_clip_range, score_clip, missing_eos, whitening, Adam's epsilon, weight decay, gradient clipping",
        "without a `ptx:` section this is the paper's PPO; with one (`ptx: {data: demonstrations.jsonl}`) its PPO-ptx, on demonstrations where the paper takes pretraining text",
        "the paper does not say how often the average is updated; here it is after every optimizer step",
        "its 512 completions per iteration and 256k episodes are not set",
    ),
)

OPENRLHF = Preset(
    settings=(
        Setting("kl_coef", 0.01, "--init_kl_coef"),
        Setting("adaptive_kl", None, "--kl_target None"),
        Setting("missing_eos", "none", "no rule for completions that were cut off"),
        Setting("reward_at", "last_token", "compute_reward: the last action"),
        Setting("center_scores", True, "--normalize_reward"),
        Setting("scale_scores", True, "--normalize_reward"),
        Setting("score_clip", 10.0, "--reward_clip_range -10 10"),
        Setting("gamma", 1.0, "--gamma"),
        Setting("gae_lambda", 1.0, "--lambd"),
        Setting("bootstrap_cut_off", False, "get_advantages_and_returns: the value after the last action is 0"),
        Setting("whiten_advantages", True, "over all experiences"),
        Setting("whiten_rewards", False, "no such step"),
        Setting("clip_range", 0.2, "--eps_clip"),
        Setting("clip_range_high", None, "--eps_clip_low_high None"),
        Setting("dual_clip", None, "--dual_clip None"),
        Setting("value_clip_range", 0.5, "--value_clip"),
        Setting("vf_coef", 1.0, "the critic has an optimizer of its own, and the whole loss"),
        Setting("value_function", "auto", "--critic_pretrain: the reward model"),
        Setting("ema_decay", None, "--enable_ema off"),
        Setting("towards_start", None, "the weights as they were trained"),
        Setting("sampling.temperature", 1.0, "--temperature"),
        Setting("sampling.stop_at_eos", True, "vLLM stops at EOS"),
        Setting("train.num_ppo_epochs", 1, "--max_epochs"),
        Setting("train.num_minibatches", 8, "--rollout_batch_size 1024, --train_batch_size 128"),
        Setting("train.learning_rate", 5e-7, "--actor_learning_rate"),
        Setting("train.value_learning_rate", 9e-6, "--critic_learning_rate"),
        Setting("train.schedule", "cosine", "--lr_scheduler cosine_with_min_lr"),
        Setting("train.learning_rate_floor", 0.1, "min_lr: a tenth of the peak"),
        Setting("train.warmup_iterations", Share(0.03), "--lr_warmup_ratio 0.03, rounded up"),
        Setting("train.adam_beta1", 0.9, "--adam_betas"),
        Setting("train.adam_beta2", 0.95, "--adam_betas"),
        Setting("train.adam_epsilon", 1e-8, "torch's default, which it leaves"),
        Setting("train.weight_decay", 0.0, "--l2"),
        Setting("train.max_grad_norm", 1.0, "--max_norm"),
        Setting("train.value_warmup_iterations", 0, "--freezing_actor_steps -1"),
    ),
    notes=(
        "its 1024 completions per iteration and 1024 new tokens are not set",
        "its schedule counts optimizer steps and starts at 0; here it counts iterations and starts at a tenth of the peak",
        "scores are centred and scaled by the mean and spread of the demonstrations' scores; its reward models keep those of its preference pairs",
        "a loss is one mean over the tokens of an optimizer step; its code averages the means of micro-batches",
    ),
)

PRESETS: Mapping[str, Preset] = {"nplus": NPLUS, "instructgpt": INSTRUCTGPT, "openrlhf": OPENRLHF}


def filled(data: Mapping[str, Any], default_iterations: int) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """A PPO section with its preset's values where it has none of its own; also the paths of what was filled in.

    A key that is there, also as null, is the user's and stays. Sections may be models: what was not set in them counts as absent.
    A preset that does not exist and a section that is none are left to the schema, which reports them.
    """
    result: dict[str, Any] = dict(data)
    paths: list[tuple[str, ...]] = []
    name = data.get("preset")
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        return result, paths
    iterations = _get(_as_mapping(data.get("train")), "iterations", default_iterations)
    for setting in preset.settings:
        section, _, key = setting.field.rpartition(".")
        if setting.within is not None and data.get(setting.within) is None:
            continue
        here = _as_mapping(result.get(section, {})) if section else result
        if not isinstance(here, dict) or key in here:
            continue
        here[key] = resolved(setting.value, iterations)
        if section:
            result[section] = here
        paths.append(tuple(setting.field.split(".")))
    return result, paths


def resolved(value: Any, iterations: Any) -> Any:
    """A preset's value for a run of so many iterations."""
    if not isinstance(value, Share):
        return value
    return math.ceil(value.of_iterations * iterations) if isinstance(iterations, int) else 0


def _as_mapping(section: Any) -> Any:
    """A section as a mapping of its own of what was set in it; what is no section stays as it is."""
    if isinstance(section, BaseModel):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return dict(section) if isinstance(section, Mapping) else section


def _get(section: Any, key: str, default: Any) -> Any:
    return section.get(key, default) if isinstance(section, dict) else default


def described(config: Any) -> list[str]:
    """What the preset of a checked PPO config (or of a chain's) changes and what it can't do, a line each; [] without one.

    Told from the values alone, so a config that was saved with every field written out describes itself alike.
    """
    cfg = getattr(config, "ppo", None) or config
    if getattr(cfg, "preset", None) is None:
        return []
    preset, rows, kept = PRESETS[cfg.preset], [], []
    for setting in preset.settings:
        if setting.within is not None and getattr(cfg, setting.within) is None:
            continue
        default, value = _default(type(cfg), setting.field), _at(cfg, setting.field)
        wanted = resolved(setting.value, cfg.train.iterations)
        if value != wanted:
            kept.append(f"  {setting.field}: {_show(value)} is yours; the preset has {_show(wanted)} ({setting.source})")
        elif value != default:
            rows.append(f"  {setting.field}: {_show(default)} -> {_show(value)} ({setting.source})")
    return [f"preset {cfg.preset} changes:", *rows, *kept, *(f"  note: {note}" for note in preset.notes)]


def _at(cfg: Any, field: str) -> Any:
    for part in field.split("."):
        cfg = getattr(cfg, part)
    return cfg


def _default(model: type[BaseModel], field: str) -> Any:
    """The schema's default of a dotted field."""
    section, _, key = field.rpartition(".")
    if section:
        from configs.problems import models_in

        model = models_in(model.model_fields[section].annotation)[0]
    return model.model_fields[key].get_default()


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "nothing" if value is PydanticUndefined else str(value)
