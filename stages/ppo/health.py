"""Health checks of a PPO run (stages/health/findings.py says what a check is): what metrics.jsonl holds up to now, an entry per iteration."""

from __future__ import annotations

import math

from configs.schema import PPOStage
from stages.health import findings as shared
from stages.health.findings import PREFIX, Check, Finding, History, counts, stop

__all__ = ["CHECKS", "PREFIX", "Finding", "counts", "examine", "findings", "stop"]

HELDOUT = "evaluation/heldout_score"  # where it stands there was an evaluation
TREND = 4  # iterations pooled where one alone is too noisy
COMPLETIONS = 32  # from this many on, "none of them" is no accident
KL_ERRORS, KL_ERRORS_AT_ONCE = 3.0, 5.0  # standard errors below 0: pooled over TREND iterations, in a single one
KL_ROUNDING = 1e-3  # nats per completion; two bf16 forwards of one model differ by about that
FIRST_APPROX_KL = 0.01  # nats per token; bf16 rounding gives about 1e-4
SHORT, CLIPPED_SCORES, VALUE_CLIPPED = 0.25, 0.2, 0.5  # shares of completions, of completions, of tokens
PATIENCE = 3  # evaluations without a new best held-out score


def findings(history: History, cfg: PPOStage) -> list[Finding]:
    """What is wrong in the newest iteration of `history`."""
    return shared.findings(CHECKS, history, cfg.health, cfg)


def examine(metrics: dict[str, float], before: History, cfg: PPOStage) -> tuple[dict[str, float], list[Finding]]:
    """The metrics of an iteration with what failed in it, and of that what had not failed in the iteration before."""
    return shared.examine(CHECKS, metrics, before, cfg.health, cfg)


# -- the checks


def _latest(history: History, completions: int, cfg: PPOStage) -> History:
    """The newest iterations that hold at least so many completions together; empty while there are too few."""
    count = math.ceil(completions / cfg.train.rollout_batch_size)
    return history[-count:] if len(history) >= count else []


def _mean(history: History, key: str) -> float:
    return sum(line[key] for line in history) / len(history)


def negative_kl(history: History, cfg: PPOStage) -> str | None:
    """k1 is unbiased and a KL is never negative, so its mean may fall below 0 by chance only."""
    recent = [line for line in history[-TREND:] if "objective/kl_se" in line]
    pooled, error = _mean(recent, "objective/kl"), math.sqrt(sum(line["objective/kl_se"] ** 2 for line in recent)) / len(recent)
    if len(recent) > 1 and pooled < -KL_ROUNDING - KL_ERRORS * error:
        return f"mean KL (k1) of the last {len(recent)} iterations {pooled:.4f} ± {error:.4f} nats"
    kl, error = history[-1]["objective/kl"], history[-1]["objective/kl_se"]
    return f"mean KL (k1) {kl:.4f} ± {error:.4f} nats" if kl < -KL_ROUNDING - KL_ERRORS_AT_ONCE * error else None


def ratio_explosion(history: History, cfg: PPOStage) -> str | None:
    """A token whose probability an update multiplied."""
    ratio = history[-1]["policy/max_ratio"]
    return f"largest ratio {ratio:.3g}, limit {cfg.health.max_ratio:g}" if ratio > cfg.health.max_ratio else None


def first_step(history: History, cfg: PPOStage) -> str | None:
    """Before the first optimizer step of an iteration the policy is what sampled: old and new log-probs are the same."""
    kl, ratio = history[-1]["policy/first_approx_kl"], history[-1]["policy/first_ratio"]
    return f"before the first optimizer step approx_kl is {kl:.3g} and the largest ratio {ratio:.3g}, expected 0 and 1" if kl > FIRST_APPROX_KL else None


def clip_fraction(history: History, cfg: PPOStage) -> str | None:
    """Clipped tokens have no gradient: the later passes over a rollout learn from what is left."""
    share = history[-1]["policy/clip_fraction"]
    return f"clip fraction {share:.2f}, limit {cfg.health.max_clip_fraction:g}" if share > cfg.health.max_clip_fraction else None


