"""An iteration of PPO after the first within a simulation: generation, scoring and updates by the stage's own functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from configs.schema import PPOStage
from launch.plan import blueprint
from launch.plan.allocations import Allocations
from launch.plan.job import Job
from launch.plan.simulate import Simulation
from launch.plan.spread import micro_batches
from stages.loss import logprobs as heads
from stages.ppo import maths
from stages.ppo.modules import (
    POLICY,
    REWARD,
    VALUE,
    AdapterSwitch,
    PolicyAndValue,
    Reference,
    is_of,
    store_linear_weights,
)
from stages.ppo.ptx import Mix
from stages.ppo.sampling import Sample, sample
from stages.tuning.adapters import lora_config

NEW = 2  # tokens that the longest simulated generation samples: one after the prompt, one with a cache
ROLLOUT_NUMBERS = 12  # float32 numbers per completion token in a rollout and in what is computed from it


class Watched(PolicyAndValue):
    """The trained module; tells the simulation where the update is."""

    running: Any = None

    def forward(self, tokens: Any, entropy: bool = False) -> Any:
        self._tell("update policy")
        return super().forward(tokens, entropy)

    def logprobs(self, tokens: Any, entropy: bool = False) -> Any:
        self._tell("update policy")
        return super().logprobs(tokens, entropy)

    def values(self, tokens: Any) -> Tensor:
        self._tell("update value")
        return super().values(tokens)

    def imitation(self, tokens: Any, counts: Tensor) -> Tensor:
        self._tell("update: demonstrations")
        return super().imitation(tokens, counts)

    def _tell(self, phase: str) -> None:
        if torch.is_grad_enabled():
            self.running.begin(phase)


class Frozen:
    """A frozen model of its own, on the accelerator always or only while it is used."""

    def __init__(self, job: Job, running: Allocations, model: Any, kind: str) -> None:
        self.job, self.running, self.model, self.kind = job, running, model.requires_grad_(False).eval(), kind
        if job.bf16:
            store_linear_weights(self.model, torch.bfloat16)
        running.label(self.model.parameters(), kind)
        self.size = blueprint.size_of(self.model.parameters())
        if job.offload_frozen and job.gpu:
            running.hold(kind, -self.size)

    @contextmanager
    def used(self) -> Iterator[Any]:
        """Within the block it is on the accelerator."""
        away = self.job.offload_frozen and self.job.gpu
        if away:
            self.running.hold(self.kind, self.size)
        yield self.model
        if away:
            self.running.hold(self.kind, -self.size)


class HeldReference(Reference):
    """A reference of its own."""

    def __init__(self, frozen: Frozen, *, temperature: float) -> None:
        super().__init__(frozen.model, temperature=temperature)
        self.frozen = frozen

    def at_hand(self) -> AbstractContextManager[Any]:
        """The context in which `logprobs` runs."""
        return self.frozen.used()


def simulate(job: Job, cfg: PPOStage, running: Simulation, around: Callable[[Any, Any], AbstractContextManager[Any]]) -> None:
    """Load the models, roll out, and take an optimizer step. `around(module, trained)` is what the launcher makes of them."""
    from stages.guard.verdict import GoneBadError
    from stages.ppo.collect import Clock, PromptSet, collect_rollout, experience_of
    from stages.ppo.update import update_policy

    running.begin("load")
    module, reference, scoring = (_one_backbone if job.lora else _separate)(job, cfg, running)
    module.running = running
    trained = [p for p in module.parameters() if p.requires_grad]
    rows = job.micro_batch  # of the rollout too: micro-batches pass one after the other, and all of them hold the same
    small = cfg.model_copy(update={"train": cfg.train.model_copy(update={"rollout_batch_size": rows, "micro_batch_size": job.micro_batch, "num_ppo_epochs": 1, "num_minibatches": 1, "value_warmup_iterations": 0})})
    prompts = PromptSet([[1] * job.prompt_tokens] * rows, [""] * rows, [{}] * rows)
    tokens: Any = SimpleNamespace(pad_id=0, key="", formatter=SimpleNamespace(completion_text=lambda ids: ""))
    engine: Any = SimpleNamespace(sample=lambda *_, **__: _generate(job, cfg, module, running), sync=lambda: None)
    with around(module, trained) as step, _chunks(job), mock.patch("stages.ppo.collect.maths.gae", _advantages):
        scorer: Any = _Scorer(scoring, running)
        rollout = collect_rollout(module, reference, scorer, prompts, small, _Alone(job), engine=engine, iteration=0, tokens=tokens, clock=Clock())
        experience, _ = experience_of(rollout, small, kl_coef=0.1, mean=0.0, std=1.0)
        running.hold("rollout", kept_of_rollout(job, job.rollout_rows - rows))
        if job.checkpointing:
            module.train()
        stepped: Any = SimpleNamespace(step=step, zero_grad=lambda **_: None, param_groups=[])
        again = torch.arange(rows).repeat(micro_batches(job, running))
        with suppress(GoneBadError):  # what is simulated has no numbers
            update_policy(module, stepped, _Alone(job), experience.select(again), small, 0, mix=_mix(job, len(again)))


def _mix(job: Job, completions: int) -> Mix | None:
    """The demonstrations that are imitated beside a simulated step with so many completions: all of them the longest."""
    if not job.demonstrations:
        return None
    row = {"input_ids": [1] * job.demonstration_tokens, "completion_mask": [n >= job.demonstration_tokens - job.demonstration_counted for n in range(job.demonstration_tokens)]}
    return Mix([row], coef=1.0, ratio=min(job.demonstrations, completions) / completions, pad_id=0)


def kept_of_rollout(job: Job, completions: int) -> int:
    """Bytes that stay of so many completions for the update: numbers of each token, ids and masks."""
    return completions * (4 * ROLLOUT_NUMBERS * job.completion_tokens + 9 * (job.prompt_tokens + job.completion_tokens))


def _separate(job: Job, cfg: PPOStage, running: Allocations) -> tuple[Watched, Reference, list[Any]]:
    """Full training: as stages/ppo/build.py builds it."""
    policy = blueprint.policy(job)
    reference = Frozen(job, running, blueprint.policy(job), "reference")
    scoring = _reward_models(job, running)
    trunk = blueprint.scorer(job).base_model if job.value_function == "copy" else None
    blueprint.checkpoint_layers(job, policy, *([trunk] if trunk is not None else []))
    module = Watched(policy, trunk, _head(policy), temperature=cfg.sampling.temperature)
    running.label(policy.parameters(), "parameters")
    running.label([p for part in (trunk, module.value_head) if part is not None for p in part.parameters()], "value")
    return module, HeldReference(reference, temperature=cfg.sampling.temperature), scoring


def _one_backbone(job: Job, cfg: PPOStage, running: Allocations) -> tuple[Watched, Reference, list[Any]]:
    """Adapters: policy, value function and reward adapter on one copy of the weights."""

    assert job.lora is not None
    peft_model = blueprint.adapted(blueprint.policy(job), job, "CAUSAL_LM", name=POLICY)
    rewards = {f"{REWARD}_{number}" if number else REWARD: lora for number, lora in enumerate(job.reward_adapters + job.heldout_adapters)}
    for name, lora in {VALUE: next(iter(job.reward_adapters), job.lora), **rewards}.items():
        peft_model.add_adapter(name, lora_config(lora, "CAUSAL_LM"))
    backbone = peft_model.get_base_model()
    if job.bf16:
        store_linear_weights(backbone, torch.bfloat16)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_of(name, POLICY) or is_of(name, VALUE))
    if job.quantized:
        running.hold("parameters", -_saved_by_nf4(backbone))
    blueprint.checkpoint_layers(job, backbone)
    switch = AdapterSwitch(backbone, [POLICY, VALUE])
    module = Watched(backbone, None, _head(backbone), temperature=cfg.sampling.temperature, switch=switch)
    running.label(module.parameters(), "parameters")
    scoring = _reward_models(job, running)
    scoring += [(backbone, _head(backbone), partial(switch.on, name)) for name in rewards]
    temperature = cfg.sampling.temperature
    if job.own_reference:
        return module, HeldReference(Frozen(job, running, blueprint.policy(job), "reference"), temperature=temperature), scoring
    return module, Reference(backbone, temperature=temperature, switch=switch), scoring


def _saved_by_nf4(backbone: nn.Module) -> int:
    """Bytes that packing the frozen linear layers but the head saves: NF4 takes about 0.52 bytes a weight (arXiv:2305.14314)."""
    head: Any = backbone.get_output_embeddings()  # type: ignore[operator]
    frozen = [m.weight for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n and m is not head and not m.weight.requires_grad]
    return int(sum(w.numel() * (w.element_size() - 0.52) for w in frozen))


def _head(model: Any) -> nn.Linear:
    return nn.Linear(model.get_input_embeddings().weight.shape[1], 1)


def _reward_models(job: Job, running: Allocations) -> list[Any]:
    """(model, head, context of its use) of each reward model of its own."""
    found = []
    for config in job.reward_models + job.heldout_models:
        frozen = Frozen(job, running, blueprint.scorer(job, config=config), "reward model")
        found.append((frozen.model, None, frozen.used))
    return found


class _Scorer:
    """What stands for the sum of scorers: each reward model reads one micro-batch."""

    def __init__(self, scoring: list[Any], running: Allocations) -> None:
        self.scoring, self.running = scoring, running

    @torch.no_grad()
    def score(self, prompts: list[Any], completions: list[str], *, prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> Any:
        """The same score for every row."""
        from rewards.model import last_token_scores

        self.running.begin("scoring")
        ids = torch.tensor([p + c for p, c in zip(prompt_ids, completion_ids, strict=True)][: len(prompt_ids)])
        for model, head, context in self.scoring:
            with context():
                last_token_scores(model, ids, torch.ones_like(ids), head)
        count = len(prompts)
        return SimpleNamespace(total=[0.0] * count, parts={"score": [0.0] * count})


class _Alone:
    """What PPO asks of Accelerate, for one process."""

    num_processes, process_index = 1, 0
    device = torch.device("cpu")

    def __init__(self, job: Job) -> None:
        self.job = job

    def autocast(self) -> Any:
        """The arithmetic of the stage."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.job.bf16 and not self.job.pure_bf16)

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        """Of one process."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Of one process."""
        return tensor


