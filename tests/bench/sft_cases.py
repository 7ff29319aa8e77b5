"""What the SFT benchmark measures: models, settings and rows, the same for both sides, and the files they read."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.cases import BOS, CASES, EOS, PAD, _llama, word_tokenizer

SETTINGS = ("padded", "packed", "lora", "checkpointed")


@dataclass(frozen=True)
class SFTCase:
    """One model, batch and setting. Both sides get every one of these values."""

    name: str  # MODEL/SETTING
    model: dict[str, Any]  # LlamaConfig; random weights
    setting: str
    tokens: tuple[int, int]  # of the shortest and the longest row; most rows are short, as demonstrations are
    batch: int = 32  # rows (packed: sequences) of an optimizer step
    micro_batch: int = 8  # of one forward pass
    steps: int = 30  # optimizer steps, the first three of which are not timed
    learning_rate: float = 2e-3
    precision: str = "fp32"
    gpu: bool = False

    @property
    def max_length(self) -> int:
        """Tokens that no row exceeds, and that a packed sequence holds at most."""
        return self.tokens[1]


def _cases() -> dict[str, SFTCase]:
    models = {
        "stories260K": (_llama(64, 5, 8, 4, 172, 512), (24, 256)),
        "vocab32k": (_llama(256, 4, 8, 4, 688, 32_000), (24, 256)),
        "llama1b": (_llama(2048, 16, 32, 8, 8192, 32_000, max_position_embeddings=4096), (128, 2048)),
    }
    found = [
        SFTCase(f"{name}/{setting}", shape, setting, tokens, precision="bf16" if name == "llama1b" else "fp32", gpu=name == "llama1b",
                learning_rate=1e-4 if name == "llama1b" else 2e-3, steps=30 if name != "vocab32k" else 12)
        for name, (shape, tokens) in models.items() for setting in SETTINGS
    ]  # fmt: skip
    long = SFTCase("vocab32k/long", models["vocab32k"][0] | {"max_position_embeddings": 4096}, "padded", (1024, 2048), batch=8, micro_batch=4, steps=8)
    eight = replace(long, name="vocab32k/8k", model=long.model | {"max_position_embeddings": 8192}, setting="checkpointed", tokens=(8000, 8192), batch=1, micro_batch=1, steps=6)
    return {case.name: case for case in [*found, long, eight]}


SFT_CASES = _cases()


def tiny(case: SFTCase) -> SFTCase:
    """The same setting with so little work that it only shows that the benchmark runs."""
    return replace(case, model=CASES["stories260K"].model, tokens=(6, 16), batch=4, micro_batch=2, steps=4)


def prepare(folder: Path, case: SFTCase) -> dict[str, Any]:
    """Write the model, rows to train on and rows held out; returns the job that both sides read."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**case.model, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)).save_pretrained(folder / "base")
    word_tokenizer(case.model["vocab_size"]).save_pretrained(folder / "base")
    count = case.batch * case.steps * (6 if case.setting == "packed" else 1)
    held_out = max(8, 128 * 256 // max(256, case.max_length))  # about as many tokens whatever their rows' length
    words = chains(count + held_out, case.tokens, case.model["vocab_size"])
    for name, part in (("train", words[:count]), ("held_out", words[count:])):
        lines = [json.dumps({"prompt": " ".join(row[: len(row) // 4]), "completion": " " + " ".join(row[len(row) // 4 :])}) for row in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {"case": asdict(case), "folder": str(folder)}


def chains(count: int, tokens: tuple[int, int], vocabulary: int) -> list[list[str]]:
    """Word sequences that can be learned: each word is followed by one of three, so that a model's loss falls towards log 3.

    Lengths (words and one EOS) are skewed: a quarter of the range on average.
    """
    numbers = random.Random(0)
    usable = range(4, min(vocabulary, 400))
    follows = {word: numbers.sample(usable, 3) for word in usable}
    made = []
    for _ in range(count):
        length = round(tokens[0] + (tokens[1] - 1 - tokens[0]) * numbers.betavariate(1, 3))
        row = [numbers.choice(usable)]
        while len(row) < length:
            row.append(numbers.choice(follows[row[-1]]))
        made.append([f"w{word}" for word in row])
    return made


def held_out_loss(model: Any, folder: Path, tokens: int = 2048) -> float:
    """Loss in nats per completion token on the rows held out, about `tokens` at a time: a plain forward pass of plain transformers, the same for both sides."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    encoded = [encode(tokenizer, row) for row in rows]
    batch = max(1, tokens // max(len(ids) for ids, _ in encoded))
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            ids, starts = zip(*encoded[start : start + batch], strict=True)
            inputs, labels = padded(ids, starts, tokenizer.pad_token_id, next(model.parameters()).device)
            logprobs = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            counted = labels[:, 1:] != -100
            total -= logprobs.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)[counted].double().sum().item()
            count += int(counted.sum())
    return total / count


def encode(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], int]:
    """The ids of a row with its EOS, and where its completion begins."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    return [*prompt, *tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], len(prompt)


def padded(ids: Sequence[list[int]], starts: Sequence[int], pad: int, device: Any) -> tuple[dict[str, Any], Any]:
    """Rows of ids as model inputs [B, T] padded on the right, and labels that are -100 before a completion and at pads."""
    import torch

    longest = max(map(len, ids))
    inputs = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    labels = torch.tensor([[-100] * first + row[first:] + [-100] * (longest - len(row)) for row, first in zip(ids, starts, strict=True)], device=device)
    return {"input_ids": inputs, "attention_mask": mask}, labels
