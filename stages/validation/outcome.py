"""What a finished SFT run is worth: its validation metrics, and those of the test part, measured once on the state that is published.

Once means: after training has ended and the state to be published has been chosen, in this place and in no other; the numbers enter the manifest in the
same commit as the model. They belong to weights: where a version of the same name with the same weights was measured on the same rows (a run that was
killed after it had published, or is repeated), its numbers are taken over and nothing is computed. A run killed before it has published measures again,
because nobody has seen the numbers yet that a killed process had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from blake3 import blake3

from configs.schema import SFTStage
from stages.registry import Checkpoint, Registry
from stages.training import build
from stages.training.evaluation import Measure, evaluate_exactly
from stages.training.progress import OLDER, public
from stages.training.ranks import from_rank_0, say
from stages.training.watchdog import beating
from stages.validation.held_out import HeldOut, perplexity

EXACT = ("loss", "perplexity", "token_accuracy")  # depend on nothing but the rows
Result = dict[str, Any]  # {"eval_set", "metrics"}, as the registry keeps it


class Outcome(NamedTuple):
    """What a manifest records and what the registry keeps as evaluations."""

    info: dict[str, Any]  # "metrics", and "test" where there was one
    evaluations: list[Result]


def outcome(trainer: Any, held_out: HeldOut, test: list[dict[str, Any]], measure: Measure, cfg: SFTStage, *, parts: Mapping[str, str], parents: Sequence[str]) -> Outcome:
    """What the state to be published comes to on its validation rows and on the test part (tokenised rows; none: no test). A collective.

    `parts`: fingerprints of the rows of each part; `parents`: digests of what the weights were trained from.
    """
    found = build.final_metrics(trainer, measure)
    metrics = finite({**{key: found[key] for key in ("loss", "token_accuracy") if key in found}, **{public(key): value for key, value in found.items()}})
    older = {name.removeprefix("eval_") for name in OLDER}
    exact = {key: value for key, value in metrics.items() if key in older or key.removeprefix("evaluation/") in EXACT}
    compared = {key: value for key, value in metrics.items() if key not in exact}
    sets = from_rank_0("naming evaluation sets", lambda: {"validation": held_out.settings(held_out.validation), "test": held_out.settings(held_out.test)})
    evaluations = [{"eval_set": fingerprint, "metrics": numbers} for fingerprint, numbers in ((parts["validation"], exact), (sets["validation"], compared)) if numbers]
    info: dict[str, Any] = {"metrics": {**{key: found[key] for key in found if key == "loss"}, **metrics}}
    if cfg.evaluation.test and test and math.isfinite(found.get("loss", 0.0)):
        info["test"] = tested(trainer, held_out, build.as_dataset(test), measure, cfg, names=(parts["test"], sets["test"]), parents=parents)
        evaluations += info["test"]["results"]
    return Outcome(info, evaluations)


def tested(trainer: Any, held_out: HeldOut, rows: Any, measure: Measure, cfg: SFTStage, *, names: tuple[str, str], parents: Sequence[str]) -> dict[str, Any]:
    """{"weights", "rows", "completed", "results", "taken_from"}: measured, or taken over from a version with the same weights. A collective."""
    record: dict[str, Any] = {"weights": weights_digest(trainer, parents), "rows": len(rows), "completed": len(held_out.test.questions)}
    wanted = names[: 2 if held_out.test.questions or held_out.test.choices else 1]
    before = from_rank_0("looking for a test of these weights", lambda: earlier(cfg, record["weights"], wanted))
    if before is not None:
        results, taken_from = before
        say(f"test: {shown(results)} (as measured for {taken_from}, which has the same weights; not measured again)")
        return record | {"results": results, "taken_from": taken_from}
    exact = evaluate_exactly(trainer, rows, beating(measure))
    exact["perplexity"] = perplexity(exact["loss"])
    compared = held_out.measured(trainer, held_out.test)
    results = [{"eval_set": name, "metrics": finite({f"test/{key}": value for key, value in found.items()})} for name, found in zip(wanted, (exact, compared), strict=False)]
    say(f"test: {shown(results)}  ({len(rows)} rows; never to choose by)")
    return record | {"results": results, "taken_from": None}


def earlier(cfg: SFTStage, weights: str, names: Sequence[str]) -> tuple[list[Result], str] | None:
    """What the newest version of the same name with the same weights has recorded of the same rows, and its reference; on one process."""
    versions: list[Checkpoint] = Registry(cfg.registry).list("sft", cfg.name)
    for version in sorted(versions, key=lambda item: item.version, reverse=True):
        record = version.info("test") or {}
        if record.get("weights") == weights and [result["eval_set"] for result in record["results"]] == list(names):
            return record["results"], record["taken_from"] or version.ref
    return None


def weights_digest(trainer: Any, parents: Sequence[str]) -> str:
    """BLAKE3 (hex) of the trained tensors and of what they were trained from. A collective: under ZeRO-3 each process has a share."""
    from accelerate.utils import gather_object

    digest = blake3()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            share = getattr(parameter, "ds_tensor", parameter).detach().cpu().contiguous()
            digest.update(name.encode()).update(share.reshape(-1).view(torch.uint8).numpy())
    shares = gather_object([digest.hexdigest()]) if trainer.accelerator.num_processes > 1 else [digest.hexdigest()]
    return blake3("/".join([*dict.fromkeys(shares), *parents]).encode()).hexdigest()  # the same on every process where each holds all of it


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without what is not finite: a manifest holds numbers."""
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def shown(results: Sequence[Result]) -> str:
    """Metrics as one line."""
    return "  ".join(f"{key.removeprefix('test/')} {value:.4g}" for result in results for key, value in result["metrics"].items())
