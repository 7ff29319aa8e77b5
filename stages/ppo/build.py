"""Builds the models of a PPO run: four of them with full training, one backbone with adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from configs.errors import UserError
from configs.schema import PPOStage
from configs.schema.scorers import reward_models
from rewards.build import build_scorers
from rewards.combine import WeightedSum
from rewards.model import RewardModelScorer
from stages import foreign, models, soft
from stages.dropout import check_no_dropout
from stages.onednn import use_onednn, widened
from stages.ppo.lora import use_sums
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
from stages.ppo.offload import OffloadedReference, OffloadedScorer
from stages.ppo.rollout import Tokens
from stages.ppo.support import prove
from stages.ppo.zero.engines import Zero, split
from stages.ppo.zero.frozen import split_reference, split_trunk
from stages.registry import Parent
from stages.scorers import scorer_of
from stages.tokens import ModelTokens, refuse_other_tokens
from stages.tuning import quantized
from stages.tuning.adapters import check_lora_targets, lora_config


@dataclass
class PPOModels:
    """What a run trains, what it measures against, and what it publishes."""

    trained: PolicyAndValue
    reference: Reference
    scorer: WeightedSum
    published: Any  # the policy: a transformers model, or a peft model whose POLICY adapter is saved
    base: models.Origin | None  # what lies under the published adapter
    parents: list[Parent]
    heldout_scorer: WeightedSum | None = None  # scores evaluations, never a rollout
    origin: models.Origin | None = None  # what the policy started from


@dataclass(frozen=True)
class Place:
    """Where models live: on a device, whole or (ZeRO-3) split over the processes."""

    device: torch.device
    zero: Zero | None

    @property
    def splits(self) -> bool:
        """Whether no process holds a whole model."""
        return self.zero is not None and self.zero.splits_weights

    def computes_plainly(self, cfg: PPOStage) -> bool:
        """Whether layers compute in float32 and nobody but us has a hand in them."""
        return self.zero is None and _compute_dtype(cfg) is None

    def put(self, model: Any, split_model: Callable[[Any, Zero], Any] = split) -> Any:
        """A loaded model, put there."""
        return split_model(model, self.zero) if self.zero is not None and self.splits else model.to(self.device)


def build_models(cfg: PPOStage, origin: models.Origin, tokens: ModelTokens, device: torch.device, zero: Zero | None = None) -> PPOModels:
    """Load everything that `cfg` names; what can be one copy of the weights is one copy.

    At ZeRO-3 each model is split over the processes before the next one is loaded. The trained module can't be called until it is engaged
    (stages/ppo/zero/trained.py), nor can what shares its backbone.

    Raises:
        UserError: a checkpoint that is missing, damaged or of the wrong stage; an architecture PPO cannot use.
    """
    policy = models.load_policy(origin, attn_implementation=cfg.attn_implementation)
    models.resize_to(policy, len(tokens.tokenizer))
    prove(policy)
    place = Place(device, zero)
    reference_origin = find_reference(cfg, origin)
    refuse_other_tokens(tokens, reference_origin, cfg)
    parents = [origin.parent("init_from"), reference_origin.parent("reference")]
    built = (_one_backbone if cfg.lora else _separate)(cfg, origin, reference_origin, policy, tokens, place, parents)
    built.origin = origin
    if place.computes_plainly(cfg):
        use_onednn(built.trained, built.reference.model)
    if not place.splits:
        check_reproducible(built.trained, cfg, device)
    return built


def _heldout_scorer(cfg: PPOStage, parents: list[Parent], load: Callable[[models.Origin], RewardModelScorer]) -> WeightedSum | None:
    """The scorers that only evaluations use, their reward models as `load` gives them."""
    heldout = _heldout(cfg)
    return build_scorers(heldout, _loader(cfg, parents, load, role="heldout_scorer")) if heldout else None


def _heldout(cfg: PPOStage) -> list[Any]:
    return (cfg.evaluation.scorers if cfg.evaluation is not None else None) or []


def check_reproducible(trained: PolicyAndValue, cfg: PPOStage, device: torch.device) -> None:
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
    cfg: PPOStage, origin: models.Origin, reference_origin: models.Origin, policy: Any, tokens: ModelTokens, place: Place, parents: list[Parent]
) -> PPOModels:
    """Full training: policy and value function are trained, reference and reward model are frozen copies."""
    width = policy.get_input_embeddings().weight.shape[1]
    split(policy, place.zero)
    reference = _frozen_reference(cfg, reference_origin, tokens, place)
    load = partial(_frozen_scorer, cfg=cfg, place=place)
    scorer = build_scorers(cfg.scorers, _loader(cfg, parents, load))
    trunk, head = (None, _fresh_head(width, cfg, zero=True)) if cfg.value_function == "head" else _value_copy(cfg, origin, parents, tokens)
    _checkpoint_layers(cfg, policy, trunk)
    module = place.put(PolicyAndValue(policy, trunk, head, temperature=cfg.sampling.temperature))
    return PPOModels(module, reference, scorer, policy, None, parents, _heldout_scorer(cfg, parents, load))


def _checkpoint_layers(cfg: PPOStage, *trunks: Any) -> None:
    """Recompute the layers' activations in the backward pass, where asked: with the adapter that is on then, which is the forward's."""
    if cfg.train.gradient_checkpointing:
        for trunk in trunks:
            if trunk is not None:
                trunk.gradient_checkpointing_enable({"use_reentrant": False})


def _value_copy(cfg: PPOStage, origin: models.Origin, parents: list[Parent], tokens: ModelTokens) -> tuple[Any, nn.Linear]:
    """A value model of its own: the reward model's trunk and head where there is one with the same tokens, else the policy's."""
    asked = cfg.value_init or next(iter(reward_models(cfg.scorers)), None)
    if asked is not None:
        found = _reward_origin(cfg, asked)
        assert found.checkpoint is not None
        if _same_tokens(found, tokens):
            parents.append(found.parent("value_init"))
            scorer = models.load_scorer(found, attn_implementation=cfg.attn_implementation)
            return scorer.base_model, _value_head(cfg, found, scorer.score)
        if cfg.value_init:
            raise UserError(f"value_init {asked} has another tokenizer than {cfg.init_from}; a value function reads the policy's ids")
    copy = models.load_policy(origin, attn_implementation=cfg.attn_implementation)
    models.resize_to(copy, len(tokens.tokenizer))
    return copy.base_model, _fresh_head(copy.get_input_embeddings().weight.shape[1], cfg, zero=False)


def _same_tokens(found: models.Origin, tokens: ModelTokens) -> bool:
    """Whether a reward model reads the policy's ids."""
    assert found.checkpoint is not None
    theirs = found.checkpoint.info("tokenizer")
    return all(tokens.facts[key] == theirs[key] for key in ("digest", "template_digest"))


