"""Which prompts a PPO run uses, and that every model that reads them has room for them."""

from __future__ import annotations

from typing import Any

from configs.errors import UserError
from configs.schema import PPOStage
from rewards.model import RewardModelScorer
from rewards.protocol import scorer_prompt, turns_of
from stages import data, soft
from stages.nodes.once import once_per_node
from stages.ppo.build import PPOModels
from stages.ppo.collect import PromptSet
from stages.ppo.evaluation import EvaluationSet
from stages.tokens import ModelTokens
from stages.training import text
from stages.training.ranks import say

RESERVED = {"prompts", "completions", "prompt_ids", "completion_ids", "token_key", "finished"}


def load_prompts(cfg: PPOStage, formatter: data.Formatter, limit: int) -> tuple[PromptSet, dict[str, Any]]:
    """The training part of the prompts, encoded; those that leave no room for a completion within `limit` tokens are dropped and counted.

    Raises:
        UserError: unreadable prompts, or none left.
    """
    splits = data.Splitter(cfg.split).split(_read(cfg.prompts))
    _refuse_reserved(splits.train)
    rows, dropped = once_per_node("tokenising", lambda: data.encode_prompts(
        formatter, splits.train, max_length=limit, max_new_tokens=cfg.sampling.max_new_tokens, overlong=cfg.overlong
    ))  # fmt: skip
    say(f"ppo: {len(rows)} prompts to train on, {len(splits.validation)} for validation, {len(splits.test)} held out, {dropped} too long")
    fingerprint = splits.report["fingerprint"]["train"]
    return _prompt_set(rows), splits.report | {"fingerprint": fingerprint, "dropped": {"too_long": dropped}}


def _read(sources: Any) -> list[data.Prompt]:
    return once_per_node("reading the prompts", lambda: data.read_prompts(sources), node_0_first=True).rows


def _prompt_set(rows: list[dict[str, Any]]) -> PromptSet:
    return PromptSet([r["prompt_ids"] for r in rows], [scorer_prompt(r["row"].prompt) for r in rows], [r["row"].columns for r in rows])


def load_evaluation(cfg: PPOStage, formatter: data.Formatter, limit: int) -> EvaluationSet | None:
    """The held-out prompts of evaluations, each prompt group once, encoded; None where there is nothing to evaluate on, or no wish to.

    Raises:
        UserError: unreadable prompts, or none left where the config counts on evaluations.
    """
    if cfg.evaluation is None:
        return None
    splitter = data.Splitter(cfg.split)
    training = splitter.split(_read(cfg.prompts))
    rows, place = training.validation, "the validation part of prompts is empty (split.validation)"
    if cfg.evaluation.prompts is not None:
        trained = {data.group_key(row.prompt) for row in training.train}
        own = _read(cfg.evaluation.prompts)
        rows = [row for row in own if splitter.of(row) != "test" and data.group_key(row.prompt) not in trained]
        place = f"evaluation.prompts holds {len(own)} prompts, all of the test part or trained on"
    rows = data.one_per_group(rows)
    _refuse_reserved(rows)
    encoded, dropped = once_per_node("tokenising", lambda: data.encode_prompts(
        formatter, rows, max_length=limit, max_new_tokens=cfg.sampling.max_new_tokens, overlong="drop", may_be_empty=True
    ))  # fmt: skip
    if rows and not encoded:
        place = f"all {len(rows)} held-out prompts leave no room for sampling.max_new_tokens within max_length"
    if not encoded:
        if cfg.evaluation.prompts is not None or cfg.evaluation.scorers is not None or cfg.stopping.kl_budget or cfg.stopping.patience:
            raise UserError(f"evaluation: there are no held-out prompts: {place}; give evaluation.prompts others")
        say(f"ppo: no evaluation: {place}, and evaluation.prompts names no others; the run ends with its last policy")
        return None
    encoded = encoded[: cfg.evaluation.max_prompts]
    every, count, kept = cfg.evaluation.every, cfg.evaluation.samples_per_prompt, [row["row"] for row in encoded]
    say(f"ppo: evaluation every {every} iterations on {len(kept)} held-out prompts x {count}" + (f", {dropped} too long" if dropped else ""))
    return EvaluationSet(_prompt_set(encoded), count, cfg.seed, data.fingerprint(kept))


def row_limit(cfg: PPOStage, built: PPOModels, tokens: ModelTokens) -> int:
    """The tokens a row may have, so that every model that reads the policy's ids can read it."""
    scorers = [scorer for _, scorer in _scorers(built) if getattr(scorer, "token_key", None) == tokens.key]
    readers = [built.trained.policy, built.reference.model, *(s.model for s in scorers)]
    readers += [built.trained.value_trunk] if built.trained.value_trunk is not None else []
    limit = text.row_limit(min(readers, key=lambda model: soft.room(model) or cfg.max_length), cfg)
    if cfg.sampling.stop_at_eos:
        return limit
    # A completion of fixed length is scored at an EOS after it: one token more.
    return min([limit, *(s.max_length - 1 for s in scorers if s.max_length is not None)])


def _scorers(built: PPOModels) -> list[tuple[str, Any]]:
    """Name and scorer of everything that scores, in rollouts or in evaluations."""
    sums = [built.scorer] + ([built.heldout_scorer] if built.heldout_scorer is not None else [])
    return [named for total in sums for named in total.single()]


def check_scorers_read(cfg: PPOStage, built: PPOModels, tokens: ModelTokens, *sets: PromptSet) -> None:
    """Make sure that a reward model with a tokenizer of its own can read about every row.

    Raises:
        UserError: the longest prompt leaves it no room for a completion.
    """
    for name, scorer in _scorers(built):
        if not isinstance(scorer, RewardModelScorer) or scorer.token_key == tokens.key or scorer.max_length is None:
            continue
        longest = max(len(scorer.tokens.prompt_ids(turns_of(prompt))) for prompts in sets for prompt in prompts.texts)
        if longest + cfg.sampling.max_new_tokens > scorer.max_length:
            raise UserError(
                f"scorer {name} reads {scorer.max_length} tokens; the longest prompt has {longest} of its tokens, and sampling.max_new_tokens is "
                f"{cfg.sampling.max_new_tokens}: lower max_length (it drops longer prompts) or sampling.max_new_tokens"
            )


def _refuse_reserved(prompts: list[data.Prompt]) -> None:
    """Columns go to the scorers by name, so none may have the name of what PPO itself hands them."""
    for prompt in prompts:
        for name in sorted(RESERVED & prompt.columns.keys()):
            raise UserError(f"{prompt.where}: column {name!r} has the name of something that scorers get from PPO; rename or leave out this column")
