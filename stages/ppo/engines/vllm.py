"""vLLM, through TRL's VLLMGeneration: it starts or finds vLLM and carries the weights over; how is sampled is said here.

Every completion has a seed of its own. With one seed for a whole call, as VLLMGeneration.generate passes on, vLLM seeds every request
alike: two completions of one prompt would be the same.

Only ever run against a stand-in for vLLM, which checks what it is given (tests/unit/test_ppo_engine_vllm.py): no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.schema import VLLM
from stages.ppo.engines.protocol import Policy, checked, completion_stream
from stages.ppo.modules import POLICY
from stages.ppo.sampling import Sample


class PlainWeights(nn.Module):
    """The policy's weights as vLLM names them: adapters merged in copies, one tensor at a time.

    peft's own merge writes into the base weights and takes the adapter out again afterwards, which rounds: the reference and the
    reward model on the same backbone would change with every iteration.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.of = (model,)  # in a tuple, lest its layers become this module's
        self.name_or_path = model.name_or_path

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        """Names without peft's additions, and the weights that the policy computes with."""
        (model,) = self.of
        adapted = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                continue
            layer = adapted.get(name.removesuffix(".base_layer.weight"))
            weight = parameter.detach()
            if layer is not None and name.endswith(".base_layer.weight") and POLICY in layer.lora_A:
                delta = layer.get_delta_weight(POLICY).detach()
                weight = (weight.to(delta.dtype) + delta).to(weight.dtype)
            yield name.replace(".base_layer.", "."), weight


class VLLMEngine:
    """Samples with vLLM in this process (colocate) or behind a URL (server); `sync` carries the weights over."""

    def __init__(self, policy: Policy, cfg: VLLM, accelerator: Any, tokenizer: Any) -> None:
        _check_weights(policy.model)
        # Not from trl.generation: that has the class only where vLLM is installed, and says nothing otherwise.
        from trl.generation.vllm_generation import VLLMGeneration

        self.policy, self.cfg, self.accelerator = policy, cfg, accelerator
        self.asleep = False
        model: Any = PlainWeights(policy.model)
        self.generation = VLLMGeneration(
            model, accelerator, tokenizer, mode=cfg.mode, server_base_url=cfg.url, gpu_memory_utilization=cfg.gpu_memory,
            enable_sleep_mode=cfg.sleep and cfg.mode == "colocate", max_num_seqs=policy.sampling.generate_batch_size,
            temperature=policy.sampling.temperature, max_completion_length=policy.sampling.max_new_tokens,
        )  # fmt: skip

    def sync(self) -> None:
        """Carry the policy's weights over."""
        self.generation.sync_weights()
        self.asleep = False

    def sample(self, prompt_ids: Sequence[Sequence[int]], *, iteration: int, indices: Sequence[int]) -> list[Sample]:
        """One completion for each prompt; see `Engine`."""
        p = self.policy
        prompts, seeds = [list(ids) for ids in prompt_ids], [completion_stream(p.seed, iteration, i) for i in indices]
        found = self._colocated(prompts, seeds) if self.cfg.mode == "colocate" else self._served(prompts, seeds)
        eos = set(p.eos_ids)
        samples = [Sample(ids, logprobs, not p.sampling.stop_at_eos or (bool(ids) and ids[-1] in eos)) for ids, logprobs in found]
        return checked("vllm", samples, p)

    def _settings(self, seed: int) -> dict[str, Any]:
        """Everything that shapes the distribution or ends a completion, said outright: vLLM would fill the rest from the model's folder."""
        sampling = self.policy.sampling
        return {
            "n": 1, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": sampling.max_new_tokens, "min_tokens": 0, "logprobs": 0, "seed": seed,
            # The model's own EOS is ignored and ours are stop tokens: otherwise vLLM knows one that the config may not mean.
            "ignore_eos": True, "stop_token_ids": sorted(self.policy.eos_ids) if sampling.stop_at_eos else [],
        }  # fmt: skip

    def _colocated(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], list[float]]]:
        from vllm import SamplingParams

        if self.asleep:  # its weights were given up with its memory
            self.sync()
        if self.cfg.sleep:
            self.generation.llm.wake_up(tags=["kv_cache"])
        outputs = self.generation.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling_params=[SamplingParams(**self._settings(seed), detokenize=False) for seed in seeds],
            use_tqdm=False,
        )  # fmt: skip
        if self.cfg.sleep:
            self.generation.llm.sleep(level=2)
            self.asleep = True
        rows = [request.outputs[0] for request in outputs]
        return [(list(row.token_ids), [chances[token].logprob for token, chances in zip(row.token_ids, row.logprobs, strict=True)]) for row in rows]

    def _served(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[list[int], list[float]]]:
        """The main process asks for all processes, one request per completion; the answers are shared out."""
        from accelerate.utils import broadcast_object_list, gather_object

        every: Any = gather_object(list(zip(prompts, seeds, strict=True)))
        answers: list[Any] = [None]  # broadcast_object_list fills it on the other processes
        if self.accelerator.is_main_process:
            with ThreadPoolExecutor(min(self.cfg.requests, len(every))) as pool:
                answers = [list(pool.map(self._ask, every))]
        broadcast_object_list(answers, from_process=0)
        first = self.accelerator.process_index * len(prompts)
        return answers[0][first : first + len(prompts)]

    def _ask(self, request: tuple[list[int], int]) -> tuple[list[int], list[float]]:
        settings = self._settings(request[1])
        named = {key: settings.pop(key) for key in ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "logprobs")}
        answer: Any = self.generation.vllm_client.generate([request[0]], **named, generation_kwargs=settings)
        return list(answer["completion_ids"][0]), [chances[0] for chances in answer["logprobs"][0]]


def _check_weights(model: Any) -> None:
    """Refuse weights that can't be carried over.

    Raises:
        UserError: quantised weights; a vocabulary that the model's folder does not have.
    """
    from transformers import AutoConfig

    packed = next((name for name, p in model.named_parameters() if not torch.is_floating_point(p)), None)
    if packed is not None:
        raise UserError(f"engine.kind vllm can't take over quantised weights ({packed}); use engine.kind native or a base that is not quantised")
    theirs, ours = AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=False).get_text_config().vocab_size, model.get_input_embeddings().weight.shape[0]
    if theirs != ours:
        raise UserError(
            f"engine.kind vllm starts from {model.name_or_path}, which has {theirs} tokens, and the policy has {ours} (its tokenizer was extended); "
            "publish the resized model with the SFT stage first, or use engine.kind native"
        )