def _value_head(cfg: PPOStage, found: models.Origin, score: nn.Linear) -> nn.Linear:
    """A value head that starts as what PPO makes of this reward model's score: centred, weighted and scaled as the scores are."""
    assert found.checkpoint is not None
    info = found.checkpoint.info("stage_info")
    mean = float(info["mean"]) if cfg.center_scores else 0.0
    weights = [s.weight for s in cfg.scorers for name in reward_models([s]) if _reward_origin(cfg, name).identity == found.identity]
    weight = sum(weights) if weights else 1.0  # a value_init that scores nothing
    factor = weight / (abs(weight) * (info["std"] or 1.0)) if cfg.scale_scores else weight
    head = nn.Linear(score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(factor * score.weight)
        head.bias.copy_(factor * ((score.bias if score.bias is not None else 0.0) - torch.tensor([mean])))
    return head


def _fresh_head(width: int, cfg: PPOStage, *, zero: bool) -> nn.Linear:
    return models.scalar_head(width, seed=cfg.seed, zero=zero)


def _frozen_reference(cfg: PPOStage, origin: models.Origin, tokens: ModelTokens, place: Place) -> Reference:
    """A copy of the reference that rounds as the policy does: where autocast would cast a linear layer's weight, it is kept cast."""
    reference = models.load_policy(origin, attn_implementation=cfg.attn_implementation)
    models.resize_to(reference, len(tokens.tokenizer))
    store_linear_weights(reference, models.weights_dtype(cfg.train.precision, frozen=True))
    temperature = cfg.sampling.temperature
    if cfg.offload_frozen:
        return OffloadedReference(_freeze(reference), temperature=temperature, device=place.device)
    if place.zero is not None and place.splits:
        arithmetic = partial(models.autocast, place.device, cfg.train.precision)
        return split_reference(_freeze(reference), place.zero, temperature=temperature, arithmetic=arithmetic)
    return Reference(_freeze(place.put(reference)), temperature=temperature)


def _freeze(model: Any) -> Any:
    return model.requires_grad_(False).eval()


def _loader(
    cfg: PPOStage, parents: list[Parent], load: Callable[[models.Origin], RewardModelScorer], role: str = "scorer"
) -> Callable[[str], RewardModelScorer]:
    """What build_scorers calls for every reward model; each checkpoint becomes a parent."""

    def found(asked: str) -> RewardModelScorer:
        origin = _reward_origin(cfg, asked)
        parents.append(origin.parent(role))
        return load(origin)

    return found


def _frozen_scorer(origin: models.Origin, cfg: PPOStage, place: Place) -> RewardModelScorer:
    """A reward model of its own. One with an adapter merged in computes in float32: bf16 would round away what the adapter learned."""
    dtype = _compute_dtype(cfg) if not models.is_adapter(origin) else None
    model = models.load_scorer(origin, attn_implementation=cfg.attn_implementation)
    if dtype is not None:
        store_linear_weights(model, dtype)
    if place.computes_plainly(cfg) and dtype is None:
        use_onednn(model)
    if cfg.offload_frozen:
        return scorer_of(
            origin, _freeze(model), batch_size=cfg.train.micro_batch_size, autocast=dtype, kind=OffloadedScorer, device=place.device,
            widen=partial(widened, model=model),
        )  # fmt: skip
    placed = place.put(_freeze(model), split_trunk)
    return scorer_of(origin, placed, batch_size=cfg.train.micro_batch_size, autocast=dtype, widen=partial(widened, model=placed))


def _compute_dtype(cfg: PPOStage) -> torch.dtype | None:
    """What matrix products are computed in, where that is not float32."""
    return torch.bfloat16 if models.uses_bf16(cfg.train.precision) else None


class AdapterScorer(RewardModelScorer):
    """A reward adapter on the shared backbone: switched on while it scores."""

    def __init__(self, *args: Any, switch: AdapterSwitch, adapter: str = REWARD, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.switch, self.adapter = switch, adapter

    def score_ids(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], finished: Sequence[bool] | None = None
    ) -> torch.Tensor:
        """Scores [B] at the last token of each completion."""
        with self.switch.on(self.adapter):
            return super().score_ids(prompt_ids, completion_ids, finished)


def _one_backbone(
    cfg: PPOStage, origin: models.Origin, reference_origin: models.Origin, policy: Any, tokens: ModelTokens, place: Place, parents: list[Parent]
) -> PPOModels:
    """Adapters: policy, value function and (where they were trained on the same base) reward models, held-out ones too, on one copy of the weights."""
    from peft import get_peft_model

    assert cfg.lora is not None
    check_lora_targets(policy, cfg.lora, head=False)
    if cfg.quantization is not None:
        quantized.quantize(policy, place.device, _compute_dtype(cfg) or torch.float32)
    torch.manual_seed(cfg.seed)
    peft_model = get_peft_model(policy, lora_config(cfg.lora, "CAUSAL_LM"), adapter_name=POLICY)
    rewards, heldout_rewards = ([o for o in _reward_origins(cfg, scorers) if _is_on(o, origin, tokens)] for scorers in (cfg.scorers, _heldout(cfg)))
    value_head, adapters = _add_adapters(peft_model, cfg, rewards, heldout_rewards)
    backbone = peft_model.get_base_model()
    store_linear_weights(backbone, models.weights_dtype(cfg.train.precision, frozen=True))
    if not place.splits:
        peft_model.to(place.device)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_of(name, POLICY) or is_of(name, VALUE))
    _checkpoint_layers(cfg, backbone)
    if place.zero is None:  # a sum reads the base's weight past the hooks by which ZeRO-3 gathers it, where one process has tokens enough and another has not
        use_sums(backbone)
    switch = AdapterSwitch(backbone, [POLICY, VALUE])
    trained = place.put(PolicyAndValue(backbone, None, value_head, temperature=cfg.sampling.temperature, switch=switch))

    def load(found: models.Origin) -> RewardModelScorer:
        if found.identity not in adapters:
            return _frozen_scorer(found, cfg, place)
        name, head = adapters[found.identity]
        return scorer_of(
            found, backbone, batch_size=cfg.train.micro_batch_size, head=head.to(place.device), kind=AdapterScorer, switch=switch, adapter=name,
            autocast=_compute_dtype(cfg), widen=partial(widened, model=backbone),
        )  # fmt: skip

    scorer, heldout = build_scorers(cfg.scorers, _loader(cfg, parents, load)), _heldout_scorer(cfg, parents, load)
    if reference_origin.identity == origin.identity:
        reference = Reference(backbone, temperature=cfg.sampling.temperature, switch=switch)
    else:
        reference = _frozen_reference(cfg, reference_origin, tokens, place)
    return PPOModels(trained, reference, scorer, peft_model, origin, parents, heldout)


