"""Evaluate checkpoints on held-out prompts: resolve, choose prompts, sample and score each model, compare, record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import EvalConfig
from configs.schema.scorers import reward_models
from rewards.build import build_scorers
from rewards.combine import WeightedSum
from rewards.protocol import text_of
from stages import models
from stages.data import Prompt
from stages.evaluation.likelihood import read_beginning
from stages.evaluation.measure import Measured, compare, measure
from stages.evaluation.prompts import check_split, choose_prompts, eval_set
from stages.evaluation.subject import Reader, Subject, device, load_reader, shelf_of, that_fit
from stages.scorers import reward_scorer

POLICIES = ("sft", "dpo", "ppo")


def evaluate(cfg: EvalConfig, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every checkpoint, compare it with cfg.against, keep the results. `say` is told of progress.

    Returns {"eval_set", "eval_set_detail", "against", "reference", "too_long", "models": {label: figures}, "samples": […]}, JSON. Figures: score
    {mean, se}, parts {scorer: {mean, se, n}}, win_rate, win_rate_ci [low, high], kl {k1, k1_se, k3, k3_se} in nats or None where the
    vocabularies differ, length (tokens, EOS included), eos_rate, perplexity, n completions. se is None with a single prompt.
    Results of checkpoints that live in the registry are added there. Raises UserError.
    """
    cfg = models.pinned(cfg)
    against, reference = _labels(cfg)
    origins = {label: models.find(asked, cfg.registry, stages=POLICIES) for label, asked in cfg.checkpoints.items()}
    check_split(origins.values(), cfg)
    chosen = choose_prompts(cfg)
    held = [origin.lease("align eval measures it") for origin in (*origins.values(), *scorer_origins(cfg))]
    try:
        return _evaluate(cfg, origins, chosen, against, reference, say)
    finally:
        for lease in filter(None, held):
            lease.give_back()


