"""Which token pads, which tokens end a completion: pad must never be an EOS (it would hide EOS from the loss)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import UserError

NEW_PAD = "<|pad|>"
UNUSED = re.compile(r"(?i)reserved|unused|extra_id|dummy")


@dataclass(frozen=True)
class SpecialTokens:
    """`eos_ids` end a rollout, `eos_id` ends what we write; `vocabulary` is the rows the embedding needs at least."""

    pad_id: int
    eos_id: int
    eos_ids: tuple[int, ...]
    vocabulary: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "eos_ids": list(self.eos_ids), "notes": list(self.notes)}


def ensure_special_tokens(tokenizer: Any, *model_configs: Any) -> SpecialTokens:
    """Set `tokenizer.pad_token` to a token that is no EOS, and collect every EOS of tokenizer and model.

    `model_configs`: the model's config and generation config (None is skipped); their `eos_token_id` (int or list)
    is read, never written. The pad is, in this order: the present one, a pad-like or reserved special token,
    unk, a new "<|pad|>" (which counts in `vocabulary`).
    Raises UserError when nothing ends a text.
    """
    given = [config for config in model_configs if config is not None]
    eos_ids = _eos_ids(tokenizer, given)
    notes: list[str] = []
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_ids[0])
        notes.append(f"the tokenizer names no EOS; the model's {tokenizer.eos_token!r} is used")
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id in eos_ids:
        why = "the tokenizer has no pad token" if pad_id is None else f"the pad token {tokenizer.pad_token!r} is also an EOS"
        tokenizer.pad_token = _pick_pad(tokenizer, eos_ids)
        notes.append(f"{why}: {tokenizer.pad_token!r} pads instead")
    pad_id = int(tokenizer.pad_token_id)
    assert pad_id not in eos_ids
    return SpecialTokens(
        pad_id=pad_id,
        eos_id=int(tokenizer.eos_token_id),
        eos_ids=tuple(eos_ids),
        vocabulary=len(tokenizer),
        notes=tuple(notes),
    )


def _eos_ids(tokenizer: Any, configs: list[Any]) -> list[int]:
    """The tokenizer's EOS first, then the model's, each once."""
    found = [tokenizer.eos_token_id]
    for config in configs:
        value = getattr(config, "eos_token_id", None)
        found += list(value) if isinstance(value, (list, tuple)) else [value]
    eos_ids = list(dict.fromkeys(int(value) for value in found if value is not None))
    if not eos_ids:
        raise UserError("neither the tokenizer nor the model names an EOS token; set eos_token in tokenizer_config.json")
    return eos_ids


def _pick_pad(tokenizer: Any, eos_ids: list[int]) -> str:
    """The text of a token to pad with; a new one is added as a special token by the assignment to `pad_token`."""
    taken = {*eos_ids, tokenizer.bos_token_id}
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special and index not in taken}
    for wanted in (re.compile(r"(?i)pad"), UNUSED):
        match = next((token.content for index, token in sorted(added.items()) if wanted.search(token.content)), None)
        if match:
            return match
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in taken:
        return str(tokenizer.unk_token)
    tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    return NEW_PAD
