"""A stand-in for vLLM and for TRL's client of a vLLM server. It knows only the calls that PPO makes, checks what it is given, and samples
from the weights that were carried over, so that stale or wrong weights show."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from trl.generation import vllm_generation

from configs.schema import Sampling
from stages.ppo.sampling import sample

SETTINGS = {
    "n": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "logprobs": 0,
    "ignore_eos": True,
}  # fmt: skip


class SamplingParams:
    """Takes the keywords that vLLM's takes, and refuses any that would bend the distribution."""

    def __init__(self, *, temperature: float, max_tokens: int, seed: int, stop_token_ids: list[int], detokenize: bool = True, **rest: Any) -> None:
        assert rest == SETTINGS, rest
        assert isinstance(seed, int)
        assert -(2**63) <= seed < 2**63
        self.temperature, self.max_tokens, self.seed, self.stop_token_ids = temperature, max_tokens, seed, stop_token_ids


class Weights:
    """A copy of a model, filled tensor by tensor by name."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model)
        self.loads = 0
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))

    @torch.no_grad()
    def load_weights(self, pairs: Any) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in pairs:
            assert parameters[name].shape == tensor.shape, name
            parameters[name].copy_(tensor)
            self.loads += 1

    def draw(self, prompt: list[int], params: SamplingParams) -> Any:
        """What vLLM would return for one request."""
        settings = Sampling(max_new_tokens=params.max_tokens, temperature=params.temperature, stop_at_eos=bool(params.stop_token_ids))
        (row,) = sample(self.model, [prompt], sampling=settings, eos_ids=params.stop_token_ids, pad_id=0, seeds=[params.seed])
        chances = [{token: SimpleNamespace(logprob=x, rank=1)} for token, x in zip(row.completion_ids, row.logprobs, strict=True)]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row.completion_ids), logprobs=chances)], prompt_token_ids=prompt)


class LLM:
    """Colocated vLLM with sleep mode: asleep at level 2 it has neither weights nor cache."""

    plain: Any = None  # the architecture, set by the test

    def __init__(self, **settings: Any) -> None:
        assert settings["logprobs_mode"] == "processed_logprobs"
        self.settings, self.weights, self.awake, self.resets = settings, Weights(LLM.plain), {"weights", "kv_cache"}, 0
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def load_weights(self, pairs: Any) -> None:
        assert "weights" in self.awake, "weights are written to memory that was given back"
        self.weights.load_weights(pairs)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def wake_up(self, tags: list[str]) -> None:
        self.awake |= set(tags)

    def sleep(self, level: int) -> None:
        assert self.settings["enable_sleep_mode"]
        assert level == 2
        self.awake = set()
        self.weights = Weights(LLM.plain)

    def generate(self, prompts: Any, sampling_params: Any, use_tqdm: bool) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"}, self.awake
        return [self.weights.draw(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]


class Client:
    """TRL's VLLMClient, without a server."""

    def __init__(self, base_url: str, group_port: int, connection_timeout: float) -> None:
        self.base_url, self.weights, self.device, self.resets, self.asked = base_url, Weights(LLM.plain), None, 0, 0

    def init_communicator(self, device: Any) -> None:
        self.device = device

    def update_named_params(self, metadata: Any, named_params: Any) -> None:
        pairs = list(named_params)
        assert [(n, str(x.dtype).removeprefix("torch."), list(x.shape)) for n, x in pairs] == metadata
        self.weights.load_weights(pairs)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: Any, *, generation_kwargs: Any, **settings: Any) -> dict[str, Any]:
        self.asked += 1
        rows = [self.weights.draw(prompt, SamplingParams(**settings, **generation_kwargs)).outputs[0] for prompt in prompts]
        chances = [[[x[token].logprob] for token, x in zip(row.token_ids, row.logprobs, strict=True)] for row in rows]
        return {"completion_ids": [list(row.token_ids) for row in rows], "logprobs": chances}


def install(monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    """Put the stand-in where TRL and we look for vLLM; `plain` is the architecture it serves."""
    module: Any = ModuleType("vllm")
    module.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
    monkeypatch.setattr(LLM, "plain", copy.deepcopy(plain))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # VLLMGeneration sets some of them; undone after the test
        monkeypatch.delenv(name)