def _evaluate(
    cfg: EvalConfig, origins: dict[str, models.Origin], chosen: list[Prompt], against: str, reference: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """`evaluate`, once it is known what is evaluated on which prompts."""
    models.verify(*origins.values(), *scorer_origins(cfg))
    _check_files(cfg)
    readers = {label: load_reader(label, origin, cfg.template) for label, origin in origins.items()}
    prompts = that_fit(chosen, list(readers.values()), cfg.sampling.max_new_tokens)
    fingerprint, detail = eval_set(cfg, prompts, _scorer_ids(cfg))
    scorer = build_scorers(cfg.scorers, lambda asked: reward_scorer(asked, cfg.registry, device=device(), attn_implementation=cfg.attn_implementation))
    measured = _measure_all(cfg, readers, reference, prompts, scorer, say)
    result = {
        "eval_set": fingerprint, "eval_set_detail": detail, "against": against, "reference": reference, "too_long": len(chosen) - len(prompts),
        "models": {
            label: _identity(origins[label]) | measured[label].figures | compare(measured[label], measured[against], cfg.seed)
            for label in cfg.checkpoints
        },
        "samples": _side_by_side(measured, prompts, cfg),
    }  # fmt: skip
    if cfg.output is not None:
        write(cfg.output, result, measured, prompts)
    _record(result, origins)
    return result


def _labels(cfg: EvalConfig) -> tuple[str, str]:
    """The labels that win rates and KL are counted against."""
    against = cfg.against if cfg.against is not None else next(iter(cfg.checkpoints))
    reference = cfg.reference if cfg.reference is not None else against
    for field, label in (("against", against), ("reference", reference)):
        if label not in cfg.checkpoints:
            raise UserError(f"{field}: {label!r} is not among the checkpoints; their labels are {', '.join(cfg.checkpoints)}")
    return against, reference


def _check_files(cfg: EvalConfig) -> None:
    """Find out now, not after hours of sampling, that a file cannot be read or the results not be written."""
    if cfg.plain_text is not None:
        read_beginning(cfg.plain_text)
    if cfg.output is not None:
        _folder(cfg.output)


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {path}: cannot be a folder: {error}") from error


def scorer_origins(cfg: EvalConfig) -> list[models.Origin]:
    """The reward models among the scorers."""
    return [models.find(name, cfg.registry, stages=("reward",)) for name in reward_models(cfg.scorers)]


def _scorer_ids(cfg: EvalConfig) -> dict[str, str]:
    return {origin.asked: origin.identity for origin in scorer_origins(cfg)}


def _measure_all(
    cfg: EvalConfig, readers: dict[str, Reader], reference: str, prompts: list[Prompt], scorer: WeightedSum, say: Callable[[str], None]
) -> dict[str, Measured]:
    """Every model's figures. Beside the reference no more than one model is held at a time; adapters of one base lie on one copy of it, and are switched."""
    shelf = shelf_of(readers, cfg)
    held = Subject(readers[reference], shelf.weights(reference))
    order, measured = shelf.in_order(reference), {}
    for number, label in enumerate(order, start=1):
        shared = len(shelf.neighbours(label)) > 1
        say(f"eval {number}/{len(readers)}  {label}: {len(prompts)} prompts x {cfg.samples_per_prompt}" + (", an adapter switched on a base that is shared" if shared else ""))
        subject = held if label == reference else Subject(readers[label], shelf.weights(label))
        measured[label] = measure(subject, held, prompts, scorer, cfg)
        del subject
        if reference not in (near := shelf.neighbours(label)) and all(other in measured for other in near):
            shelf.forget(label)
    return measured


def _identity(origin: models.Origin) -> dict[str, Any]:
    """What a result says about which model it is of."""
    checkpoint = origin.checkpoint
    return {"checkpoint": checkpoint.ref if checkpoint else origin.asked, "id": checkpoint.id if checkpoint else None}


def _side_by_side(measured: dict[str, Measured], prompts: list[Prompt], cfg: EvalConfig) -> list[dict[str, Any]]:
    """The first completion of each model for the first prompts, with its score."""
    rows = []
    for index, row in enumerate(prompts[: cfg.show_samples]):
        place = index * cfg.samples_per_prompt
        rows.append({
            "prompt": text_of(row.prompt),  # type: ignore[arg-type]
            "completions": {label: measured[label].completions.texts[place] for label in cfg.checkpoints},
            "scores": {label: measured[label].scores.total[place] for label in cfg.checkpoints},
        })  # fmt: skip
    return rows


def write(folder: Path, result: dict[str, Any], measured: dict[str, Measured], prompts: list[Prompt]) -> None:
    """results.json and samples.jsonl (every completion with its scores), each complete or absent. Raises UserError."""
    lines = []
    for label, one in measured.items():
        for i, group in enumerate(one.completions.groups):
            parts = {name: values[i] for name, values in one.scores.parts.items()}
            text, finished = one.completions.texts[i], one.completions.finished[i]
            record = {"model": label, "prompt": text_of(prompts[group].prompt), "completion": text, "finished": finished}  # type: ignore[arg-type]
            lines.append(json.dumps(record | {"score": one.scores.total[i], "parts": parts}, ensure_ascii=False))
    _folder(folder)
    try:
        _replace(folder / "samples.jsonl", "\n".join(lines) + "\n")
        _replace(folder / "results.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"output {folder}: cannot be written: {error}") from error


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _record(result: dict[str, Any], origins: dict[str, models.Origin]) -> None:
    """Add each result to the registry its checkpoint lives in. Texts stay out: manifests hold no prompts."""
    shared = {"eval_set": result["eval_set"], "eval_set_detail": result["eval_set_detail"]}
    for role in ("against", "reference"):
        shared[role] = result["models"][result[role]]["id"] or result["models"][result[role]]["checkpoint"]
    for label, origin in origins.items():
        if origin.checkpoint is not None and origin.registry is not None:
            origin.registry.add_evaluation(origin.checkpoint, shared | {"label": label} | result["models"][label])
