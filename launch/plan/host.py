"""Main memory of a node that offloaded state takes, and what offloading moves: by rules read from DeepSpeed's code (0.19.8), not measured.

deepspeed/runtime/zero/stage_1_and_2.py and stage3.py: float32 weights, two moments and float32 gradients of a process's share lie on the host; ZeRO-3
besides keeps the gradients as they come, and ZeRO-2 does while it accumulates, with a buffer as large as the largest weight. All of it is
page-locked by default, which PyTorch takes in powers of two: up to twice as much.
"""

from __future__ import annotations

from launch.plan.job import Job
from launch.plan.jobs import Work
from launch.plan.layout import Layout
from launch.plan.spread import ADAMW, MASTER, START, STATE
from launch.plan.timing import shape_of
from launch.scale import ModelShape

PCIE = 25e9  # bytes/s of PCIe 4.0 x16, one direction


def host_of(work: Work, layout: Layout) -> dict[str, int]:
    """Part -> bytes of main memory per node of what is offloaded or, as the starting weights of PPO, kept there; empty where nothing is."""
    job = work.job
    width, each = _width(job), layout.processes / layout.nodes / layout.split
    whole, trained = _numbers(work)
    found: dict[str, float] = {}
    if layout.offload_parameters:
        found["parameters"] = each * width * whole
    if layout.offload_optimizer:
        comes = width if layout.zero == 3 or job.accumulation > 1 else 0
        found["gradients"] = each * (4 + comes) * trained
        found["optimizer"] = each * (4 * STATE.get(job.optimizer, ADAMW) + (MASTER if layout.zero else 0)) * trained
        if layout.zero in (1, 2):
            found["buffers"] = layout.processes / layout.nodes * width * _largest(job)
    frozen_width = 2 if job.bf16 else 4
    frozen = sum(shape.parameters for shape in _frozen(work))
    if frozen and layout.offload_parameters:
        found["frozen models"] = each * frozen_width * frozen
    elif frozen and job.offload_frozen and job.gpu:
        found["frozen models"] = layout.processes / layout.nodes * frozen_width * frozen
    if job.towards_start and job.gpu:
        found[START] = layout.processes / layout.nodes * 4 * shape_of(job.config, job.lora, scores=False).trained
    return {part: int(size) for part, size in found.items()}


def moved(work: Work, layout: Layout) -> int:
    """Bytes that a process sends over PCIe in an optimizer step, both ways: gradients out and weights in, and offloaded weights in for every pass."""
    job = work.job
    width = _width(job)
    whole, trained = _numbers(work)
    passes = (3 if job.checkpointing else 2) * job.accumulation if layout.offload_parameters else 0
    return int((2 * width * trained * layout.offload_optimizer + passes * width * whole) / layout.split)


def _width(job: Job) -> int:
    """Bytes of a trained model's weight where it is used."""
    return 2 if job.bf16 and job.pure_bf16 else 4


def _numbers(work: Work) -> tuple[int, int]:
    """(weights, trained weights) of the models that are trained."""
    job = work.job
    policy = shape_of(job.config, job.lora, scores=work.stage == "reward")
    value = shape_of(job.config, job.lora, scores=True) if work.stage == "ppo" and job.value_function != "head" else None
    if value is None:
        return policy.parameters, policy.trained
    own = value.parameters if job.value_function == "copy" else value.trained  # adapters share the backbone
    return policy.parameters + own, policy.trained + value.trained


def _frozen(work: Work) -> list[ModelShape]:
    """Frozen models that are models of their own."""
    job = work.job
    models = [shape_of(config, scores=True, frozen=True) for config in job.reward_models]
    return models + ([shape_of(job.config, frozen=True)] if work.stage in ("dpo", "ppo") and job.own_reference else [])


def _largest(job: Job) -> int:
    """Numbers of the largest trained weight: an embedding or a layer of the MLP; of adapters nothing that counts."""
    if job.lora is not None:
        return 0
    text = job.config.get_text_config()
    return int(text.hidden_size * max(job.vocabulary or 0, text.vocab_size, getattr(text, "intermediate_size", 0) or 0))
