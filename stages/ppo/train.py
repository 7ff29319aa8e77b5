"""PPO from start to finish: resolve, load, then iterate collect_rollout -> per-token rewards -> GAE -> update_policy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from configs import presets
from configs.errors import UserError
from configs.schema import PPOStage
from stages import models, soft
from stages.guard.verdict import GoneBadError, Guard
from stages.ppo import health, maths, quantized, report, state
from stages.ppo.allocator import keep_freed_memory
from stages.ppo.build import PPOModels, build_models, find_all
from stages.ppo.collect import (
    Clock,
    PromptSet,
    collect_rollout,
    compares_all,
    experience_of,
    recomputed,
    starts_from_sampler,
)
from stages.ppo.engines.build import build_engine, check_engine
from stages.ppo.engines.protocol import Engine
from stages.ppo.equip import equip
from stages.ppo.evaluation import EvaluationSet
from stages.ppo.guarding import Undo
from stages.ppo.modules import POLICY
from stages.ppo.optimizer import set_learning_rate
from stages.ppo.prompts import check_scorers_read, load_evaluation, load_prompts, row_limit
from stages.ppo.ptx import Mix, load_mix
from stages.ppo.published import PolicyAverage, Published, beginning
from stages.ppo.told import Told
from stages.ppo.update import MAX_GAP, SamplerDiffersError, update_policy
from stages.ppo.watch import Outcome, Watch
from stages.ppo.zero.engines import Zero, zero_of_machine
from stages.tokens import ModelTokens, load_tokens
from stages.training import ready, resume, saves, watchdog
from stages.training.publish import publish_checkpoint
from stages.training.ranks import from_rank_0, rank, say
from stages.zero.machine import uses_deepspeed


def main(cfg: PPOStage) -> None:
    """Train a policy with PPO against a scorer, starting from an SFT checkpoint."""
    accelerator = start(cfg)
    zero = zero_of_machine(cfg)
    for line in presets.described(cfg):
        say(f"ppo: {line}")
    origin = models.find(cfg.init_from, cfg.registry, stages=("sft", "dpo", "ppo"))
    ready.check(cfg, "ppo", *find_all(cfg, origin))
    tokens = load_tokens(origin, cfg.template)
    for note in tokens.notes:
        say(f"tokenizer: {note}")
    built = build_models(cfg, origin, tokens, accelerator.device, zero)
    limit = row_limit(cfg, built, tokens)
    prompts, data_info = load_prompts(cfg, tokens.formatter, limit)
    chosen = load_evaluation(cfg, tokens.formatter, limit)
    check_scorers_read(cfg, built, tokens, prompts, *([chosen.prompts] if chosen else []))
    mix, mix_info = load_mix(cfg, tokens, built.trained.policy)
    fingerprints = {"prompts": data_info["fingerprint"], "ptx": mix_info["parts"]["train"] if mix else None, "evaluation": chosen.fingerprint if chosen else None}
    identity = resume.identity(
        cfg, data=fingerprints, tokenizer=tokens.key, parents=[p.manifest_hash or p.digest or p.source or "" for p in built.parents]
    )
    outcome, metrics = train(cfg, accelerator, built, prompts, tokens, identity, mix, chosen, zero)
    publish(cfg, built, tokens, data_info | ({"ptx": mix_info} if mix else {}), outcome, metrics)


def start(cfg: PPOStage) -> Any:
    """The accelerator, and the checks that need nothing but the config and the number of processes.

    Raises:
        UserError: the batch can't be shared out equally; the engine can't run here.
    """
    from accelerate import Accelerator

    check_engine(cfg)
    # Without `cpu` processes on a machine without GPUs would each believe to be alone.
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="bf16" if models.uses_bf16(cfg.train.precision) and not uses_deepspeed() else "no",
        gradient_accumulation_steps=1,
    )
    if str(accelerator.distributed_type).endswith("FSDP"):
        raise UserError("stage ppo does not run under FSDP; use a machine file with DeepSpeed ZeRO (cpu_zero2, zero2, zero3) or DDP (cpu_ddp, gpu_ddp)")
    if str(accelerator.distributed_type).endswith("DEEPSPEED"):
        accelerator.autocast = partial(models.autocast, accelerator.device, cfg.train.precision)  # Accelerate leaves it to DeepSpeed, which rounds weights too
    parts = cfg.train.num_minibatches * accelerator.num_processes
    if cfg.train.rollout_batch_size % parts:
        raise UserError(
            f"train.rollout_batch_size {cfg.train.rollout_batch_size} is not a multiple of train.num_minibatches "
            f"{cfg.train.num_minibatches} x {accelerator.num_processes} process(es); every process takes an equal share of each minibatch"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    quantized.check(cfg, accelerator.device)
    torch.manual_seed(cfg.seed)
    return accelerator


def train(
    cfg: PPOStage, accelerator: Any, built: PPOModels, prompts: PromptSet, tokens: ModelTokens, identity: dict[str, Any],
    mix: Mix | None = None, chosen: EvaluationSet | None = None, zero: Zero | None = None,
) -> tuple[Outcome, dict[str, float]]:  # fmt: skip
    """All iterations, from the newest resumable save if there is one, until the last or until the monitor stops the run.

    Returns what is to be published, which the module then holds, and its metrics.
    """
    output = ready.output_folder(cfg, "ppo")
    folder = output / "resume"
    save_from = resume.choose_save(folder, cfg, identity)
    began_with = beginning(cfg, built.trained, save_from, identity)
    optimizer, position, store = equip(cfg, accelerator, built, folder, save_from, zero, identity)
    average = PolicyAverage(built.trained, cfg.ema_decay, optimizer) if cfg.ema_decay is not None else None
    if average is not None and save_from and (kept := state.load_extra(save_from, "ema")) is not None:
        average.load(kept)  # without one it was switched on in between, and starts as the policy is now
    published = Published(built.trained, average, began_with, cfg.towards_start or 0.0)
    engine = build_engine(cfg, built, tokens, accelerator)
    logs = report.Logs(output, position.iteration if save_from else None, main=accelerator.is_main_process)
    watch = Watch(cfg, accelerator, built, tokens, chosen, store=store, logs=logs, saved=position.monitor, published=published)
    watch.begin(position.iteration)
    undo = Undo(cfg, accelerator.device, store, average, position.guard)
    began, first = time.monotonic(), position.iteration
    told = Told(position.iteration, cfg.train.iterations)
    while position.iteration < cfg.train.iterations and not watch.stopped:
        iteration = position.iteration
        told.begin(iteration)
        set_learning_rate(optimizer, cfg, iteration)
        collected = partial(told.between_phases, iteration, partial(undo.save, position))
        last = iteration + 1 == cfg.train.iterations
        due = (iteration + 1) % cfg.train.save_every == 0 and not last  # the last one is published instead
        try:
            metrics, kl_coef = run_iteration(cfg, accelerator, built, engine, optimizer, prompts, tokens, iteration, position.kl_coef, mix, undo.guard, collected)
            undo.check(iteration, saved_next=due or last)
            metrics["train/skipped_steps"] = undo.guard.skipped
        except GoneBadError as error:
            with watchdog.during("load"):
                metrics, kl_coef = undo.go_back(str(error), iteration), position.kl_coef
            engine.sync()
        left = (time.monotonic() - began) / (iteration + 1 - first) * (cfg.train.iterations - iteration - 1)
        evaluated, text = watch.look(iteration + 1)
        position = state.Position(iteration + 1, kl_coef, watch.record(), undo.record())
        started = _log(cfg, logs, iteration, metrics, evaluated, text, left)
        save = partial(undo.save, position)
        if cfg.health.action == "stop":
            health.stop(from_rank_0("health checks", partial(list, started)), save)
        told.end(position.iteration, save, due=due)
    told.finish()
    outcome = watch.conclude(position.iteration)
    return outcome, logs.of(outcome.iteration)


def _log(cfg: PPOStage, logs: report.Logs, iteration: int, metrics: dict[str, float], evaluated: dict[str, float], text: str, left: float) -> list[health.Finding]:
    """Write and say what an iteration (from 0) came to; on rank 0 the health checks that begin to fail in it. One that was called off has no line, nor are its metrics examined."""
    took, started = "objective/score" in metrics, list[health.Finding]()
    lines = [report.line(iteration, cfg, metrics, left)] if took else []
    metrics = metrics | evaluated
    if took and logs.metrics is not None:
        metrics, started = health.examine(metrics, logs.iterations, cfg)
    logs.add(iteration + 1, metrics)
    if lines := [*lines, *filter(None, [text]), *(f"warning: {finding}" for finding in started)]:
        say("\n".join(lines))
    return started


def run_iteration(
    cfg: PPOStage, accelerator: Any, built: PPOModels, engine: Engine, optimizer: Any, prompts: PromptSet, tokens: ModelTokens, iteration: int,
    kl_coef: float, mix: Mix | None = None, guard: Guard | None = None, collected: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """One iteration in the paper's order. Returns its metrics and the KL coefficient of the next one. `collected` is called once the rollout is."""
    clock, scorer = Clock(), built.scorer
    rollout = collect_rollout(
        built.trained, built.reference, scorer, prompts, cfg, accelerator, engine=engine, iteration=iteration, tokens=tokens,
        clock=clock,
    )  # fmt: skip
    collected()
    started, gap, unsure = time.monotonic(), dict[str, float](), starts_from_sampler(cfg)
    if compares_all(cfg):
        forward, unsure = recomputed(rollout, built.trained, cfg, accelerator), False
        gap = report.gap_to(forward, cfg)
        rollout = rollout if gap["rollout/sampler_gap"] <= MAX_GAP else forward
        clock.scoring += time.monotonic() - started
    watchdog.phase("update")
    experience, rewards = experience_of(rollout, cfg, kl_coef=kl_coef, mean=scorer.mean, std=scorer.std)
    started = time.monotonic()
    if cfg.train.gradient_checkpointing:
        built.trained.train()
    try:
        updates = update_policy(built.trained, optimizer, accelerator, experience, cfg, iteration, mix, max_gap=MAX_GAP if unsure else math.inf, guard=guard)
        gap = report.sampler_gap_of(updates) if unsure else gap
    except SamplerDiffersError:
        rollout = recomputed(rollout, built.trained, cfg, accelerator)
        experience, rewards = experience_of(rollout, cfg, kl_coef=kl_coef, mean=scorer.mean, std=scorer.std)
        updates = update_policy(built.trained, optimizer, accelerator, experience, cfg, iteration, mix, guard=guard)
    engine.sync()
    clock.update = time.monotonic() - started
    metrics = report.metrics_of(rollout, experience, rewards, cfg, kl_coef=kl_coef, clock=clock, scorers=scorer.columns) | updates | gap
    metrics["objective/score_clipped"] = report.score_clipped(rollout, cfg, mean=scorer.mean, std=scorer.std)
    if cfg.adaptive_kl is not None:
        kl_coef = maths.adapt_kl_coef(
            kl_coef, metrics["objective/kl"], target=cfg.adaptive_kl.target, horizon=cfg.adaptive_kl.horizon, samples=len(rollout)
        )
    return metrics, kl_coef


