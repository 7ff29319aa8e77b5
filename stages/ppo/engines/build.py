"""Makes the engine that a config names, and proves on short prompts that it samples from the policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from configs.errors import UserError
from configs.extras import need
from configs.schema import VLLM, PPOStage, Sampling
from stages.ppo.build import PPOModels
from stages.ppo.engines.protocol import Engine, Policy
from stages.ppo.forward import hidden_states, token_outputs
from stages.ppo.modules import PolicyAndValue
from stages.ppo.rollout import padded
from stages.ppo.sampling import Sample
from stages.ppo.support import short_rows
from stages.tokens import ModelTokens

TOLERANCE = 0.25  # nats, mean over tokens: rounding in bf16 makes hundredths, another temperature or other weights make more
PROOF_TOKENS = 4


def check_engine(cfg: PPOStage) -> None:
    """What can be said about an engine before any model is loaded.

    Raises:
        MissingExtra: vLLM is not installed.
        UserError: it can't work on this machine.
    """
    if cfg.engine.kind == "vllm":
        need("vllm", "engine.kind: vllm", "vllm")
        if not torch.cuda.is_available():
            raise UserError("engine.kind vllm needs a GPU (weights reach it in place or over NCCL), and this machine has none; use engine.kind native")


def build_engine(cfg: PPOStage, built: PPOModels, tokens: ModelTokens, accelerator: Any) -> Engine:
    """The engine, holding the policy's weights of now. Every process calls it.

    Raises:
        UserError: it can't be made, or samples from something else than the policy.
    """
    policy = Policy(built.trained.sampler, cfg.sampling, tuple(tokens.eos_ids), tokens.pad_id, cfg.seed, accelerator.autocast)
    engine = Whole(_engine(cfg, policy, tokens, accelerator), built.trained, copies=cfg.engine.kind == "vllm")
    engine.sync()
    if cfg.engine.kind != "native":  # the native loop is proven before the models are built
        built.trained.eval()
        short = replace(policy, sampling=_short(cfg.sampling))
        with built.trained.for_sampling():
            prove_engine(cfg.engine.kind, engine if cfg.engine.kind == "vllm" else _engine(cfg, short, tokens, accelerator), policy, accelerator.process_index)
    return engine


class Whole:
    """An engine that samples while the policy's weights are at hand, and takes them over where it `copies` them."""

    def __init__(self, engine: Engine, trained: PolicyAndValue, *, copies: bool) -> None:
        self.engine, self.trained, self.copies = engine, trained, copies

    def sample(self, prompt_ids: Sequence[Sequence[int]], *, iteration: int, indices: Sequence[int]) -> list[Sample]:
        """One completion for each prompt; see `Engine`."""
        with self.trained.for_sampling():
            return self.engine.sample(prompt_ids, iteration=iteration, indices=indices)

    def sync(self) -> None:
        """Take over the policy's weights. An engine without weights of its own needs none gathered for that."""
        with self.trained.for_sampling() if self.copies else nullcontext():
            self.engine.sync()


def _engine(cfg: PPOStage, policy: Policy, tokens: ModelTokens, accelerator: Any) -> Engine:
    if cfg.engine.kind == "vllm":
        from stages.ppo.engines.vllm import VLLMEngine

        return VLLMEngine(policy, cfg.engine.vllm or VLLM(), accelerator, tokens.tokenizer)
    if cfg.engine.kind == "continuous":
        from stages.ppo.engines.continuous import ContinuousEngine

        return ContinuousEngine(policy)
    if cfg.engine.kind == "generate":
        from stages.ppo.engines.generate import GenerateEngine

        return GenerateEngine(policy, static_cache=cfg.engine.static_cache)
    from stages.ppo.engines.native import NativeEngine

    return NativeEngine(policy)


def _short(sampling: Sampling) -> Sampling:
    return sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, PROOF_TOKENS)})


def prove_engine(kind: str, engine: Engine, policy: Policy, process: int) -> None:
    """Sample two short prompts of different length and compare the engine's log-probs with a training forward's.

    Raises:
        UserError: it fails on this model, or its log-probs are another model's or of another temperature.
    """
    rows = short_rows(policy.model)
    try:
        samples = engine.sample(rows, iteration=0, indices=range(process * len(rows), (process + 1) * len(rows)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"engine.kind {kind} can't sample from {type(policy.model).__name__} ({type(error).__name__}: {error}); use engine.kind native") from error
    tokens = padded(rows, [s.completion_ids for s in samples], policy.pad_id, next(policy.model.parameters()).device)
    with torch.no_grad(), policy.autocast():
        outputs = token_outputs(policy.model, hidden_states(policy.model.base_model, tokens), tokens, temperature=policy.sampling.temperature)
    theirs = torch.tensor([x for s in samples for x in s.logprobs])
    gap = (outputs.logprobs[tokens.mask].cpu() - theirs).abs().mean().item()
    if not gap <= TOLERANCE:
        raise UserError(
            f"engine.kind {kind}: its log-probs differ from the policy's by {gap:.3g} nats a token on average; expected at most {TOLERANCE}. "
            "It samples from other weights or at another temperature (a vLLM server needs --logprobs-mode processed_logprobs); use engine.kind native"
        )
