"""Where every model is loaded and written: origins, policies, scorers, adapters, and what a published folder holds."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from configs.errors import UserError
from configs.references import is_reference, pin
from stages import foreign, soft, unchanged
from stages.compat import never_split
from stages.dropout import without_dropout
from stages.registry import Checkpoint, Parent, Registry
from stages.registry.leases import Held
from stages.tuning import adapters
from stages.zero import gather

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: a checkpoint of the registry, or a Hugging Face folder or name."""

    asked: str
    checkpoint: Checkpoint | None
    registry: Registry | None
    inside: str = ""  # the folder in the checkpoint's model folder that is meant

    @property
    def folder(self) -> str:
        """What `from_pretrained` is given."""
        return str(self.checkpoint.model_dir / self.inside) if self.checkpoint else self.asked

    @property
    def identity(self) -> str:
        """The checkpoint's id (and the folder in it), or the outside model's path or name."""
        return "/".join(filter(None, (self.checkpoint.id, self.inside))) if self.checkpoint else self.asked

    def ancestors(self) -> Sequence[Checkpoint]:
        """The published checkpoints that this is and descends from, itself first; none for a model from outside."""
        return self.registry.ancestors(self.checkpoint) if self.checkpoint and self.registry else []

    def lease(self, purpose: str) -> Held | None:
        """Keep gc from moving a published checkpoint while this process runs, or until the lease is given back.

        Raises:
            UserError: it was removed since it was found.
        """
        return self.registry.lease(self.checkpoint, purpose) if self.checkpoint and self.registry else None

    def parent(self, role: str) -> Parent:
        """The lineage entry of this origin."""
        return Parent.of(self.checkpoint, role) if self.checkpoint else Parent.external(self.asked, role)


def find(asked: str, registry_root: Path, stages: tuple[str, ...] | None = None) -> Origin:
    """Find a model by registry name, folder or hub name.

    Raises:
        UserError: a registry name that does not resolve, or a checkpoint of another stage than `stages`.
    """
    if Path(asked).is_dir():
        if not (Path(asked) / "config.json").is_file() and not (Path(asked) / "adapter_config.json").is_file():
            raise UserError(f"{asked} is a folder without config.json; expected a Hugging Face model folder, as save_pretrained writes it")
        return Origin(asked, None, None)
    if is_reference(asked):
        registry = Registry(registry_root, create=False)
        return Origin(asked, registry.resolve(asked, stage=stages), registry)
    if asked.startswith((".", "/", "~")) or asked.count("/") > 1 or ".." in asked.split("/"):
        raise UserError(f"model {asked!r}: no such folder; give a Hugging Face folder, a registry name such as sft/demo, or a hub name")
    _refuse_misspelt_stage(asked, registry_root)
    return Origin(asked, None, None)


def pinned(cfg: Any) -> Any:
    """A stage's or an evaluation's config in which every registry name is one version, such as sft/demo@3.

    Names are looked up here and nowhere else: what is published while a run starts can't come between two look-ups, nor between two
    processes when one of them does this for all.

    Raises:
        UserError: a name that does not resolve.
    """

    @cache
    def version(asked: str) -> str:
        checkpoint = find(asked, cfg.registry).checkpoint
        return checkpoint.ref if checkpoint else asked

    return pin(cfg, version)


def _refuse_misspelt_stage(asked: str, registry_root: Path) -> None:
    """Raise for stf/demo where the registry holds sft/demo: the hub would be searched for it in vain, for a minute without network."""
    owner, _, name = asked.partition("@")[0].partition("/")
    meant = difflib.get_close_matches(owner, ("sft", "reward", "dpo", "ppo"), n=1)
    if meant and (registry_root / "registry.json").is_file() and Registry(registry_root, create=False).list(meant[0], name):
        raise UserError(f"{asked!r} is no checkpoint of {registry_root}. Did you mean {meant[0]}/{name}?")