def publish(
    cfg: PPOStage, built: PPOModels, tokens: ModelTokens, data_info: dict[str, Any], outcome: Outcome, metrics: dict[str, float]
) -> None:
    """Publish the policy, then drop the resumable saves."""
    output = ready.output_folder(cfg, "ppo")
    seen = health.counts(report.lines_of(output / "metrics.jsonl"))
    stage_info: dict[str, Any] = {"scorers": built.scorer.name, "run": outcome.record, "health": seen} | soft.described(built.published)
    extra: dict[str, Any] = {"selected_adapters": [POLICY]} if built.base is not None else {}
    whole = built.trained.state_to_publish(built.published, adapter=built.base is not None)
    if whole is not None:
        extra["state_dict"] = whole
    if built.base is not None:
        stage_info["adapter"] = models.adapter_facts(built.base) | {"vocabulary": len(tokens.tokenizer)}
    publish_checkpoint(
        cfg, "ppo", lambda folder: models.save_model(built.published, tokens.tokenizer, folder, eos_ids=tokens.eos_ids, base=built.base, like=built.origin, **extra),
        parents=built.parents, info={"data": data_info, "tokenizer": tokens.facts, "metrics": metrics, "stage_info": stage_info},
    )  # fmt: skip
    if rank() == 0:
        saves.clear(output / "resume")
