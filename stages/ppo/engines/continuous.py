"""Transformers' continuous batching: a request that ends makes room for the next one, and there are no pads at all.

`model.generate_batch` starts its worker before it hands over the first request, which leaves the first batch to the race of two
threads (14 calls with one seed agreed all the same). Here the same parts are used in the other order: the queue is full before the
worker starts, and the same seed gives the same samples whatever the threads do.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from configs.errors import UserError
from stages.ppo.engines.protocol import Policy, checked, share_seed
from stages.ppo.sampling import Sample

NO_EOS = -1  # an id that no model has
BATCH_TOKENS = 256  # of one forward pass at least; a longer prompt or more requests raise it


class ContinuousEngine:
    """Up to `sampling.generate_batch_size` requests at once, log-probs from the worker; one seed per process and iteration."""

    def __init__(self, policy: Policy) -> None:
        check_installed(policy.model)
        self.policy = policy

    def sample(self, prompt_ids: Sequence[Sequence[int]], *, iteration: int, indices: Sequence[int]) -> list[Sample]:
        """One completion for each prompt; see `Engine`."""
        p = self.policy
        outputs = _run(p, [list(ids) for ids in prompt_ids], share_seed(p.seed, iteration, indices))
        eos = set(p.eos_ids)
        samples = [
            Sample(list(o.generated_tokens), list(o.logprobs), not p.sampling.stop_at_eos or o.generated_tokens[-1] in eos) for o in outputs
        ]
        return checked("continuous", samples, p)

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's."""


def check_installed(model: Any) -> None:
    """Make sure that transformers has continuous batching as it is used here.

    Raises:
        UserError: it has not.
    """
    import transformers

    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        fields: Any = {}
    else:
        fields = getattr(ContinuousBatchingConfig, "__dataclass_fields__", {})
    missing = [name for name in ("return_logprobs", "seed") if name not in fields]
    if missing or not hasattr(model, "init_continuous_batching"):
        raise UserError(
            f"engine.kind continuous needs continuous batching with log-probs and a seed, which transformers {transformers.__version__} "
            f"does not have for {type(model).__name__}; install transformers 5.17 or newer, or use engine.kind native"
        )


def _run(p: Policy, prompts: list[list[int]], seed: int) -> list[Any]:
    """One finished request per prompt. The worker draws from PyTorch's global generators: they are put back afterwards."""
    config = GenerationConfig(
        max_new_tokens=p.sampling.max_new_tokens, do_sample=True, temperature=p.sampling.temperature, top_k=0, top_p=1.0, num_return_sequences=1,
        eos_token_id=list(p.eos_ids) if p.sampling.stop_at_eos else NO_EOS, pad_token_id=p.pad_id,
    )  # fmt: skip
    device = next(p.model.parameters()).device
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []), _worker_arithmetic(p), _cheap_collections():
        manager = p.model.init_continuous_batching(config, _batching(p, prompts, seed))
        try:
            names = manager.add_requests(prompts, max_new_tokens=p.sampling.max_new_tokens)
            manager.start()
            return _results(manager, names)
        finally:
            manager.stop(block=True, keep_for_next_session=False)
            manager.destroy()


def _batching(p: Policy, prompts: list[list[int]], seed: int) -> Any:
    """Settings with a cache for as many requests as run at once. Left open, it takes most of the free memory, and time to clear it."""
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(return_logprobs=True, seed=seed)
    page = getattr(config, "page_size", None) or config.block_size or 256  # tokens; transformers 5.17 has the older name
    longest, requests = max(map(len, prompts)), min(len(prompts), p.sampling.generate_batch_size)
    config.max_requests_per_batch = requests
    config.num_blocks = requests * -(-(longest + p.sampling.max_new_tokens) // page)
    config.max_batch_tokens = max(BATCH_TOKENS, longest, requests)
    return config


def _results(manager: Any, names: Sequence[str]) -> list[Any]:
    """The finished requests in the order of `names`.

    Raises:
        UserError: the worker died, or a request failed.
    """
    found: dict[str, Any] = {}
    while len(found) < len(names):
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            found[result.request_id] = result
        elif result is None and not manager.is_running():
            break
    failed = next((r.error for r in found.values() if r.error), None)
    if failed or len(found) < len(names):
        reason = failed or "its worker stopped"
        raise UserError(f"engine.kind continuous: {len(names) - len(found)} of {len(names)} requests are missing ({reason}); use engine.kind native")
    return [found[name] for name in names]


@contextmanager
def _cheap_collections() -> Iterator[None]:
    """Within the block garbage collections pass over what was there before; stopping a worker collects everything, twice."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _worker_arithmetic(p: Policy) -> Iterator[None]:
    """Within the block the model computes in the update's arithmetic in every thread.

    Autocast belongs to a thread, and the worker has its own. Under it a layer's keys may be float32 (rotary embeddings) beside
    values in bf16; the paged cache has one type, so both are stored in that.
    """
    from transformers.generation.continuous_batching import PagedAttentionCache

    cache_class: Any = PagedAttentionCache
    forward, update = p.model.forward, cache_class.update

    @functools.wraps(forward)
    def in_arithmetic(*args: Any, **kwargs: Any) -> Any:
        with p.autocast():
            return forward(*args, **kwargs)

    @functools.wraps(update)
    def of_one_type(cache: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(cache, key_states.to(cache.dtype), value_states.to(cache.dtype), *args, **kwargs)

    p.model.forward, cache_class.update = in_arithmetic, of_one_type
    try:
        yield
    finally:
        del p.model.forward
        cache_class.update = update