class RewardAdapter(NamedTuple):
    """A reward adapter on the shared backbone: its name there, and its score head [d] -> 1."""

    name: str
    head: nn.Linear


def _add_adapters(
    peft_model: Any, cfg: PPOStage, rewards: list[models.Origin], heldout: list[models.Origin]
) -> tuple[nn.Linear, dict[str, RewardAdapter]]:  # fmt: skip
    """Put the value adapter and those of `rewards` and `heldout` on the backbone: the value head, and the reward adapters by their model's identity.

    The value adapter starts as the first of `rewards`; what evaluations hold out takes no part in training.
    """
    assert cfg.lora is not None
    if rewards:
        value_head = _value_head(cfg, rewards[0], add_reward_adapter(peft_model, rewards[0], VALUE))
    else:
        peft_model.add_adapter(VALUE, lora_config(cfg.lora, "CAUSAL_LM"))
        value_head = _fresh_head(peft_model.get_base_model().get_input_embeddings().weight.shape[1], cfg, zero=True)
    in_place = {o.identity: o for o in [*rewards, *heldout]}
    names = [f"{REWARD}_{number}" if number > 1 else REWARD for number in range(1, len(in_place) + 1)]
    placed = zip(names, in_place.items(), strict=True)
    return value_head, {identity: RewardAdapter(name, add_reward_adapter(peft_model, origin, name)) for name, (identity, origin) in placed}