def verify(*origins: Origin) -> None:
    """Compare every byte of published checkpoints, and of what lies under adapters, with the hashes in the manifests, each once.

    `find` looks at names and sizes only; a flipped bit in the weights shows here, before hours go into training from them.
    Reads all files: call it on one rank.

    Raises:
        UserError: a checkpoint that is damaged, a folder whose weights are cut off, NaN or infinite, an adapter whose base has changed or
            is gone.
    """
    from stages.registry import contract

    waiting, seen, read = list(origins), set(), set()
    while waiting:
        origin = waiting.pop(0)
        if origin.identity in seen:
            continue
        seen.add(origin.identity)
        if origin.checkpoint is not None and origin.registry is not None:
            if origin.checkpoint.id not in read:
                origin.registry.resolve(origin.checkpoint.ref, deep=True)
            read.add(origin.checkpoint.id)
        elif Path(origin.folder).is_dir():
            contract.check_finite(Path(origin.folder), origin.asked)
        if is_adapter(origin):
            waiting.append(adapter_base(origin))
            if origin.checkpoint is not None and waiting[-1].checkpoint is None:
                _check_outside_base(origin.checkpoint, waiting[-1].asked)


def _check_outside_base(adapter: Checkpoint, base: str) -> None:
    """Raise where a folder from outside the registry no longer holds the weights that an adapter was trained on."""
    from stages.registry import contract

    if adapter.info("stage_info")["adapter"].get("base_digest") and not Path(base).is_dir():
        raise UserError(f"{adapter.ref} is an adapter trained on the folder {base}, which is not there any more; bring it back unchanged")
    contract.check_base_under_adapter(adapter, base)


def with_bases(*origins: Origin) -> list[Origin]:
    """The origins, each followed by what lies under it: all whose weights a process loads."""
    found: list[Origin] = []
    for origin in origins:
        found.append(origin)
        while is_adapter(found[-1]):
            found.append(adapter_base(found[-1]))
    return found


def is_adapter(origin: Origin) -> bool:
    """Whether the model folder holds an adapter rather than whole weights."""
    return (Path(origin.folder) / "adapter_config.json").is_file()


def adapter_kind(origin: Origin) -> str:
    """peft's name of the kind of an adapter: LORA, IA3 …"""
    return str(foreign.read_json(Path(origin.folder) / foreign.ADAPTER).get("peft_type"))


def adapter_base(origin: Origin) -> Origin:
    """The origin of the weights under an adapter checkpoint.

    Raises:
        UserError: the folder does not say which base it belongs to, or an outside base has changed since.
    """
    from stages.registry import contract

    if soft.is_prompt(origin) and (Path(origin.folder) / soft.BASE).is_dir():
        return Origin(str(Path(origin.asked) / soft.BASE), None, None) if origin.checkpoint is None else replace(origin, inside=soft.BASE)
    if origin.checkpoint is None:
        foreign.check_folder(Path(origin.folder))
        base = foreign.read_json(Path(origin.folder) / foreign.ADAPTER).get("base_model_name_or_path")
        if not base:
            raise UserError(f"{origin.folder}: adapter_config.json names no base model")
        return Origin(base, None, None)
    facts = origin.checkpoint.info("stage_info")["adapter"]
    if facts.get("base_id"):
        assert origin.registry is not None
        base_checkpoint = origin.registry.resolve(facts["base_id"])
        contract.check_base_under_adapter(origin.checkpoint, base_checkpoint.id)
        return Origin(facts["base"], base_checkpoint, origin.registry, facts.get("inside", ""))
    return Origin(facts["base"], None, None)


def adapter_facts(origin: Origin) -> dict[str, Any]:
    """What an adapter checkpoint records about its base: stage_info["adapter"]. A soft prompt stays on top: the base is what lies under it."""
    origin = soft.beneath(origin)
    parent = origin.parent("base")
    return {"base": origin.asked, "base_id": origin.checkpoint.id if origin.checkpoint else None, "base_digest": parent.digest, "inside": origin.inside}


def weights_dtype(precision: str, *, frozen: bool = False) -> torch.dtype:
    """float32 for weights that are trained (bf16 is an autocast over them); frozen ones may be stored in bf16."""
    return torch.bfloat16 if frozen and uses_bf16(precision) else torch.float32


def uses_bf16(precision: str) -> bool:
    """Whether arithmetic is bf16.

    Raises:
        UserError: bf16 was asked for on a GPU that lacks it.
    """
    if precision == "fp32":
        return False
    supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if precision == "bf16" and torch.cuda.is_available() and not supported:
        raise UserError("precision: bf16, but this GPU has no bf16 arithmetic; use precision: fp32")
    return supported or precision == "bf16"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a model of this precision computes: bf16 matrix products over float32 weights, or none."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(precision))