def entropy_collapse(history: History, cfg: PPOStage) -> str | None:
    """The policy samples about one completion per prompt and can find no better one."""
    now, start = history[-1]["policy/entropy"], history[0]["policy/entropy"]
    return f"entropy {now:.3g} nats per token, {start:.3g} in the first iteration" if now < cfg.health.min_entropy_share * start else None


def no_eos(history: History, cfg: PPOStage) -> str | None:
    """Every completion is cut off: the score says nothing about an ending, and every score is the penalty of a missing EOS."""
    recent = _latest(history, COMPLETIONS, cfg)
    if not cfg.sampling.stop_at_eos or not recent or any(line["rollout/eos_rate"] > 0 for line in recent):
        return None
    return f"none of the last {len(recent) * cfg.train.rollout_batch_size} completions ended with an EOS, mean length {recent[-1]['rollout/length']:.1f} tokens"


def length_drift(history: History, cfg: PPOStage) -> str | None:
    """Completions became much longer or shorter than the start policy's: the cheapest way to a score that pays for length."""
    if len(history) < 2:
        return None
    count = min(TREND, len(history) // 2)
    start, now = _mean(history[:count], "rollout/length"), _mean(history[-count:], "rollout/length")
    drift = max(now, 1e-9) / max(start, 1e-9)
    return f"mean length {now:.1f} tokens, {start:.1f} at the start" if max(drift, 1 / drift) > cfg.health.max_length_factor else None


def short_completions(history: History, cfg: PPOStage) -> str | None:
    """Completions of no or one token: there is next to nothing to learn from."""
    share = history[-1]["rollout/short_completions"]
    return f"{share:.0%} of the completions have at most one token" if share > SHORT else None


def explained_variance(history: History, cfg: PPOStage) -> str | None:
    """Values that predict returns worse than a constant add noise to the advantages."""
    recent = history[-TREND:]
    if len(history) < cfg.train.value_warmup_iterations + cfg.health.grace_iterations + TREND:
        return None
    mean = _mean(recent, "value/explained_variance")
    return f"explained variance {mean:+.2f} over the last {len(recent)} iterations" if mean < 0 else None


def value_clip(history: History, cfg: PPOStage) -> str | None:
    """Clipped values have no gradient."""
    share = history[-1]["value/clip_fraction"]
    return f"{share:.0%} of the values are clipped at {cfg.value_clip_range:g} from those of the rollout" if share > VALUE_CLIPPED else None


def flat_scores(history: History, cfg: PPOStage) -> str | None:
    """Scores that do not differ say nothing about what is better."""
    recent = _latest(history, COMPLETIONS, cfg)
    tiny = [line["objective/score_se"] <= 1e-6 * max(1.0, abs(line["objective/score"])) for line in recent]
    return f"all completions scored {recent[-1]['objective/score']:.4g}" if tiny and all(tiny) else None


def score_clipped(history: History, cfg: PPOStage) -> str | None:
    """Beyond the clip a better completion earns no more."""
    share = history[-1]["objective/score_clipped"]
    return f"{share:.0%} of the centred scores are clipped at ±{cfg.score_clip:g}" if share > CLIPPED_SCORES else None


def sampler_gap(history: History, cfg: PPOStage) -> str | None:
    """The sampler's distribution is not the policy that is trained."""
    gap = history[-1]["rollout/sampler_gap"]
    return f"the sampler's log-prob of a token is off by {gap:.3g} nats, limit {cfg.health.max_sampler_gap:g}" if gap > cfg.health.max_sampler_gap else None


def skipped_steps(history: History, cfg: PPOStage) -> str | None:
    """Optimizer steps that were skipped because a gradient was not finite."""
    count = history[-1]["policy/skipped_steps"]
    return f"{count:.0f} of {cfg.train.num_ppo_epochs * cfg.train.num_minibatches} optimizer steps skipped" if count else None


def over_optimisation(history: History, cfg: PPOStage) -> str | None:
    """The score that is trained on goes on rising while one that is not has stopped (Gao et al. 2022, arXiv:2210.10760)."""
    seen = [line for line in history if HELDOUT in line]
    best = max(range(len(seen)), key=lambda i: seen[i][HELDOUT], default=0)
    if len(seen) - 1 - best < PATIENCE:
        return None
    then, now = seen[best], seen[-1]
    error = math.hypot(then.get("evaluation/score_se", 0.0), now.get("evaluation/score_se", 0.0))
    if now["evaluation/score"] - then["evaluation/score"] <= 2 * error:
        return None
    return (
        f"score {then['evaluation/score']:+.3f} -> {now['evaluation/score']:+.3f} while the held-out score went "
        f"{then[HELDOUT]:+.3f} -> {now[HELDOUT]:+.3f} in {len(seen) - 1 - best} evaluations"
    )


CHECKS = (
    Check(
        "negative_kl", negative_kl, "completions do not come from the distribution whose log-probs are taken (another temperature, top-k or top-p in a rollout "
        "engine, weights that were not synced), so the KL penalty has the wrong sign",
        "look at rollout/sampler_gap; set engine.kind: native; take sampling parameters out of the engine's own config",
    ),
    Check(
        "ratio_explosion", ratio_explosion, "updates are too large for the rollout they learn from",
        "lower train.learning_rate or train.num_ppo_epochs, set train.max_grad_norm, or bound the loss with dual_clip: 3",
    ),
    Check(
        "first_step", first_step, "the update does not compute the log-probs that the rollout stored: dropout, another precision or attention kernel, or wrong positions",
        "use train.precision: fp32 or another attn_implementation, and report the architecture",
    ),
    Check(
        "clip_fraction", clip_fraction, "the policy moves further in one iteration than clip_range allows, so most of the later passes are wasted",
        "lower train.learning_rate or train.num_ppo_epochs, or raise train.rollout_batch_size",
    ),
    Check(
        "entropy_collapse", entropy_collapse, "the policy has become nearly deterministic, usually on one answer that the scorer overrates",
        "raise kl_coef or lower adaptive_kl.target, lower train.learning_rate; read samples for the answer that pays",
    ),
    Check(
        "no_eos", no_eos, "completions never end: max_new_tokens is too short for this policy, it never learned its EOS, or endings do not pay",
        "raise sampling.max_new_tokens; check that the demonstrations end with the EOS of the template; keep missing_eos: replace; or set sampling.stop_at_eos: false if cutting is meant",
    ),
    Check(
        "length_drift", length_drift, "the scorer pays for length (or brevity) itself",
        "add a scorer of kind length, raise kl_coef, or compare the reward model's score with length; health.max_length_factor if the drift is wanted",
    ),
    Check(
        "short_completions", short_completions, "the policy ends at once: the prompt already ends the turn (wrong template), or silence scores best",
        "check `template`; score empty completions low; raise kl_coef",
    ),
    Check(
        "explained_variance", explained_variance, "the value function predicts returns worse than their mean would: too few steps, or its learning rate does not fit",
        "set train.value_warmup_iterations, change train.value_learning_rate, raise vf_coef, or start from the reward model (value_init)",
    ),
    Check(
        "value_clip", value_clip, "values have to move further than value_clip_range in one iteration",
        "raise value_clip_range, set scale_scores: true, or start the value function from the reward model (value_init)",
    ),
    Check(
        "flat_scores", flat_scores, "the scorer gives every completion the same score, so there is nothing to learn",
        "check the scorers on a few completions; give partial credit; raise sampling.temperature or train.rollout_batch_size",
    ),
    Check(
        "score_clipped", score_clipped, "scores lie outside ±score_clip, where better is not told from good",
        "raise score_clip, or set scale_scores: true; center_scores needs a reward model whose mean is known",
    ),
    Check(
        "sampler_gap", sampler_gap, "the sampler computes other probabilities than the training forward: another precision, stale weights, or its own sampling parameters",
        "set engine.kind: native or train.precision: fp32; leave engine.importance_cap on; health.max_sampler_gap if the engine's rounding is known",
    ),
    Check(
        "skipped_steps", skipped_steps, "gradients were not finite numbers: overflow, or a rollout with extreme values",
        "lower train.learning_rate, set train.max_grad_norm, use train.precision: fp32",
    ),
    Check(
        "over_optimisation", over_optimisation, "the policy exploits what the scorer gets wrong: its score rises and the held-out score does not",
        "raise kl_coef, train fewer iterations, or train the reward model on more pairs; the checkpoint at the best held-out score is the one to keep",
        due=lambda line: HELDOUT in line,
    ),
)  # fmt: skip