def find_reference(cfg: PPOStage, origin: models.Origin) -> models.Origin:
    """The model that KL is measured to."""
    return models.find(cfg.reference, cfg.registry, stages=("sft", "dpo", "ppo")) if cfg.reference else origin


def find_all(cfg: PPOStage, origin: models.Origin) -> list[models.Origin]:
    """Every model that a run starts from, `origin` first."""
    value = [_reward_origin(cfg, cfg.value_init)] if cfg.value_init else []
    return [origin, find_reference(cfg, origin), *_reward_origins(cfg, cfg.scorers), *value, *_reward_origins(cfg, _heldout(cfg))]


def _reward_origins(cfg: PPOStage, scorers: Sequence[Any]) -> list[models.Origin]:
    return [_reward_origin(cfg, name) for name in reward_models(scorers)]


def _reward_origin(cfg: PPOStage, asked: str) -> models.Origin:
    return models.find(asked, cfg.registry, stages=("reward",))


def _is_on(reward: models.Origin, origin: models.Origin, tokens: ModelTokens) -> bool:
    """Whether a reward model is a LoRA adapter on the very weights the policy starts from, under the same soft prompt if under one."""
    if not _same_tokens(reward, tokens) or not soft.same_prompt(reward, origin):
        return False
    reward, origin = soft.beneath(reward), soft.beneath(origin)
    if not models.is_adapter(reward) or models.adapter_kind(reward) != "LORA":
        return False
    base = models.adapter_base(reward)
    return base.identity == origin.identity or Path(base.folder).resolve() == Path(origin.folder).resolve()


def add_reward_adapter(peft_model: Any, reward: models.Origin, name: str) -> nn.Linear:
    """Put a reward checkpoint's adapter on the backbone under `name`; returns its score head [d] -> 1.

    The checkpoint is a sequence classifier and the backbone a language model: the adapter's layers have the same names in
    both, the score head is kept apart. Dropout of its training stays behind.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    reward = soft.beneath(reward)
    foreign.check_folder(Path(reward.folder))
    config = LoraConfig.from_pretrained(reward.folder)
    config.modules_to_save, config.task_type, config.inference_mode, config.lora_dropout = None, "CAUSAL_LM", False, 0.0
    peft_model.add_adapter(name, config)
    weights = load_file(Path(reward.folder) / "adapter_model.safetensors")
    adapter = {key: tensor for key, tensor in weights.items() if "lora" in key}
    result: Any = set_peft_model_state_dict(peft_model, adapter, adapter_name=name)
    assert not result.unexpected_keys, f"the reward adapter has layers the policy lacks: {result.unexpected_keys[:3]}"
    parts = {key.rpartition(".")[2]: tensor for key, tensor in weights.items() if re.search(r"(^|\.)score\.(weight|bias)$", key)}
    head = nn.Linear(parts["weight"].shape[1], 1, bias="bias" in parts)
    head.load_state_dict(parts)
    return head.requires_grad_(False)