def from_pretrained(cls: Any, folder: str, **kwargs: Any) -> Any:
    """`from_pretrained` with errors a person can act on, and no progress bar for each shard."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    if Path(folder).is_dir():
        foreign.check_folder(Path(folder))
    else:
        _refuse_hub_adapter(folder)
    try:
        return cls.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, RecursionError, AttributeError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"cannot load {folder!r}: it needs Python code of its own (auto_map in its config), and code that comes with a model is never run here; "
                "expected an architecture and a tokenizer that transformers has"
            ) from None
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = "look at the files in this folder, or get them again" if Path(folder).is_dir() else (
            "give a Hugging Face folder, a registry name such as sft/demo, or a hub name that can be reached from here"
        )  # fmt: skip
        raise UserError(f"cannot load {folder!r}: {first} ({advice})") from error


@cache
def _refuse_hub_adapter(name: str) -> None:
    """Raise where a hub name is that of an adapter: transformers would load base and adapter as one model that looks like a whole one."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name) is not None:
        raise UserError(f"{name} is an adapter on the hub, and adapters are read from folders: run `hf download {name} --local-dir FOLDER` and give the folder")


def load_tokenizer(origin: Origin) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with the model (for a published adapter too)."""
    from transformers import AutoTokenizer

    folder = Path(origin.folder)
    if folder.is_dir() and not any(folder.glob("*token*")) and not (folder / "vocab.json").is_file():
        raise UserError(f"{folder} holds a model and no tokenizer (tokenizer.json, tokenizer_config.json); copy the tokenizer's files there")
    return from_pretrained(AutoTokenizer, origin.folder)


def load_policy(origin: Origin, *, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> Any:
    """A causal language model in eval mode with dropout off; an adapter is merged into its base, however deep, a soft prompt put in front.

    Merged weights are float32 whatever `dtype` says: bf16 keeps 8 bits of a weight, and most of what an adapter adds is smaller.
    """
    from transformers import AutoModelForCausalLM

    if soft.is_prompt(origin):
        model = load_policy(adapter_base(origin), dtype=dtype, attn_implementation=attn_implementation)
        resize_to(model, adapter_vocabulary(origin))
        soft.attach(model, origin.folder)
    elif is_adapter(origin):
        model = _merged(load_apart(origin, attn_implementation=attn_implementation))
    else:
        model = from_pretrained(AutoModelForCausalLM, origin.folder, dtype=dtype, attn_implementation=attn_implementation, use_safetensors=True)
    return without_dropout(model)


def load_apart(origin: Origin, *, scorer: bool = False, attn_implementation: str | None = None) -> Any:
    """An adapter (of a reward model: `scorer`) on its base, not merged: a PeftModel in float32, eval mode."""
    base = load_policy(adapter_base(origin), attn_implementation=attn_implementation)
    resize_to(base, adapter_vocabulary(origin))
    if scorer:
        base = scorer_from_policy(base, pad_id=pad_id_of(origin), seed=0)
    return _with_adapter(base, origin).eval()


def _with_adapter(base: Any, origin: Origin) -> Any:
    """A PeftModel; the adapter's file may hold the base's embeddings, where those have grown."""
    from peft import PeftModel

    foreign.check_folder(Path(origin.folder))
    with gather.whole(base.get_input_embeddings().parameters(), changed=True):
        return PeftModel.from_pretrained(base, origin.folder)


def _merged(peft_model: Any) -> Any:
    """The base with the adapter's update added to its weights, trainable again (peft froze it). Layer by layer: of a model that ZeRO-3
    has split, one layer at a time is whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if peft_model.active_peft_config.is_prompt_learning:
        raise UserError(f"an adapter of type {peft_model.active_peft_config.peft_type.value} can't be merged into its base")
    base = peft_model.get_base_model()
    layers: list[Any] = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    adapters.refuse_tied(base, layers)
    for layer in layers:
        with gather.whole(layer.parameters(), changed=True):
            layer.merge()
    return peft_model.unload().requires_grad_(True)


def adapter_vocabulary(origin: Origin) -> int | None:
    """The vocabulary size an adapter was trained at, where its checkpoint says so."""
    return origin.checkpoint.info("stage_info").get("adapter", {}).get("vocabulary") if origin.checkpoint else None


