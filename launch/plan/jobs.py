"""From a stage's config to what a simulation needs to know of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from configs.errors import UserError
from configs.schema import Full, Lora, SFTStage, freezes_base, lora_of, technique_of
from configs.schema.scorers import reward_models as reward_model_names
from configs.splitting import trains_prompt
from launch.batches import check_batches
from launch.chain.steps import made_by, sections
from launch.plan.job import SCORES, Job
from launch.plan.layout import Layout
from launch.plan.rows import Rows, rows_of
from launch.plan.sources import Sources

OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "adamw"}


@dataclass(frozen=True)
class Work:
    """A stage to plan: its config, its simulation's job, and how many rows it goes through."""

    stage: str
    cfg: Any
    job: Job
    rows: Rows
    steps: int | None  # optimizer steps (PPO: iterations); None where the number of rows is not known
    tokens_per_step: float  # tokens that one optimizer step (PPO: iteration) trains on, all processes
    prompt_in_front: bool = False  # a soft prompt of the chain's SFT stands in front of the stage's model

    @property
    def members(self) -> int:
        """How many times the stage runs: once for each member of a reward ensemble."""
        ensemble = getattr(self.cfg, "ensemble", None)
        return int(ensemble.members) if ensemble is not None else 1


def work_of(stage: str, cfg: Any, layout: Layout, sources: Sources, chain: Any = None) -> Work:
    """Read the shapes and the rows of a stage.

    Raises:
        UserError: a model config that can't be read, or batch sizes that do not divide.
    """
    config = sources.config(cfg.init_from, cfg.registry)
    tokens = sources.tokens(cfg.init_from, cfg.registry, cfg.template)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or cfg.max_length
    limit = min(cfg.max_length, positions)
    shared = {
        "config": config, "lora": planned_lora(stage, cfg, sources), "bf16": _bf16(cfg, layout), "pure_bf16": layout.zero > 0 and stage != "ppo", "checkpointing": _checkpointing(cfg),
        "attn_implementation": _attention(cfg), "gpu": layout.device.gpu, "vocabulary": len(tokens.tokenizer) if tokens else None,
    }  # fmt: skip
    check_batches({stage: cfg}, layout.processes)
    if stage == "ppo":
        return _ppo(cfg, layout, sources, chain, tokens, limit, shared)
    rows = rows_of(stage, cfg, tokens, limit)
    train = cfg.train
    per_forward = layout.processes * train.micro_batch_size
    own = stage == "dpo" and (not freezes_base(cfg) or (cfg.reference is not None and cfg.reference != cfg.init_from))
    packed = stage == "sft" and cfg.packing
    job = Job(
        stage, micro_batch=train.micro_batch_size, accumulation=train.batch_size // per_forward, row_tokens=limit if packed else rows.longest,
        completion_tokens=0 if packed else rows.counted, own_reference=own, loss_chunk=train.loss_chunk if stage == "sft" else None, optimizer=str(cfg.trainer.get("optim", "adamw_torch_fused")), **shared,
    )  # fmt: skip
    count = rows.count if not packed or rows.count is None else math.ceil(rows.count * rows.mean / limit)
    steps = train.max_steps or (max(1, math.ceil(train.epochs * count / train.batch_size)) if count else None)
    return Work(stage, cfg, job, rows, steps, train.batch_size * SCORES[stage] * (limit if packed else rows.mean), prompt_in_front(cfg, chain))


def prompt_in_front(cfg: Any, chain: Any) -> bool:
    """Whether the chain's SFT stage trains a soft prompt, under which this stage of it is trained."""
    return chain is not None and chain.sft is not None and not isinstance(cfg, SFTStage) and trains_prompt(chain.sft)


