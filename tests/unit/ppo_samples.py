"""Tiny models, ragged tokens and scorers for the tests of PPO."""

from __future__ import annotations

import torch

from configs.schema import PPOStage
from configs.schema.ppo import Sampling
from stages.ppo.rollout import Tokens
from stages.ppo.sampling import left_pad
from tests.tiny import tiny_config

PAD = 0


def model_of(kind: str = "llama", *, spread: float = 0.3, seed: int = 0, vocabulary: int = 32, positions: int = 128, **changes):
    """A random causal language model in eval mode; `spread` is what keeps its distributions from being flat."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    torch.manual_seed(seed)
    common = dict(initializer_range=spread, pad_token_id=PAD, bos_token_id=1, eos_token_id=2) | changes
    if kind == "gpt2":
        sizes = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=vocabulary, n_positions=positions)
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common)).eval()
    return LlamaForCausalLM(tiny_config(hidden=16, vocabulary=vocabulary, max_position_embeddings=positions, **common)).eval()


def ragged_ids(rows: int, *, seed: int = 0, prompt=(1, 9), completion=(1, 8), vocabulary: int = 32):
    """Prompts and completions of random lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [draw(*prompt) for _ in range(rows)], [draw(*completion) for _ in range(rows)]


def tokens_of(prompts, completions, pad: int = PAD) -> Tokens:
    """Left-padded prompts, right-padded completions."""
    ids, mask = left_pad(prompts, pad, torch.device("cpu"))
    width = max(map(len, completions))
    padded = torch.tensor([c + [pad] * (width - len(c)) for c in completions])
    return Tokens(ids, mask, padded, torch.tensor([[True] * len(c) + [False] * (width - len(c)) for c in completions]))


def config(**changes) -> PPOStage:
    """A PPO config for what needs no files."""
    return PPOStage(**{"name": "x", "init_from": "x", "prompts": "x", "scorers": [{"kind": "length", "target": 3}], **changes})


def sampling(**changes) -> Sampling:
    """Sampling settings that stop at EOS."""
    return Sampling(**{"max_new_tokens": 12, **changes})
