"""How fast each rollout engine samples, alternating in one run: python -m tests.bench.engines [MODEL_FOLDER] [rounds=3].

Without a folder: a random Llama of 4 layers, 256 wide, with 32,000 tokens. Prints tokens per second of processor time of each engine
(median of the rounds) and its ratio to the native one: other work on the machine counts in seconds of a clock, and not in those.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch

from configs.schema import Sampling
from stages.ppo.engines.continuous import ContinuousEngine
from stages.ppo.engines.generate import GenerateEngine
from stages.ppo.engines.native import NativeEngine
from stages.ppo.engines.protocol import Policy

COMPLETIONS, TOKENS, PROMPTS = 64, 64, (4, 48)  # completions, tokens of the longest one, shortest and longest prompt


def model_of(folder: str | None) -> Any:
    """The model of a folder, or the random one."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder:
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 32_000}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()


def measure(model: Any, *, rounds: int, stop: bool) -> dict[str, float]:
    """Tokens per second of each engine, the median over rounds in which the engines take turns."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*PROMPTS, (COMPLETIONS,), generator=generator).tolist()
    prompts = [torch.randint(5, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    # Ends that come about once in 32 tokens: an eos id per 1/32 of the vocabulary.
    eos = tuple(range(3, model.config.vocab_size, 32)) if stop else ()
    policy = Policy(model, Sampling(max_new_tokens=TOKENS, stop_at_eos=stop), eos, 0, 0, nullcontext)
    engines = {"native": NativeEngine(policy), "generate": GenerateEngine(policy), "generate, static cache": GenerateEngine(policy, static_cache=True), "continuous": ContinuousEngine(policy)}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            started = time.process_time()
            samples = engine.sample(prompts, iteration=turn, indices=range(COMPLETIONS))
            if turn:  # the first turn warms up
                speeds[name].append(sum(len(s.completion_ids) for s in samples) / (time.process_time() - started))
    return {name: statistics.median(values) for name, values in speeds.items()}


def main(arguments: list[str]) -> None:
    """Measure and print."""
    rounds = next((int(a.removeprefix("rounds=")) for a in arguments if a.startswith("rounds=")), 3)
    folder = next((a for a in arguments if "=" not in a), None)
    model = model_of(folder)
    for stop in (False, True):
        found = measure(model, rounds=rounds, stop=stop)
        print(f"{COMPLETIONS} completions, {'ended by an EOS about once in 32 tokens, at most' if stop else 'each'} {TOKENS} tokens, {torch.get_num_threads()} thread(s)")
        for name, speed in found.items():
            print(f"  {name:24} {speed:8.0f} tokens/CPU s  {speed / found['native']:.2f} x native")
        print(json.dumps({"stop": stop, "tokens_per_second": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
