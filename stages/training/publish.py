"""How a trained model becomes a checkpoint: rank 0 writes and publishes, every rank learns the outcome."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from configs.errors import UserError
from configs.schema import StageConfig, TRLStage
from stages import models, soft
from stages.dropout import without_dropout
from stages.nodes import agree
from stages.registry import Checkpoint, Parent, Registry, resumable
from stages.tokens import ModelTokens
from stages.training import saves, stop, watchdog
from stages.training.ranks import from_rank_0, say, world_size
from stages.training.ready import output_folder
from stages.training.stopping import rule_of
from stages.tuning import published
from stages.zero import gather


def digest(parent: Parent) -> str:
    """What identifies a parent's content: its manifest's hash, or the digest or name of a model from outside."""
    return parent.manifest_hash or parent.digest or str(parent.source)


def publish(
    trainer: Any, cfg: TRLStage, stage: str, tokens: ModelTokens, *, origin: models.Origin, parents: list[Parent],
    info: dict[str, Any], eval_set: str | None, evaluations: Sequence[dict[str, Any]] | None = None,
) -> str:  # fmt: skip
    """Publish `trainer`'s model as STAGE/NAME and return its reference, such as sft/demo@3.

    `info` is completed with an adapter's base. Metrics are also added as an
    evaluation on `eval_set` (a fingerprint), so that `@best:METRIC` can compare them; or `evaluations` ({"eval_set", "metrics"}) are, in their place.

    Raises:
        UserError: on every rank, when publishing failed on rank 0, where the tokenizer is no longer the one that was trained with, or the
            model's loss is not finite.
    """
    if tokens.tokenizer.pad_token_id != tokens.pad_id:
        raise UserError(
            f"training changed the padding token from id {tokens.pad_id} to {tokens.tokenizer.pad_token_id}; leave out what sets it under `trainer:`"
        )
    loss = (info.get("metrics") or {}).get("loss", 0.0)
    if not math.isfinite(loss):
        raise UserError(f"the trained model's loss on its validation rows is {loss}, so it is not published; lower train.learning_rate or use train.precision=fp32, and run again")
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    adapter = hasattr(model, "peft_config")
    without_dropout(model)  # a config must not ask those who train on for what this run had
    state = whole_state(trainer, model, adapter)  # a collective: on every rank
    stage_info = dict(info.get("stage_info") or {}) | soft.described(model)
    if adapter:
        vocabulary = gather.shape(model.get_input_embeddings().weight)[0]
        stage_info["adapter"] = models.adapter_facts(origin) | {"vocabulary": vocabulary}

    def write(folder: Path) -> None:
        with published.as_plain(model, trainer.initial, state) as saved:
            models.save_model(
                model, tokens.tokenizer, folder, eos_ids=tokens.eos_ids, base=origin if adapter else None, like=origin,
                **({"state_dict": saved} if saved is not None else {}),
            )  # fmt: skip

    return publish_checkpoint(cfg, stage, write, parents=parents, info={**info, "tokenizer": tokens.facts, "stage_info": stage_info}, eval_set=eval_set, evaluations=evaluations)


def whole_state(trainer: Any, model: Any, adapter: bool) -> dict[str, Any] | None:
    """What `save_pretrained` must be given where a process does not hold the whole model as plain tensors; a collective.

    Of a model with an adapter, only what peft writes: trained tensors, and the embeddings in case they have grown.
    """
    if not trainer.is_deepspeed_enabled:
        return None
    embeddings = {id(p) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None for p in layer.parameters()}
    return gather.state(model, (lambda _, value: value.requires_grad or id(value) in embeddings) if adapter else None)


def publish_checkpoint(
    cfg: StageConfig, stage: str, write: Callable[[Path], None], *, parents: list[Parent], info: dict[str, Any], eval_set: str | None = None,
    evaluations: Sequence[dict[str, Any]] | None = None,
) -> str:  # fmt: skip
    """Publish what `write(folder)` writes as STAGE/NAME, from rank 0; every rank calls this and gets the reference.

    `info` is completed with config, seed, inputs key and the number of processes.

    Raises:
        UserError: on every rank, when publishing failed on rank 0.
    """
    stop.mode(stop.Mode.FINISH)
    watchdog.phase("publish")
    record = {"config": cfg.model_dump(mode="json"), "seed": cfg.seed, "inputs_key": os.environ.get("ALIGN_INPUTS_KEY"), "processes": world_size(), **info}

    def on_rank_0() -> tuple[str, str]:
        registry = Registry(cfg.registry)
        checkpoint = registry.publish(stage, cfg.name, write, parents=parents, info=record)
        one = [{"eval_set": eval_set, "metrics": info["metrics"]}] if eval_set and info.get("metrics") else []
        for result in one if evaluations is None else evaluations:
            registry.add_evaluation(checkpoint, result)
        if keeps_resume(cfg, stage):
            keep_resume(registry, checkpoint, output_folder(cfg, stage) / "resume")
        return checkpoint.ref, checkpoint.id

    ref, checkpoint_id = from_rank_0(f"publishing {stage}/{cfg.name}", on_rank_0)
    agree.check_published(cfg.registry, ref, checkpoint_id)
    say(f"published {ref} ({checkpoint_id}) in {cfg.registry}")
    return str(ref)


def keeps_resume(cfg: StageConfig, stage: str) -> bool:
    """Whether a run's newest save is kept: as `keep_resume` says, else where an SFT run publishes its best state, which a run can't go on from as its last."""
    if cfg.keep_resume is not None or stage != "sft":
        return bool(cfg.keep_resume)
    return rule_of(cast(TRLStage, cfg)) is not None


def keep_resume(registry: Registry, checkpoint: Checkpoint, folder: Path) -> None:
    """Keep the newest sound save of the run that made a checkpoint; without one, or without room for it, a line says so. On one rank."""
    save = next((save for save in saves.saves(folder) if saves.problem(save) is None), None)
    if save is None:
        print(f"keep_resume: {folder} holds no sound save, so none is kept; a run that ends before train.save_every steps makes none", flush=True)
        return
    try:
        resumable.keep(registry, checkpoint, save)
        print(f"keep_resume: kept {save.name}; to go on from it: align registry resume {checkpoint.ref} OUTPUT --registry {registry.root}", flush=True)
    except UserError as error:  # the model is published; its state must not cost the run its end
        print(f"warning: keep_resume: {error}", flush=True)
