"""Builds the models of a PPO run: four of them with full training, one backbone with adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.errors import UserError
from configs.schema import PPOStage
from rewards.build import build_scorers
from rewards.combine import WeightedSum
from rewards.model import RewardModelScorer
from stages import models
from stages.dropout import check_no_dropout
from stages.ppo.forward import prove_head
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
from stages.ppo.rollout import Tokens
from stages.registry import Parent
from stages.scorers import reward_scorer, scorer_of
from stages.tokens import ModelTokens, refuse_other_tokens


@dataclass
class PPOModels:
    """What a run trains, what it measures against, and what it publishes."""

    trained: PolicyAndValue
    reference: Reference
    scorer: WeightedSum
    published: Any  # the policy: a transformers model, or a peft model whose POLICY adapter is saved
    base: models.Origin | None  # what lies under the published adapter
    parents: list[Parent]


def build_models(cfg: PPOStage, origin: models.Origin, tokens: ModelTokens, device: torch.device) -> PPOModels:
    """Load everything that `cfg` names; what can be one copy of the weights is one copy.

    Raises:
        UserError: a checkpoint that is missing, damaged or of the wrong stage; an architecture PPO cannot use.
    """
    policy = models.load_policy(origin, attn_implementation=cfg.attn_implementation)
    models.resize_to(policy, len(tokens.tokenizer))
    prove_head(policy)
    reference_origin = find_reference(cfg, origin)
    refuse_other_tokens(tokens, reference_origin, cfg)
    parents = [origin.parent("init_from"), reference_origin.parent("reference")]
    built = (_one_backbone if cfg.lora else _separate)(cfg, origin, reference_origin, policy, tokens, device, parents)
    _check_reproducible(built.trained, cfg, device)
    return built


def _check_reproducible(trained: PolicyAndValue, cfg: PPOStage, device: torch.device) -> None:
    """Refuse an architecture whose update would not compute what the rollout stored."""
    ids = torch.arange(12, device=device).reshape(2, 6) % trained.policy.config.get_text_config().vocab_size
    real = torch.ones_like(ids, dtype=torch.bool)
    tokens = Tokens(ids[:, :3], real[:, :3], ids[:, 3:], real[:, 3:])

    def forward() -> torch.Tensor:
        with models.autocast(device, cfg.train.precision):
            outputs = trained(tokens)
        return torch.cat([outputs.logprobs, outputs.values], dim=1)

    check_no_dropout(trained, forward)


def _separate(
    cfg: PPOStage, origin: models.Origin, reference_origin: models.Origin, policy: Any, tokens: ModelTokens, device: torch.device, parents: list[Parent]
) -> PPOModels:
    """Full training: policy and value function are trained, reference and reward model are frozen copies."""
    reference = _frozen_reference(cfg, reference_origin, tokens, device)
    scorer = build_scorers(cfg.scorers, _loader(cfg, parents, lambda o: _frozen_scorer(o, cfg, device)))
    trunk, head = (None, _fresh_head(policy, cfg, zero=True)) if cfg.value_function == "head" else _value_copy(cfg, origin, parents, tokens)
    if cfg.train.gradient_checkpointing:
        for model in (policy, trunk):
            if model is not None:
                model.gradient_checkpointing_enable({"use_reentrant": False})
    module = PolicyAndValue(policy, trunk, head, temperature=cfg.sampling.temperature).to(device)
    return PPOModels(module, Reference(reference, temperature=cfg.sampling.temperature), scorer, policy, None, parents)


def _value_copy(cfg: PPOStage, origin: models.Origin, parents: list[Parent], tokens: ModelTokens) -> tuple[Any, nn.Linear]:
    """A value model of its own: the reward model's trunk and head where there is one with the same tokens, else the policy's."""
    asked = cfg.value_init or next((s.checkpoint for s in cfg.scorers if s.kind == "model"), None)
    if asked is not None:
        found = models.find(asked, cfg.registry, stages=("reward",))
        assert found.checkpoint is not None
        if _same_tokens(found, tokens):
            parents.append(found.parent("value_init"))
            scorer = models.load_scorer(found, attn_implementation=cfg.attn_implementation)
            head = _head_from(scorer.score.weight, mean=_centre(cfg, found))
            return scorer.base_model, head
        if cfg.value_init:
            raise UserError(f"value_init {asked} has another tokenizer than {cfg.init_from}; a value function reads the policy's ids")
    copy = models.load_policy(origin, attn_implementation=cfg.attn_implementation)
    models.resize_to(copy, len(tokens.tokenizer))
    return copy.base_model, _fresh_head(copy, cfg, zero=False)


def _same_tokens(found: models.Origin, tokens: ModelTokens) -> bool:
    """Whether a reward model reads the policy's ids."""
    assert found.checkpoint is not None
    theirs = found.checkpoint.info("tokenizer")
    return all(tokens.facts[key] == theirs[key] for key in ("digest", "template_digest"))


