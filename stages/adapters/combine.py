"""Adapters of one base composed into a new one, by peft's `add_weighted_adapter`, and published with what they were.

What the methods give, for updates ΔW = scaling · B·A and weights w:
  cat               Σ w·ΔW exactly; the rank is the sum of the ranks
  svd               the best approximation of Σ w·ΔW at a rank (by default the largest of the parents')
  linear            (Σ √w·B)(Σ √w·A): holds products of one adapter's B with another's A, so it is not Σ w·ΔW
  ties              small entries left out, the sign that prevails elected, what agrees with it averaged (Yadav et al. 2023, arXiv:2306.01708)
  dare_linear       entries left out at random, the rest rescaled, then as linear (Yu et al. 2023, arXiv:2311.03099); dare_ties: then as ties
  magnitude_prune   small entries left out, then as linear
These last four work on A and B apart; with _svd after the name they work on ΔW itself, and the result is approximated at a rank.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from configs.errors import UserError
from stages import foreign, models
from stages.adapters.facts import AdapterFacts, adapter_facts, digest_of
from stages.registry import Checkpoint, Parent, Registry, contract
from stages.registry.names import split_family
from stages.tokens import load_tokens

POLICIES = ("sft", "dpo", "ppo")
METHODS = (
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
APART = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # add A to A and B to B: all ranks must be one
NEW = "default"  # peft writes the adapter of this name to the folder itself, any other to a folder below


@dataclass(frozen=True)
class Method:
    """How adapters are composed. density: share of the entries that ties, dare and magnitude_prune keep. rank: of the result of an _svd method; None: the
    parents' largest. sign: which sign ties elects, that of the sum (total) or of the majority (frequency). seed: of the entries that dare drops."""

    how: str = "cat"
    weights: tuple[float, ...] = ()
    density: float | None = None
    rank: int | None = None
    sign: str = "total"
    seed: int = 0

    @property
    def random(self) -> bool:
        """Whether the seed matters."""
        return self.how.startswith("dare")

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        own = {"density": self.density, "rank": self.rank, "sign": self.sign if "ties" in self.how else None, "seed": self.seed if self.random else None}
        return {"how": self.how, "weights": list(self.weights)} | {key: value for key, value in own.items() if value is not None}


def combine(registry: Registry, refs: Sequence[str], family: str, method: Method, say: Callable[[str], None] = lambda line: None) -> Checkpoint:
    """Publish adapters of `registry`, composed, as STAGE/NAME (`family`), an adapter of the same base.

    Raises UserError: a reference that is no adapter of a policy, adapters of different bases, tokenizers, templates or kinds, a method that does not fit
    their ranks or that this peft does not have, a weight, density or rank that can't be.
    """
    stage, name = split_family(family)
    if stage not in POLICIES:
        raise UserError(f"--as {family}: adapters of policies make a policy; name it {' or '.join(f'{known}/{name}' for known in POLICIES)}")
    origins = [models.find(ref, registry.root, stages=POLICIES) for ref in refs]
    facts = [_adapter(origin) for origin in origins]
    base = _one_base(origins)
    method = _checked(method, refs, facts)
    held = [origin.lease("align adapters combine reads it") for origin in origins]
    try:
        models.verify(*origins)
        peft_model, deviation = composed(base, origins, facts, method)
        say(told(method, deviation))
        tokens = load_tokens(origins[0])
        record = method.facts() | {"of": [_checkpoint(origin).ref for origin in origins], "deviation": deviation, "result_rank": peft_model.peft_config[NEW].to_dict().get("r")}
        stage_info = {"adapter": models.adapter_facts(base) | {"vocabulary": models.adapter_vocabulary(origins[0])}, "combined": record}

        def write(folder: Path) -> None:
            models.save_model(peft_model, tokens.tokenizer, folder, eos_ids=tokens.eos_ids, base=base, selected_adapters=[NEW])

        parents = [*(Parent.of(_checkpoint(origin), "adapter") for origin in origins), base.parent("base")]
        return registry.publish(stage, name, write, parents=parents, info={"tokenizer": tokens.facts, "stage_info": stage_info, "seed": method.seed})
    finally:
        for lease in filter(None, held):
            lease.give_back()


def told(method: Method, deviation: float | None) -> str:
    """One line about how far the result is from the weighted sum of the updates."""
    if deviation is None:
        return f"combined by {method.how}"
    exact = "the weighted sum of the updates, exactly but for rounding" if deviation < 1e-5 else f"{deviation:.1%} away from the weighted sum of the updates (Frobenius norm, all layers)"
    return f"combined by {method.how}: {exact}"


def _checkpoint(origin: models.Origin) -> Checkpoint:
    assert origin.checkpoint is not None, "only checkpoints of the registry are combined"
    return origin.checkpoint