def _ppo(cfg: Any, layout: Layout, sources: Sources, chain: Any, tokens: Any, limit: int, shared: dict[str, Any]) -> Work:
    new, train = cfg.sampling.max_new_tokens, cfg.train
    if limit <= new:
        raise UserError(f"ppo.sampling.max_new_tokens {new} leaves no room for a prompt within max_length {limit}; raise ppo.max_length or lower it")
    rows = rows_of("ppo", cfg, tokens, limit - new)
    share = train.rollout_batch_size // layout.processes
    per_step = share // train.num_minibatches
    reward_adapters, reward_models = _reward_models(cfg, cfg.scorers, sources, chain)
    heldout = _reward_models(cfg, (cfg.evaluation.scorers if cfg.evaluation is not None else None) or [], sources, chain)
    mixed = _demonstrations(cfg, layout, tokens, limit)
    job = Job(
        "ppo", micro_batch=min(train.micro_batch_size, per_step), accumulation=math.ceil(per_step / train.micro_batch_size),
        row_tokens=rows.longest + new, prompt_tokens=rows.longest, completion_tokens=new,
        generate_batch=min(cfg.sampling.generate_batch_size, share), rollout_rows=train.rollout_batch_size, evaluates=cfg.evaluation is not None,
        value_function="adapter" if cfg.lora else ("head" if cfg.value_function == "head" else "copy"),
        own_reference=cfg.lora is None or (cfg.reference is not None and cfg.reference != cfg.init_from), reward_models=reward_models,
        reward_adapters=tuple(reward_adapters.values()), heldout_models=heldout[1],
        heldout_adapters=tuple(lora for name, lora in heldout[0].items() if name not in reward_adapters), offload_frozen=cfg.offload_frozen, quantized=cfg.quantization is not None, ema=cfg.ema_decay is not None,
        towards_start=cfg.towards_start is not None,        gathers_once=getattr(cfg.engine, "gather", "layer") != "layer", **mixed, **shared,
    )  # fmt: skip
    return Work("ppo", cfg, job, rows, train.iterations, train.rollout_batch_size * (rows.mean + new), prompt_in_front(cfg, chain))


def _demonstrations(cfg: Any, layout: Layout, tokens: Any, limit: int) -> dict[str, Any]:
    """What is imitated beside an optimizer step (`ptx`): rows of a process, and how long they are."""
    if cfg.ptx is None or not cfg.ptx.coef:
        return {}
    rows = rows_of("sft", SimpleNamespace(data=cfg.ptx.data, split=cfg.split, loss_on="all"), tokens, limit)
    count = max(1, round(cfg.ptx.ratio * cfg.train.rollout_batch_size / cfg.train.num_minibatches))
    return {"demonstrations": math.ceil(count / layout.processes), "demonstration_tokens": rows.longest, "demonstration_counted": rows.counted or rows.longest - 1}


def _reward_models(cfg: Any, scorers: Sequence[Any], sources: Sources, chain: Any) -> tuple[dict[str, Lora], tuple[Any, ...]]:
    """(shapes of the reward adapters that share the backbone, by name; configs of reward models that are models of their own).

    An adapter shares it that was trained on the weights which the policy starts from; one on others is merged into a base of its own.
    """
    own: list[Any] = []
    shared: dict[str, Lora] = {}
    for name in reward_model_names(scorers):
        step = made_by(chain, name) if getattr(chain, "reward", None) is not None else None
        if step is not None:
            section = sections(chain)[step]
            lora, start = lora_of(section), section.init_from
            fits = section.init_from == cfg.init_from
        else:
            lora, start = sources.adapter(name, cfg.registry), name
            fits = lora is not None and sources.lies_on(name, cfg.init_from, cfg.registry)
        if cfg.lora is not None and lora is not None and fits:
            shared[name] = lora
        else:
            own.append(sources.config(start, cfg.registry))
    return shared, tuple(own)


def planned_lora(stage: str, cfg: Any, sources: Sources) -> Lora | None:
    """The adapters to plan with; None for full training. Other techniques are planned as the nearest that can be simulated, and a note says so.

    Raises:
        UserError: a base in 4 bits, which is simulated for PPO only.
    """
    technique, lora = technique_of(cfg), lora_of(cfg)
    if lora is not None and lora.quantization is not None:
        raise UserError(f"{stage}: a base in 4 bits can't be planned yet; plan it with `lora:`, and take about 0.55 bytes instead of 2 for each frozen weight")
    if lora is not None:
        return lora.model_copy(update={"init": "default"})
    if isinstance(technique, Full) and technique.freeze is not None:
        sources.note(f"{stage}: planned as if nothing were frozen: an upper bound")
    if isinstance(technique, Full):
        return None
    sources.note(f"{stage}: {technique.method} is planned as LoRA of rank 1, whose activations are about the same")
    return Lora(rank=1, alpha=1)


def _bf16(cfg: Any, layout: Layout) -> bool:
    """Whether the stage computes in bf16 on the planned device."""
    return cfg.train.precision == "bf16" or (cfg.train.precision == "auto" and layout.device.gpu)


def _checkpointing(cfg: Any) -> bool:
    return bool(cfg.train.gradient_checkpointing)


def _attention(cfg: Any) -> str | None:
    """A kernel that can be simulated: those of other packages keep what torch's own keeps."""
    return "eager" if cfg.attn_implementation == "eager" else "sdpa"