def _centre(cfg: PPOStage, found: models.Origin) -> float:
    """What PPO subtracts from this reward model's scores: the value function starts out centred alike."""
    assert found.checkpoint is not None
    return float(found.checkpoint.info("stage_info")["mean"]) if cfg.center_scores else 0.0


def _head_from(weight: torch.Tensor, *, mean: float) -> nn.Linear:
    """A value head that starts as the centred score."""
    head = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.fill_(-mean)
    return head


def _fresh_head(model: Any, cfg: PPOStage, *, zero: bool) -> nn.Linear:
    return models.scalar_head(model.get_input_embeddings().weight.shape[1], seed=cfg.seed, zero=zero)


def _frozen_reference(cfg: PPOStage, origin: models.Origin, tokens: ModelTokens, device: torch.device) -> Any:
    """A copy of the reference that rounds as the policy does: where autocast would cast a linear layer's weight, it is kept cast."""
    reference = models.load_policy(origin, attn_implementation=cfg.attn_implementation)
    models.resize_to(reference, len(tokens.tokenizer))
    store_linear_weights(reference, models.weights_dtype(cfg.train.precision, frozen=True))
    return _freeze(reference.to(device))


def _freeze(model: Any) -> Any:
    return model.requires_grad_(False).eval()


def _loader(cfg: PPOStage, parents: list[Parent], load: Callable[[models.Origin], RewardModelScorer]) -> Callable[[str], RewardModelScorer]:
    """What build_scorers calls for `kind: model`; each checkpoint becomes a parent."""

    def found(asked: str) -> RewardModelScorer:
        origin = models.find(asked, cfg.registry, stages=("reward",))
        parents.append(origin.parent("scorer"))
        return load(origin)

    return found


def _frozen_scorer(origin: models.Origin, cfg: PPOStage, device: torch.device) -> RewardModelScorer:
    dtype = models.weights_dtype(cfg.train.precision, frozen=True)
    scorer = reward_scorer(origin.asked, cfg.registry, device=device, dtype=dtype, batch_size=cfg.train.micro_batch_size)
    _freeze(scorer.model)
    return scorer