def _adapter(origin: models.Origin) -> AdapterFacts:
    """What an adapter is. Raises UserError for what is none, and for what `add_weighted_adapter` would combine wrongly or not at all."""
    if origin.checkpoint is None:
        raise UserError(f"{origin.asked} is not in the registry; import it first: align registry import {origin.asked} --as sft/NAME")
    ref = origin.checkpoint.ref
    if not models.is_adapter(origin):
        raise UserError(f"{ref} holds whole weights, no adapter; adapters are what is combined here (train with `lora:`)")
    foreign.check_folder(Path(origin.folder))
    facts = adapter_facts(Path(origin.folder))
    alone = "it can be used alone or merged into its base (align registry export --merge), not combined"
    if facts.kind not in ("LORA", "IA3"):
        raise UserError(f"{ref} is an adapter of kind {facts.technique}; peft combines LoRA and IA3 only: it can be used alone")
    if facts.config.get("use_dora"):
        raise UserError(f"{ref} is a DoRA adapter: its magnitudes are no update that can be added to another's (peft would drop them without a word); {alone}")
    for key in ("modules_to_save", "target_parameters", "lora_bias", "trainable_token_indices"):
        if facts.config.get(key):
            raise UserError(f"{ref} has {key}, which peft does not combine: {alone}")
    if facts.config.get("bias", "none") != "none":
        raise UserError(f"{ref} has trained biases (bias: {facts.config['bias']}), which peft does not combine: {alone}")
    return facts


def _one_base(origins: Sequence[models.Origin]) -> models.Origin:
    """The base of all. Raises UserError where they have different ones, or read other token ids or prompts."""
    first = _checkpoint(origins[0])
    base = models.adapter_base(origins[0])
    recorded = [_checkpoint(origin).info("stage_info")["adapter"] for origin in origins]
    for origin, record in zip(origins[1:], recorded[1:], strict=True):
        other = _checkpoint(origin)
        mine, its = ("/".join(filter(None, (one.get("base_id") or one.get("base_digest") or one.get("base"), one.get("inside")))) for one in (recorded[0], record))
        if mine != its:
            raise UserError(
                f"{first.ref} is an adapter on {recorded[0]['base']} ({mine[:20]}) and {other.ref} on {record['base']} ({its[:20]}); only adapters of one "
                "base can be combined. Which there are: align adapters list"
            )
        contract.check_same_tokenizer(first, other)
        contract.check_template(first, other)
        if recorded[0].get("vocabulary") != record.get("vocabulary"):
            raise UserError(f"{first.ref} was trained with {recorded[0].get('vocabulary')} rows of embeddings and {other.ref} with {record.get('vocabulary')}; train one of them again")
    others = {digest_of(Path(origin.folder), adapter_facts(Path(origin.folder)).others) for origin in origins}
    if len(others) > 1:
        raise UserError(f"{', '.join(origin.asked for origin in origins)}: their files hold embeddings of the base that differ, so they do not lie on one base; train one of them again")
    return base


def _checked(method: Method, refs: Sequence[str], facts: Sequence[AdapterFacts]) -> Method:
    """The method with its weights. Raises UserError for what can't be."""
    _check_how(method, refs, facts)
    weights = method.weights or tuple(1 / len(refs) for _ in refs)
    if len(weights) != len(refs) or not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"--weights: found {len(weights)} for {len(refs)} adapters ({', '.join(map(str, weights))}); expected one number for each, such as 0.7 0.3")
    prunes = any(part in method.how for part in ("ties", "dare", "magnitude"))
    if prunes and not (method.density is not None and 0 < method.density <= 1):
        raise UserError(f"--density: {method.how} needs the share of entries that it keeps, above 0 and up to 1, such as 0.5; found {method.density}")
    if not prunes and method.density is not None:
        raise UserError(f"--density goes with ties, dare and magnitude_prune; {method.how} keeps every entry: leave it out")
    if method.rank is not None and (method.rank < 1 or not method.how.endswith("svd")):
        raise UserError(f"--rank {method.rank}: the rank of the result is chosen for svd and the _svd methods only, from 1; with {method.how} it follows from the parents'")
    if facts[0].kind == "IA3" and not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise UserError(f"--weights: they add up to {sum(weights):g}; IA3 multiplies activations, by 1 where it has learned nothing, so the weights must add up to 1")
    return replace(method, weights=tuple(weights))


def _check_how(method: Method, refs: Sequence[str], facts: Sequence[AdapterFacts]) -> None:
    """Raise UserError where the method does not exist or does not fit the kinds and ranks."""
    if method.how not in METHODS:
        raise UserError(f"--how {method.how}: expected one of {', '.join(METHODS)}")
    kinds = {one.kind for one in facts}
    if len(kinds) > 1:
        raise UserError(f"{', '.join(f'{ref} is {one.technique}' for ref, one in zip(refs, facts, strict=True))}; only adapters of one kind can be combined")
    if kinds == {"IA3"}:
        if method.how != "linear":
            raise UserError(f"--how {method.how}: IA3 adapters are vectors; peft adds them up by weight: --how linear")
        if len({tuple(sorted(map(str, one.config.get("target_modules") or ()))) for one in facts}) > 1:
            raise UserError(f"{', '.join(refs)} have different target modules; IA3 adapters are combined where each has a vector in the same layers")
        return
    ranks = [one.rank for one in facts]
    if method.how in APART and (len(set(ranks)) > 1 or any(one.config.get("rank_pattern") for one in facts)):
        instead = "svd" if method.how == "linear" else f"{method.how}_svd"
        raise UserError(
            f"--how {method.how} adds the factors A and B of all adapters, so their ranks must be one; found "
            f"{', '.join(f'{ref}: {rank}' for ref, rank in zip(refs, ranks, strict=True))}. Use --how {instead}, which works on the updates themselves, or --how cat, which is exact"
        )


