"""What the PPO benchmark measures: models, batches and lengths, the same for both sides, and the files they read."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAD, BOS, EOS = 0, 1, 2  # of the random models; a model given by a folder has its own


@dataclass(frozen=True)
class Case:
    """One model and batch. Both sides get every one of these settings."""

    name: str
    about: str
    model: dict[str, Any]  # LlamaConfig; random weights
    samples: int = 64  # completions of one update
    completion_tokens: int = 64  # of every completion: EOS does not end one
    prompt_tokens: tuple[int, int] = (16, 64)  # of the shortest and the longest prompt, drawn uniformly
    epochs: int = 4
    micro_batch: int = 16  # completions of one forward pass with gradients
    generate_batch: int = 64
    updates: int = 2  # measured ones, after one that is not
    precision: str = "fp32"
    lora_rank: int = 16
    gpu: bool = False


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate, "vocab_size": vocabulary, "max_position_embeddings": 512, "tie_word_embeddings": True, **changes,
    }  # fmt: skip


CASES = {
    case.name: case
    for case in (
        Case("stories260K", "5 layers, 64 wide, 512 words: overhead-bound", _llama(64, 5, 8, 4, 172, 512), updates=3),
        Case("vocab32k", "4 layers, 256 wide, 32,000 words: compute- and memory-bound", _llama(256, 4, 8, 4, 688, 32_000)),
        Case(
            "llama1b", "about 1B weights in bf16, on a GPU", _llama(2048, 16, 32, 8, 8192, 32_000, max_position_embeddings=2048), samples=128,
            completion_tokens=256, prompt_tokens=(64, 256), generate_batch=128, precision="bf16", gpu=True,
        ),
    )
}  # fmt: skip


def tiny(case: Case) -> Case:
    """The same case with so little work that it only shows that the benchmark runs."""
    return Case(**(asdict(case) | {"samples": 4, "completion_tokens": 4, "prompt_tokens": (3, 6), "epochs": 1, "micro_batch": 2, "updates": 1}))


def prepare(folder: Path, case: Case, model: str | None = None) -> dict[str, Any]:
    """Write the policy, two reward models (whole, and as an adapter), and the prompts as text and as ids.

    `model` is a Hugging Face folder that takes the place of the random model. Returns the job that both sides read.
    """
    from configs.schema import PPOStage
    from stages import models
    from stages.ppo.prompts import load_prompts
    from stages.tokens import load_tokens
    from tests.bench.ours import settings
    from tests.stage.ppo_runs import publish_policy, publish_reward

    folder.mkdir(parents=True, exist_ok=True)
    if model is None:
        _random_model(folder / "base", case)
    else:
        (folder / "base").symlink_to(Path(model).resolve())
    policy = publish_policy(folder, "one")
    reward = publish_reward(folder, "whole")
    publish_reward(folder, "adapter", lora=True)
    tokens = load_tokens(models.find("sft/one", folder / "registry"), "raw")
    _write_prompts(folder / "prompts.jsonl", tokens.tokenizer, case)
    job = {"case": asdict(case), "folder": str(folder), "policy": str(policy.model_dir), "reward": str(reward.model_dir)}
    prompts, _ = load_prompts(PPOStage.model_validate(settings(job, "full")), tokens.formatter, 512)
    assert len(prompts.ids) == case.samples, f"{case.samples - len(prompts.ids)} prompts of {case.name} are too long"
    return job | {"prompt_ids": prompts.ids}


def _random_model(folder: Path, case: Case) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**case.model, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)).save_pretrained(folder)
    word_tokenizer(case.model["vocab_size"]).save_pretrained(folder)


def word_tokenizer(vocabulary: int) -> Any:
    """One token per word, so that text of n words has n tokens at any vocabulary size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", model_max_length=4096
    )


def _write_prompts(path: Path, tokenizer: Any, case: Case) -> None:
    """As many prompts as an update has samples: each update sees all of them, on both sides."""
    numbers = random.Random(0)
    special = set(tokenizer.all_special_ids)
    usable = [i for i in range(len(tokenizer)) if i not in special]
    rows = []
    for _ in range(case.samples):
        ids = numbers.choices(usable, k=numbers.randint(*case.prompt_tokens))
        rows.append(json.dumps({"prompt": tokenizer.decode(ids)}) + "\n")
    path.write_text("".join(rows))
