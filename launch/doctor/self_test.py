"""A tiny model through the real code: SFT, the registry, loading, sampling. `python -m launch.doctor.self_test` prints what came of it as JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.doctor.check import Findings, Settings
from launch.doctor.child import ChildError, ask

SECONDS = 240.0  # on a busy machine; alone it takes about ten
FRUITS = ("apple", "pear", "plum", "fig", "lime", "kiwi", "date", "nut")


def check_self_test(_: Settings) -> Findings:
    """Train, publish, load and generate in a process of its own; the loss must fall and the samples be sound."""
    found = Findings()
    try:
        facts = ask("launch.doctor.self_test", seconds=SECONDS, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=first_gpu(os.environ.get("CUDA_VISIBLE_DEVICES")))
    except ChildError as error:
        found.fail(f"a tiny model could not be trained and sampled: {error}", "if nothing above explains it, report this as a bug, with this block")
        return found
    return judge(found, facts)


def first_gpu(visible: str | None) -> str:
    """One GPU of those that CUDA_VISIBLE_DEVICES names: in one process the Trainer would spread a batch over all of them."""
    return "0" if visible is None else visible.partition(",")[0]


def judge(found: Findings, facts: dict[str, Any]) -> Findings:
    """Findings from what the process measured."""
    found.facts = facts
    first, last = facts["loss"]
    found.summary = f"SFT loss {first:.2f} → {last:.2f}, {facts['sampled tokens']} tokens sampled on {facts['device']}, {facts['seconds']:.0f} s"
    if not (math.isfinite(last) and last < 0.8 * first):
        found.fail(f"the loss did not fall: {first} → {last}", "arithmetic on this machine is broken: try another torch build; report this as a bug, with this block")
    if facts["sampled tokens"] == 0 or not facts["sound"]:
        found.fail("sampling gave no tokens, or tokens outside of the vocabulary, or log-probs that are not finite", "report this as a bug, with this block")
    return found


def train_and_sample(folder: Path) -> dict[str, Any]:
    """SFT of a random Llama of about 30,000 parameters for 20 steps, published and loaded again, then eight completions."""
    import torch

    from configs.schema import Sampling, SFTStage
    from stages import models, sft
    from stages.ppo.sampling import completion_seed, sample
    from stages.registry import Registry
    from stages.tokens import load_tokens

    started = time.monotonic()
    _write_base(folder / "base")
    rows = [{"prompt": f"say {first} {second}", "completion": f"{first} {second} please"} for first in FRUITS for second in FRUITS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = SFTStage.model_validate({
        "name": "doctor", "registry": str(folder / "registry"), "output": str(folder / "sft"), "init_from": str(folder / "base"), "data": str(folder / "rows.jsonl"),
        "max_length": 64, "split": {"validation": 0.1, "test": 0.1},
        "train": {"max_steps": 20, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 5e-3, "warmup": 0.0, "log_every": 1, "eval_every": 20},
    })  # fmt: skip
    sft.main(cfg)
    lines = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["sft/loss"] for line in lines if "sft/loss" in line]
    checkpoint = Registry(folder / "registry", create=False).resolve("sft/doctor", deep=True)
    origin = models.find("sft/doctor", folder / "registry")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokens = models.load_policy(origin).to(device).eval(), load_tokens(origin, "auto")
    prompts = [tokens.tokenizer(f"say {fruit} {fruit}")["input_ids"] for fruit in FRUITS]
    samples = sample(
        model, prompts, sampling=Sampling(max_new_tokens=16), eos_ids=tokens.eos_ids, pad_id=tokens.pad_id, seeds=[completion_seed(0, 0, i) for i in range(len(prompts))]
    )  # fmt: skip
    vocabulary = len(tokens.tokenizer)
    sound = all(0 <= token < vocabulary for item in samples for token in item.completion_ids) and all(math.isfinite(p) and p <= 1e-6 for item in samples for p in item.logprobs)
    return {
        "loss": [losses[0], losses[-1]], "steps": len(losses), "published": checkpoint.ref, "sampled tokens": sum(len(item.completion_ids) for item in samples),
        "sound": sound, "device": device.type, "parameters": model.num_parameters(), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def _write_base(folder: Path) -> None:
    """A random Llama and a byte-level tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from launch.demo.base import build_tokenizer

    tokenizer = build_tokenizer(iter(f"say {fruit} please" for fruit in FRUITS), 320)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="align-doctor-") as place:
        with contextlib.redirect_stdout(sys.stderr):  # what the stage says; the answer stands alone on stdout
            answer = train_and_sample(Path(place))
        print(json.dumps(answer))