def composed(base: models.Origin, origins: Sequence[models.Origin], facts: Sequence[AdapterFacts], method: Method) -> tuple[Any, float | None]:
    """The base with all adapters and the new one, called NEW and switched on; and how far, relatively, the new update is from the weighted sum (LoRA)."""
    from peft import PeftModel

    model = models.load_policy(base)
    models.resize_to(model, models.adapter_vocabulary(origins[0]))
    names = [f"parent{number}" for number in range(len(origins))]
    peft_model: Any = PeftModel.from_pretrained(model, origins[0].folder, adapter_name=names[0])
    for name, origin in zip(names[1:], origins[1:], strict=True):
        peft_model.load_adapter(origin.folder, adapter_name=name)
    given: dict[str, Any] = {}
    if facts[0].kind == "LORA":
        given = {"combination_type": method.how, "density": method.density, "majority_sign_method": method.sign, "svd_rank": method.rank}
        _refuse_unknown(peft_model, given)
        _refuse_scaled_twice(method.how)
        # The new adapter takes its config from the first one, and its scaling must be 1, which rank-stabilised LoRA would make √rank.
        peft_model.peft_config[names[0]] = replace(peft_model.peft_config[names[0]], use_rslora=False)
    with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a density of 1, which prunes nothing, as was asked for
        torch.manual_seed(method.seed)
        try:
            peft_model.add_weighted_adapter(names, list(method.weights), NEW, **given)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"peft can't combine {', '.join(origin.asked for origin in origins)} by {method.how}: {str(error).splitlines()[0]}") from error
    _check_rank(peft_model)
    peft_model.set_adapter(NEW)
    peft_model.eval()
    return peft_model, deviation_of(peft_model, names, method.weights) if facts[0].kind == "LORA" else None


def _refuse_scaled_twice(how: str) -> None:
    """Raise UserError where the installed peft multiplies updates by their scaling twice: before 0.21 all methods that end in svd do (peft/tuners/lora/model.py)."""
    installed = version("peft")
    if how.endswith("svd") and Version(installed) < Version("0.21"):
        raise UserError(f"--how {how}: peft {installed} multiplies the updates by their scaling twice, which is wrong; expected 0.21 or newer: pip install 'peft>=0.21', or --how cat, which is exact")


def _check_rank(peft_model: Any) -> None:
    """Raise UserError where a layer is too narrow for the new rank: peft then writes factors of another shape than its config says, which nothing loads."""
    rank = getattr(peft_model.peft_config[NEW], "r", None)
    for name, layer in peft_model.named_modules():
        if rank is None or NEW not in getattr(layer, "lora_A", {}):
            continue
        narrow, (wide, out) = min(layer.lora_A[NEW].weight.shape[0], layer.lora_B[NEW].weight.shape[1]), (layer.in_features, layer.out_features)
        if narrow != rank:
            raise UserError(f"--rank {rank}: {name.removeprefix('base_model.model.')} is {wide} to {out}, so its updates have rank {narrow} at most; give --rank {narrow} or less")


def _refuse_unknown(peft_model: Any, given: dict[str, Any]) -> None:
    """Raise UserError where the installed peft lacks what the method needs."""
    known = inspect.signature(peft_model.base_model.add_weighted_adapter).parameters
    if missing := [name for name in given if name not in known]:
        raise UserError(f"the installed peft's add_weighted_adapter has no {', '.join(missing)}; expected peft 0.21 or newer: pip install -U peft")


@torch.no_grad()
def deviation_of(peft_model: Any, names: Sequence[str], weights: Sequence[float]) -> float:
    """‖ΔW − Σ w·ΔW_i‖ / ‖Σ w·ΔW_i‖ over all layers, Frobenius: 0 where the new update is the weighted sum of its parents'."""
    from peft.tuners.lora import LoraLayer

    gap = whole = 0.0
    layers: list[Any] = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        held = {**layer.lora_A, **dict(layer.lora_embedding_A.items())}
        wanted: Any = 0
        for name, weight in zip(names, weights, strict=True):
            if name in held:
                wanted = wanted + weight * layer.get_delta_weight(name).double()
        if NEW in held:
            gap += float((layer.get_delta_weight(NEW).double() - wanted).square().sum())
            whole += float(torch.as_tensor(wanted).square().sum())
    return math.sqrt(gap / whole) if whole else math.sqrt(gap)
