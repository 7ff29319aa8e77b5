"""Tiny random models and a byte-level tokenizer on disk, so that tests load real Hugging Face folders and no hub."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 259  # 256 bytes, pad, bos, eos


def tiny_tokenizer():
    """A byte-level tokenizer: every byte is a token; <pad> 256, <bos> 257, <eos> 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<pad>": 256, "<bos>": 257, "<eos>": 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=512
    )


def tiny_config(hidden: int = 32, layers: int = 2, vocabulary: int = VOCABULARY, **changes):
    """The config of a Llama small enough for a test."""
    from transformers import LlamaConfig

    values = dict(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=512, pad_token_id=256, bos_token_id=257, eos_token_id=258, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaConfig(**(values | changes))


def tiny_model(folder: Path, seed: int = 0, **changes) -> Path:
    """Write a random Llama and its tokenizer to `folder` and return it."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_data(folder: Path, words: str) -> None:
    """Write demos.jsonl, pairs.jsonl and prompts.jsonl: prompts "say a m" …, answers that say please (or, rejected, now)."""
    prompts = [f"say {a} {b}" for a in "abcdefgh" for b in words]
    for name, rows in {
        "demos": [{"prompt": p, "completion": f"{p[4:]} please"} for p in prompts],
        "pairs": [{"prompt": p, "chosen": f"{p[4:]} please", "rejected": f"{p[4:]} now"} for p in prompts],
        "prompts": [{"prompt": p} for p in prompts],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
