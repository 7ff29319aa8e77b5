"""Published training speeds that the model is held against, and the few points on which its constants were set.

Sources: MPT: mosaicml/llm-foundry, scripts/train/benchmarking/README.md (FSDP full sharding, A100 nodes joined at 1600 Gb/s; every row of
2048 tokens). FMS: foundation-model-stack/fms-fsdp, README.md (FSDP full sharding on 128 A100, 400 Gb/s, 4096 tokens). torchtitan:
pytorch/torchtitan, docs/performance.md (FSDP2 on 64 A100). DeepSpeed-Chat: microsoft/DeepSpeed, blogs/deepspeed-chat/README.md, tables 1, 2
and 5, and microsoft/DeepSpeedExamples, BenckmarkSetting.md and the scripts of step 3.

DeepSpeed-Chat's two statements of its setting differ by a factor of two: 135,317,504 tokens are 264,292 prompts of 256 + 256 (the
benchmark page's arithmetic), while the blog says 131.9k prompts. `PROMPTS` is the first; the other reading halves every prediction.
Its batch per GPU is published for 13B on 8 GPUs and 66B on 64 (in the scripts) and follows from the limit of 1024 for 13B on 64; the others are assumed.
Left out: OPT-30B on 8 A100-40GB (1.85 days: it needs offloading, which is not modelled), steps 1 and 2 (their data is not stated), FMS's 7B and 13B
(sharded within nodes only).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launch.scale.facts import ModelShape, PlanFacts
from launch.scale.hardware import HARDWARE, Hardware, Network

PROMPTS, PROMPTS_OF_THE_BLOG, LIMIT = 264_292, 131_900, 1024  # prompts of an epoch by either reading; largest batch


@dataclass(frozen=True)
class Point:
    """A published figure. unit: tokens/s/GPU (larger is faster) or hours. calibrates: constants were set on it. assumed: a setting is not published."""

    source: str
    case: str
    gpus: int
    value: float
    unit: str
    hardware: Hardware
    facts: PlanFacts
    calibrates: bool = False
    assumed: str = ""


def _mpt(name: str, vocabulary: int = 50_432) -> ModelShape:
    """An MPT model: learnt positions are looked up, the embedding is the output too."""
    parameters, layers, hidden = {
        "125m": (125_311_488, 12, 768), "350m": (355_985_408, 24, 1024), "760m": (760_470_528, 24, 1536), "1b": (1_315_950_592, 24, 2048),
        "3b": (2_651_837_440, 32, 2560), "7b": (6_658_859_008, 32, 4096), "13b": (12_853_954_560, 40, 5120), "30b": (29_975_214_080, 48, 7168),
        "70b": (64_862_437_376, 80, 8192),
    }[name]  # fmt: skip
    return ModelShape(parameters, parameters, layers, hidden, 2 * hidden, vocabulary, lookup=2048 * hidden)


# model, GPUs, micro-batch, sequences per step, 4: gradients sent in float32 (mixed precision), 2: in 16 bits; checkpointing; tokens/s/GPU
_A100_80 = (
    ("70b", 64, 8, 2048, 2, True, 410), ("70b", 32, 2, 1024, 2, True, 373), ("30b", 8, 3, 504, 4, True, 916), ("13b", 8, 2, 48, 4, False, 2262),
    ("7b", 8, 6, 96, 4, False, 4641), ("3b", 8, 10, 160, 4, False, 10811), ("1b", 8, 14, 448, 4, False, 20513), ("760m", 8, 24, 384, 4, False, 32434),
    ("350m", 8, 32, 512, 4, False, 58782), ("125m", 8, 40, 640, 4, False, 142830), ("125m", 8, 32, 512, 4, False, 141737),
)  # fmt: skip
_A100_40 = (
    ("70b", 128, 4, 512, 2, True, 376), ("70b", 64, 2, 128, 2, True, 276), ("30b", 128, 6, 768, 2, True, 865), ("30b", 32, 4, 128, 2, True, 857),
    ("13b", 128, 16, 2048, 2, True, 1972), ("13b", 64, 16, 1024, 2, True, 1976), ("13b", 32, 14, 448, 2, True, 1998), ("13b", 16, 10, 160, 2, True, 1993),
    ("13b", 8, 4, 512, 2, True, 1668), ("7b", 128, 18, 2304, 2, True, 3623), ("7b", 64, 18, 1152, 2, True, 3665), ("7b", 32, 18, 576, 2, True, 3725),
    ("7b", 16, 16, 256, 2, True, 3645), ("7b", 8, 12, 384, 2, True, 3679), ("3b", 128, 6, 768, 2, False, 9538), ("3b", 64, 6, 384, 2, False, 9736),
    ("3b", 32, 6, 192, 2, False, 9914), ("3b", 16, 5, 80, 2, False, 9750), ("3b", 8, 5, 320, 2, False, 10065), ("1b", 128, 10, 1280, 2, False, 18647),
    ("1b", 64, 10, 640, 2, False, 19001), ("1b", 32, 10, 320, 2, False, 15555), ("1b", 16, 8, 128, 2, False, 19085), ("1b", 8, 8, 512, 2, False, 19271),
    ("760m", 128, 12, 1536, 2, False, 28940), ("760m", 64, 12, 768, 2, False, 29344), ("760m", 32, 12, 384, 2, False, 29648),
    ("760m", 16, 12, 192, 2, False, 29607), ("760m", 8, 12, 384, 2, False, 30173), ("350m", 128, 18, 2304, 2, False, 51934), ("350m", 64, 18, 1152, 2, False, 52689),
    ("350m", 32, 18, 576, 2, False, 53811), ("350m", 16, 18, 288, 2, False, 55413), ("350m", 8, 16, 512, 2, False, 55995), ("125m", 128, 26, 3328, 2, False, 123936),
    ("125m", 64, 26, 1664, 2, False, 125234), ("125m", 32, 26, 832, 2, False, 127122), ("125m", 16, 26, 416, 2, False, 130535), ("125m", 8, 26, 624, 2, False, 136334),
)  # fmt: skip
_H100 = (
    ("70b", 64, 8, 2048, 4, True, 1039), ("70b", 32, 2, 1024, 4, True, 882), ("30b", 32, 14, 1344, 4, True, 2308), ("30b", 16, 10, 480, 4, True, 2263),
    ("30b", 8, 3, 504, 4, True, 2002), ("13b", 64, 2, 128, 4, False, 4800), ("13b", 32, 2, 64, 4, False, 4811), ("13b", 16, 2, 32, 4, False, 4767),
    ("13b", 8, 2, 16, 4, False, 4792), ("7b", 8, 6, 48, 4, False, 10643), ("3b", 64, 6, 1152, 4, False, 22525), ("3b", 32, 6, 576, 4, False, 23021),
    ("3b", 16, 10, 480, 4, False, 24142), ("1b", 64, 20, 1280, 4, False, 44402), ("1b", 32, 20, 640, 4, False, 45130), ("1b", 16, 20, 320, 4, False, 46037),
    ("1b", 8, 14, 112, 4, False, 45455), ("760m", 32, 24, 768, 4, False, 67971), ("760m", 16, 24, 384, 4, False, 68551), ("760m", 8, 24, 384, 4, False, 63147),
)  # fmt: skip
CALIBRATING = {("a100-80gb", "7b", 6), ("a100-80gb", "125m", 40), ("h100-80gb", "7b", 6)}  # by micro-batch


def pretraining() -> list[Point]:
    """MPT, FMS and torchtitan: the arithmetic of SFT."""
    points = []
    for name, rows in (("a100-80gb", _A100_80), ("a100-40gb", _A100_40), ("h100-80gb", _H100)):
        for model, gpus, micro, batch, gradients, recomputed, speed in rows:
            facts = PlanFacts("sft", _mpt(model), batch, 1, 2048, micro, zero=3, checkpointing=recomputed, gradient_bytes=gradients)
            points.append(Point("MPT", f"{model} {name}", gpus, speed, "tokens/s/GPU", HARDWARE[name], facts, (name, model, micro) in CALIBRATING))
    a100 = HARDWARE["a100-80gb"]
    slow = replace(a100, network=Network(8, a100.network.link, a100.network.link_latency, 50e9, a100.network.node_latency))  # 400 Gb/s a node
    llama = {"34b": ModelShape(33_740_000_000, 33_740_000_000, 48, 8192, 2048, 32_000, 262_000_000), "70b": ModelShape(68_980_000_000, 68_980_000_000, 80, 8192, 2048, 32_000, 262_000_000)}
    for model, micro, speed in (("34b", 8, 772), ("70b", 6, 380)):
        points.append(Point("FMS", f"{model} a100-80gb, 400 Gb/s", 128, speed, "tokens/s/GPU", slow, PlanFacts("sft", llama[model], 128 * micro, 1, 4096, micro, zero=3, checkpointing=True)))
    titan = {
        "Llama 2 13B": (ModelShape(13_016_000_000, 13_016_000_000, 40, 5120, 10_240, 32_000, 163_840_000), 2, 4096, False, 2162),
        "Llama 2 70B": (llama["70b"], 2, 4096, True, 353),
        "Llama 3 70B": (ModelShape(70_554_000_000, 70_554_000_000, 80, 8192, 2048, 128_256, 1_050_673_000), 1, 8192, True, 331),
    }
    for model, (shape, micro, length, recomputed, speed) in titan.items():
        facts = PlanFacts("sft", shape, 64 * micro, 1, length, micro, zero=3, checkpointing=recomputed, gradient_bytes=4)
        points.append(Point("torchtitan", f"{model} a100-80gb", 64, speed, "tokens/s/GPU", a100, facts, assumed="network of 1600 Gb/s a node"))
    return points


_OPT = {"350m": (331_196_416, 24, 1024), "6.7b": (6_658_473_984, 32, 4096), "13b": (12_853_473_280, 40, 5120), "30b": (29_974_540_288, 48, 7168), "66b": (65_718_497_280, 64, 9216), "175b": (174_604_000_000, 96, 12_288)}
LORA_RANK = 128  # of the released scripts for 13B and above, on every linear layer


def _opt(name: str, lora: bool = False, frozen: bool = False) -> ModelShape:
    parameters, layers, hidden = _OPT[name]
    adapters = layers * LORA_RANK * (4 * 2 * hidden + 2 * 5 * hidden)  # four square layers, two of hidden × 4 hidden
    trained = 0 if frozen else adapters if lora else parameters
    return ModelShape(parameters + (adapters if lora else 0), trained, layers, hidden, 2 * hidden, 50_272, lookup=2048 * hidden)


# model, GPUs, hours, memory of a GPU, prompts per GPU and step, devices that split the policy in sampling, what is assumed
_CHAT = (
    ("13b", 8, 9.0, 80, 16, 2, ""), ("13b", 64, 1.25, 80, 16, 2, ""), ("66b", 64, 7.5, 80, 4, 8, ""), ("6.7b", 8, 4.1, 80, 16, 1, "batch 16 per GPU"),
    ("30b", 8, 18.0, 80, 16, 4, "batch 16 per GPU"), ("66b", 8, 50.4, 80, 4, 8, "batch 4 per GPU"), ("30b", 64, 4.0, 80, 16, 4, "batch 16 per GPU"),
    ("175b", 64, 20.0, 80, 4, 8, "batch 4 per GPU"), ("6.7b", 8, 5.7, 40, 8, 1, "batch 8 per GPU"), ("13b", 8, 10.8, 40, 8, 2, "batch 8 per GPU"),
)  # fmt: skip


def chat(prompts: int = PROMPTS, batch_factor: float = 1.0) -> list[Point]:
    """DeepSpeed-Chat step 3: PPO of an OPT policy with reward and value models of 350M, ZeRO-3, one pass over each rollout, checkpointing.

    batch_factor: what the assumed batches are multiplied by, to see what hangs on them (the limit of 1024 holds).
    """
    points = []
    for model, gpus, hours, memory, batch, split, assumed in _CHAT:
        lora = model != "6.7b"
        each = batch if not assumed else max(1, min(int(batch * batch_factor), LIMIT // gpus))
        small = _opt("350m")
        facts = PlanFacts(
            "ppo", _opt(model, lora), each * gpus, -(-prompts // (each * gpus)), 256, each, zero=3, new_tokens=256, checkpointing=True, reference=_opt(model, frozen=True),
            value=small, rewards=(small.frozen(),), generate_batch=each, tensor_parallel=split,
        )  # fmt: skip
        name = f"a100-{memory}gb"
        points.append(Point("DeepSpeed-Chat", f"OPT-{model} {name}", gpus, hours, "hours", HARDWARE[name], facts, (model, gpus, memory) == ("13b", 8, 80), assumed))
    return points
