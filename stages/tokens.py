"""The tokenizer that lies with a model, made safe, with the template and the facts that every manifest records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from configs.errors import UserError
from stages import models
from stages.data import Formatter, ensure_special_tokens
from stages.registry import contract


@dataclass(frozen=True)
class ModelTokens:
    """What a stage needs to read and write a model's ids."""

    tokenizer: Any
    formatter: Formatter
    facts: dict[str, Any]  # digest, template, template_digest, eos_id, eos_ids, pad_id
    notes: tuple[str, ...]  # what had to be mended, for the log

    @property
    def pad_id(self) -> int:
        """The id that pads; never an EOS."""
        return int(self.facts["pad_id"])

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends a completion."""
        return list(self.facts["eos_ids"])

    @property
    def key(self) -> str:
        """Names tokenizer and template together: models with one key read each other's ids."""
        return f"{self.facts['digest']}:{self.facts['template_digest']}"


def load_tokens(origin: models.Origin, template: str = "auto", base: models.Origin | None = None) -> ModelTokens:
    """The tokenizer of a model, with a pad token that is no EOS and the chat template that `template` names.

    Raises:
        UserError: no tokenizer, no EOS, a template that cannot be used, or one that is not the checkpoint's own.
    """
    tokenizer = models.load_tokenizer(origin)
    if origin.checkpoint is not None:
        recorded = origin.checkpoint.info("tokenizer")
        if tokenizer_digest(tokenizer) != recorded["digest"]:
            raise UserError(f"{origin.checkpoint.ref}: its tokenizer files do not hold the tokenizer it was published with; run: align registry verify {origin.checkpoint.ref} --deep")
        contract.check_pad_eos(recorded, origin.checkpoint.ref)
        tokens = _prepared(tokenizer, template, list(recorded["eos_ids"]), ())
        contract.check_template(origin.checkpoint, tokens.facts | {"name": f"template: {template}"})
        return tokens
    special = ensure_special_tokens(tokenizer, *_configs(origin, base))
    return _prepared(tokenizer, template, list(special.eos_ids), special.notes)


def refuse_other_tokens(tokens: ModelTokens, reference: models.Origin, cfg: Any) -> None:
    """Raise UserError where the reference of a stage would read the policy's ids as other text."""
    if reference.asked == cfg.init_from:
        return
    if reference.checkpoint is not None:
        contract.check_same_tokenizer(reference.checkpoint, tokens.facts | {"name": cfg.init_from})
        contract.check_template(reference.checkpoint, tokens.facts | {"name": cfg.init_from})
    elif load_tokens(reference, cfg.template).facts["digest"] != tokens.facts["digest"]:
        raise UserError(f"reference {reference.asked} has another tokenizer than init_from {cfg.init_from}; use models that descend from one")


def _prepared(tokenizer: Any, template: str, eos_ids: list[int], notes: tuple[str, ...]) -> ModelTokens:
    formatter = Formatter(tokenizer, template, eos_ids)
    facts = formatter.facts() | {"digest": tokenizer_digest(tokenizer)}
    return ModelTokens(tokenizer, formatter, facts, notes)


def _configs(origin: models.Origin, base: models.Origin | None = None) -> list[Any]:
    """The model's config and generation config, where it has them. `base`: where those of an adapter lie, if it does not say so itself."""
    from transformers import AutoConfig, GenerationConfig

    base = base or origin
    while models.is_adapter(base):
        base = models.adapter_base(base)
    found = [models.from_pretrained(AutoConfig, base.folder)]
    try:
        found.append(GenerationConfig.from_pretrained(base.folder))
    except OSError:
        return found  # a model without a generation config; its config names the EOS
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """BLAKE3 (hex) of what a tokenizer does, not of how it was last called (padding and truncation are left out)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        content = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    return blake3(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