class AdapterScorer(RewardModelScorer):
    """A reward adapter on the shared backbone: switched on while it scores."""

    def __init__(self, *args: Any, switch: AdapterSwitch, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.switch = switch

    def score_ids(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scores [B] at the last token of each completion."""
        with self.switch.on(REWARD):
            return super().score_ids(prompt_ids, completion_ids)


def _one_backbone(
    cfg: PPOStage, origin: models.Origin, reference_origin: models.Origin, policy: Any, tokens: ModelTokens, device: torch.device, parents: list[Parent]
) -> PPOModels:
    """Adapters: policy, value function and (where it was trained on the same base) reward model on one copy of the weights."""
    from peft import get_peft_model

    assert cfg.lora is not None
    if cfg.train.gradient_checkpointing:
        raise UserError("train.gradient_checkpointing is not available with adapters on one backbone: a layer recomputed in the backward pass would use the wrong adapter; set it to false")
    models.check_lora_targets(policy, cfg.lora)
    torch.manual_seed(cfg.seed)
    peft_model = get_peft_model(policy, models.lora_config(cfg.lora, "CAUSAL_LM"), adapter_name=POLICY)
    in_place = {o.identity: o for o in _reward_origins(cfg) if _is_on(o, origin, tokens)}
    value_from = next(iter(in_place.values()), None)
    if value_from is not None:
        weight = add_reward_adapter(peft_model, value_from, VALUE)
        head = _head_from(weight, mean=_centre(cfg, value_from))
    else:
        peft_model.add_adapter(VALUE, models.lora_config(cfg.lora, "CAUSAL_LM"))
        head = _fresh_head(policy, cfg, zero=True)
    heads = {}
    for index, (identity, reward_origin) in enumerate(in_place.items()):
        if index:
            raise UserError("two reward adapters on one base; PPO keeps one in place: merge the other one on export, or use one")
        heads[identity] = _head_from(add_reward_adapter(peft_model, reward_origin, REWARD), mean=0.0).to(device)
    peft_model.to(device)
    backbone = peft_model.get_base_model()
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_of(name, POLICY) or is_of(name, VALUE))
    switch = AdapterSwitch(backbone, [POLICY, VALUE])
    trained = PolicyAndValue(backbone, None, head, temperature=cfg.sampling.temperature, switch=switch).to(device)

    def load(found: models.Origin) -> RewardModelScorer:
        if found.identity not in heads:
            return _frozen_scorer(found, cfg, device)
        return scorer_of(found, backbone, batch_size=cfg.train.micro_batch_size, head=heads[found.identity], kind=AdapterScorer, switch=switch)

    scorer = build_scorers(cfg.scorers, _loader(cfg, parents, load))
    if reference_origin.identity == origin.identity:
        reference = Reference(backbone, temperature=cfg.sampling.temperature, switch=switch)
    else:
        other = _frozen_reference(cfg, reference_origin, tokens, device)
        reference = Reference(other, temperature=cfg.sampling.temperature)
    return PPOModels(trained, reference, scorer, peft_model, origin, parents)


def find_reference(cfg: PPOStage, origin: models.Origin) -> models.Origin:
    """The model that KL is measured to."""
    return models.find(cfg.reference, cfg.registry, stages=("sft", "dpo", "ppo")) if cfg.reference else origin


def find_all(cfg: PPOStage, origin: models.Origin) -> list[models.Origin]:
    """Every model that a run starts from, `origin` first."""
    value = [models.find(cfg.value_init, cfg.registry, stages=("reward",))] if cfg.value_init else []
    return [origin, find_reference(cfg, origin), *_reward_origins(cfg), *value]


def _reward_origins(cfg: PPOStage) -> list[models.Origin]:
    return [models.find(s.checkpoint, cfg.registry, stages=("reward",)) for s in cfg.scorers if s.kind == "model"]


def _is_on(reward: models.Origin, origin: models.Origin, tokens: ModelTokens) -> bool:
    """Whether a reward model is an adapter on the very weights the policy starts from."""
    if not models.is_adapter(reward) or not _same_tokens(reward, tokens):
        return False
    base = models.adapter_base(reward)
    return base.identity == origin.identity or Path(base.folder).resolve() == Path(origin.folder).resolve()


def add_reward_adapter(peft_model: Any, reward: models.Origin, name: str) -> torch.Tensor:
    """Put a reward checkpoint's adapter on the backbone under `name`; returns its head's weight [1, d].

    The checkpoint is a sequence classifier and the backbone a language model: the adapter's layers have the same names in
    both, the score head is kept apart.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(reward.folder)
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", False
    peft_model.add_adapter(name, config)
    weights = load_file(Path(reward.folder) / "adapter_model.safetensors")
    head = next(tensor for key, tensor in weights.items() if "score" in key and key.endswith("weight") and "lora" not in key)
    adapter = {key: tensor for key, tensor in weights.items() if "lora" in key}
    result: Any = set_peft_model_state_dict(peft_model, adapter, adapter_name=name)
    assert not result.unexpected_keys, f"the reward adapter has layers the policy lacks: {result.unexpected_keys[:3]}"
    return head