def resize_to(model: Any, vocabulary: int | None) -> None:
    """Grow the embeddings to at least `vocabulary` rows (a pad token may have been added)."""
    if vocabulary and gather.shape(model.get_input_embeddings().weight)[0] < vocabulary:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the new rows are drawn: on every rank the same
            model.resize_token_embeddings(vocabulary)


def scorer_from_policy(policy: Any, *, pad_id: int, seed: int) -> Any:
    """A sequence-classification model with one output on the policy's own trunk (shared, not copied).

    The head starts with standard deviation 1/sqrt(d + 1) (N+ implementation details, arXiv:2403.17031).

    Raises:
        UserError: the architecture has no sequence-classification class, or its head is not named `score`.
    """
    from transformers import AutoModelForSequenceClassification

    config = type(policy.config).from_dict(policy.config.to_dict() | {"num_labels": 1, "pad_token_id": pad_id})
    try:
        with torch.device("meta"), never_split():
            scorer = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(
            f"{type(policy).__name__} has no sequence-classification model in transformers, so it can't be a reward model; "
            "start from another model, or leave the reward stage out and give PPO other scorers"
        ) from error
    head = getattr(scorer, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(scorer).__name__} has no linear head named `score`; it can't be a reward model here")
    trunk = policy.base_model
    setattr(scorer, scorer.base_model_prefix, trunk)
    dtype = policy.dtype if gather.is_split(trunk.get_input_embeddings().weight) else torch.float32  # ZeRO-3 takes one dtype for all, and keeps float32 itself
    scorer.score = scalar_head(head.in_features, seed=seed, bias=head.bias is not None).to(policy.device, dtype)
    scorer.config = config
    return without_dropout(scorer)


def scalar_head(width: int, *, seed: int, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear layer [d] -> 1 with standard deviation 1/sqrt(d + 1), or zeros."""
    head = nn.Linear(width, 1, bias=bias)
    with torch.no_grad():
        head.weight.normal_(0.0, (width + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
        if zero:
            head.weight.zero_()
        if bias:
            head.bias.zero_()
    return head


def load_scorer(origin: Origin, *, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None) -> Any:
    """A published reward model: sequence classification with one output, eval mode, dropout off; an adapter is merged, in float32."""
    from transformers import AutoModelForSequenceClassification

    if soft.is_prompt(origin):
        model = soft.attach(load_scorer(adapter_base(origin), dtype=dtype, attn_implementation=attn_implementation), origin.folder)
    elif is_adapter(origin):
        model = _merged(load_apart(origin, scorer=True, attn_implementation=attn_implementation))
    else:
        model = from_pretrained(
            AutoModelForSequenceClassification, origin.folder, dtype=dtype, attn_implementation=attn_implementation, num_labels=1, use_safetensors=True
        )
    return without_dropout(model)


def pad_id_of(origin: Origin) -> int:
    """The pad id a checkpoint was published with."""
    assert origin.checkpoint is not None
    return int(origin.checkpoint.info("tokenizer")["pad_id"])


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, eos_ids: list[int], base: Origin | None = None, like: Origin | None = None, **extra: Any
) -> None:
    """Write a plain Hugging Face folder: safetensors, tokenizer with its chat template, and a generation config that
    stops at every EOS id and restricts sampling in no way. `base` is what lies under an adapter, `like` what whole weights were made from:
    they are laid out in files as its are, and what has its numbers has its dtype. `extra` goes to `save_pretrained`. A frozen soft prompt is the
    folder, the weights under it its `base`."""
    from transformers import GenerationConfig

    pad_id, weights = tokenizer.pad_token_id, soft.put_aside(model, folder)
    if base is not None:
        for config in model.peft_config.values():
            config.base_model_name_or_path = soft.beneath(base).folder
    else:
        model.config.pad_token_id = pad_id
        if getattr(model, "generation_config", None) is not None:
            model.generation_config = GenerationConfig(
                bos_token_id=tokenizer.bos_token_id, eos_token_id=eos_ids if len(eos_ids) > 1 else eos_ids[0], pad_token_id=pad_id
            )
    with unchanged.written_like(like) if base is None else nullcontext():
        model.save_pretrained(weights, **extra)
    tokenizer.save_pretrained(folder)
    for name in ("README.md", soft.ENCODER):  # peft's empty card: what it would say is in the manifest; what only a run that goes on needs
        (weights / name).unlink(missing_ok=True)
