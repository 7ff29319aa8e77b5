"""Where the shapes of a stage's models come from: their config.json, before the stages that will train them have run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.references import is_reference
from configs.schema import Lora


@dataclass
class Sources:
    """Finds configs and tokenizers. `base` stands for a checkpoint of a chain that is not published yet; `notes` say where it did."""

    base: str | None = None
    notes: list[str] = field(default_factory=list)

    def origin(self, asked: str, registry: Path) -> Any:
        """What a name means, as the stages see it, or the chain's base in its place.

        Raises:
            UserError: neither is there.
        """
        from stages import models

        try:
            return models.find(asked, registry)
        except UserError as error:
            if asked == self.base:
                raise UserError(f"{error}; a base that the chain's own preparation makes is there once that has run: align run CHAIN.yaml --only sft") from error
            if not is_reference(asked) or self.base is None:
                raise
        self.note(f"{asked} is not published yet: planned with the shape of {self.base}")
        return models.find(self.base, registry)

    def config(self, asked: str, registry: Path) -> Any:
        """The transformers config of a model; of an adapter, of the model under it.

        Raises:
            UserError: there is none to be read from here.
        """
        from stages import models

        origin = self.origin(asked, registry)
        while models.is_adapter(origin):
            origin = models.adapter_base(origin)
        return read_config(origin.folder)

    def adapter(self, asked: str, registry: Path) -> Lora | None:
        """The shape of a published adapter, under a soft prompt too; None of a whole model."""
        from stages import models, soft

        origin = soft.beneath(self.origin(asked, registry))
        if not models.is_adapter(origin):
            return None
        found = json.loads((Path(origin.folder) / "adapter_config.json").read_text(encoding="utf-8"))
        if found["peft_type"] != "LORA":
            return None  # it is merged into a model of its own
        return Lora(rank=found["r"], target_modules=found["target_modules"])

    def lies_on(self, adapter: str, base: str, registry: Path) -> bool:
        """Whether a published adapter was trained on the weights that `base` names."""
        from stages import models, soft

        there, start = self.origin(adapter, registry), self.origin(base, registry)
        under, start, alike = models.adapter_base(soft.beneath(there)), soft.beneath(start), soft.same_prompt(there, start)
        return alike and (under.identity == start.identity or Path(under.folder).resolve() == Path(start.folder).resolve())

    def tokens(self, asked: str, registry: Path, template: str) -> Any:
        """The tokenizer with its template; None where there is none beside the config."""
        from stages.tokens import load_tokens

        try:
            return load_tokens(self.origin(asked, registry), template)
        except UserError as error:
            self.note(f"no tokenizer ({str(error).splitlines()[0][:120]}): rows are taken to be as long as max_length allows")
            return None

    def note(self, text: str) -> None:
        """Say something about the plan once."""
        if text not in self.notes:
            self.notes.append(text)


def read_config(name: str) -> Any:
    """The transformers config of a folder or of a model in the local cache.

    Raises:
        UserError: there is none to be read from here.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no model config at {name!r}: {first}; a plan needs the model's config.json and nothing else: give a folder that holds one "
            "(hf download NAME config.json), or run the chain's preparation first (align run CHAIN.yaml --only sft)"
        ) from error