def _generate(job: Job, cfg: PPOStage, module: PolicyAndValue, running: Allocations) -> list[Sample]:
    """Sample after the longest prompts, then with the longest cache; returns the completions that the update is simulated with."""
    settings = cfg.sampling.model_copy(update={"max_new_tokens": NEW, "stop_at_eos": False})
    batch = job.generate_batch
    total = job.prompt_tokens + job.completion_tokens
    for length, phases in ((job.prompt_tokens, ("rollout: prompts",)), (total - NEW, ("-", "rollout: tokens"))):
        calls = iter(phases)

        def before(*_: Any, calls: Iterator[str] = calls) -> None:
            running.begin(next(calls, "rollout: tokens"))

        hook = module.policy.register_forward_pre_hook(before)
        with torch.no_grad(), _Alone(job).autocast(), _caches(running):
            new = settings.model_copy(update={"max_new_tokens": len(phases)})
            sample(module.policy, [[1] * length] * batch, sampling=new, eos_ids=[2], pad_id=0, seeds=list(range(batch)))
        hook.remove()
    running.peaks.pop("-", None)
    running.begin("scoring")
    return [Sample([1] * job.completion_tokens, [0.0] * job.completion_tokens, True)] * job.micro_batch


@contextmanager
def _caches(running: Allocations) -> Iterator[None]:
    """Within the block the keys and values that layers keep count as such."""
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def labelled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = update(self, *args, **kwargs)
        running.label([self.keys, self.values], "kv cache")
        return out

    with mock.patch.object(DynamicLayer, "update", labelled):
        yield


def _advantages(rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, **_: Any) -> maths.Returns:
    """What `maths.gae` returns, without its loop over the tokens: thousands of operations on a few numbers each."""
    return maths.Returns(torch.zeros_like(rewards), torch.zeros_like(values))


@contextmanager
def _chunks(job: Job) -> Iterator[None]:
    """Chunks of logits as long as on the device that is planned for."""
    with mock.patch.object(heads, "CHUNK_ELEMENTS", heads.CHUNK_ELEMENTS_GPU) if job.gpu else nullcontext():
        yield
