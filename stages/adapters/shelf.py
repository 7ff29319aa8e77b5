"""Models that are wanted in turn. Adapters of one base lie on one copy of it, and are switched; whatever has no such neighbour is loaded alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from stages import foreign, models, soft
from stages.adapters.facts import IN_FRONT, IN_LAYERS, adapter_facts, digest_of

NOTHING = digest_of(Path(), ())  # of an adapter whose file holds no tensor of the base


class Shared:
    """One base in eval mode with adapters in its layers, or soft prompts in front, of which one is on at a time; with none on it is the base itself."""

    def __init__(self, base: models.Origin, rows: int, device: torch.device, dtype: torch.dtype, attn_implementation: str | None = None) -> None:
        """`rows`: of the embeddings, which adapters may have been trained at. Raises UserError as `models.load_policy` does."""
        self.model = models.load_policy(base, dtype=dtype, attn_implementation=attn_implementation)
        models.resize_to(self.model, rows)
        self.model.to(device)
        self.peft: Any = None
        self.on: dict[str, str] = {}  # what identifies an adapter -> its name here
        self.prompts: dict[str, soft.SoftPrompt] = {}  # likewise

    def with_adapter(self, origin: models.Origin | None) -> Any:
        """The model with this adapter on (None: with none), loaded into its layers where it is not yet. It stays so until another is asked for."""
        soft.take_off(self.model)
        if origin is None or soft.is_prompt(origin):
            if self.peft is not None:
                self.peft.base_model.disable_adapter_layers()
            if origin is not None:
                self._put_in_front(origin)
            return self.model
        name = self.on.get(origin.identity) or self._load(origin)
        self.peft.base_model.enable_adapter_layers()
        self.peft.set_adapter(name)
        self.model.requires_grad_(False)
        return self.model

    def _put_in_front(self, origin: models.Origin) -> None:
        if (prompt := self.prompts.get(origin.identity)) is not None:
            return soft.put_at(self.model, prompt)
        found = soft.of(soft.attach(self.model, origin.folder))
        assert found is not None
        self.prompts[origin.identity] = found

    def _load(self, origin: models.Origin) -> str:
        from peft import PeftModel

        foreign.check_folder(Path(origin.folder))
        name = f"adapter{len(self.on)}"
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.model, origin.folder, adapter_name=name)
        else:
            self.peft.load_adapter(origin.folder, adapter_name=name)
        self.on[origin.identity] = name
        self.model.eval()
        return name


class Shelf:
    """The models of an evaluation or a chat, by label. Nothing is loaded before it is asked for."""

    def __init__(
        self, origins: Mapping[str, models.Origin], rows: Mapping[str, int], *, device: torch.device, dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
    ) -> None:  # fmt: skip
        """`rows`: label -> ids that its tokenizer knows, so rows that its embeddings need. `dtype`: of whole weights; those with adapters in their layers are float32."""
        self.origins, self.rows, self.device, self.dtype, self.attn = dict(origins), dict(rows), device, dtype, attn_implementation
        places = {label: place_of(origin, rows[label]) for label, origin in origins.items()}
        self.places = {label: (*place, dtype if soft.is_prompt(self.origins[label]) else torch.float32) if place else None for label, place in places.items()}
        self._take_in_bases()
        self._shared: dict[Hashable, Shared] = {}
        self._alone: dict[str, Any] = {}

    def _take_in_bases(self) -> None:
        """A base that is asked for itself is the shared copy with no adapter on."""
        for label, origin in self.origins.items():
            if self.places[label] is None:
                alike = (origin.identity, max(self.rows[label], _vocabulary(origin)), NOTHING, self.dtype)
                self.places[label] = alike if alike in self.places.values() else None

    def neighbours(self, label: str) -> list[str]:
        """The labels whose models lie on the same copy, this one included."""
        place = self.places[label]
        return [label] if place is None else [other for other, its in self.places.items() if its == place]

    def in_order(self, first: str) -> list[str]:
        """Every label, those of one copy next to each other, beginning with `first`."""
        order: list[str] = []
        for label in [first, *self.origins]:
            order += [other for other in [label, *self.neighbours(label)] if other not in order]
        return list(dict.fromkeys(order))

    def weights(self, label: str) -> Callable[[], Any]:
        """A function that gives the model; where several lie on one copy, with its adapter on: until another of them is asked for.

        Raises UserError for what cannot be loaded.
        """
        if len(self.neighbours(label)) == 1:
            if label not in self._alone:
                self._alone[label] = self._load_alone(label)
            model = self._alone[label]
            return lambda: model
        place = self.places[label]
        assert place is not None
        origin: models.Origin | None = self.origins[label]
        assert origin is not None
        if place not in self._shared:
            base = models.adapter_base(next(one for other in self.neighbours(label) if models.is_adapter(one := self.origins[other]) and one.identity != place[0]))
            self._shared[place] = Shared(base, place[1], self.device, place[3], self.attn)
        shared, adapter = self._shared[place], None if origin.identity == place[0] else origin
        shared.with_adapter(adapter)
        return lambda: shared.with_adapter(adapter)

    def _load_alone(self, label: str) -> Any:
        model = models.load_policy(self.origins[label], dtype=self.dtype, attn_implementation=self.attn).to(self.device)
        models.resize_to(model, self.rows[label])  # a pad token that had to be added is an input like any other
        return model

    def forget(self, label: str) -> None:
        """Let go of a model, and of what it shares with others: to be called when none of its neighbours is needed any more."""
        self._alone.pop(label, None)
        if (place := self.places[label]) is not None:
            self._shared.pop(place, None)


Place = tuple[str, int, str]


def place_of(origin: models.Origin, rows: int) -> Place | None:
    """What adapters have in common that can lie on one copy: (identity of the base, rows of its embeddings, digest of the base's own tensors in their
    files, such as embeddings that have grown). None for whole weights, for other kinds, and for a soft prompt with weights of its own under it.

    Raises UserError where the base has changed.
    """
    if not models.is_adapter(origin):
        return None
    facts = adapter_facts(Path(origin.folder))
    if facts.kind not in (*IN_LAYERS, *IN_FRONT) or facts.whole or (facts.kind in IN_FRONT and (Path(origin.folder) / soft.BASE).is_dir()):
        return None
    base = models.adapter_base(origin)
    if models.is_adapter(base) and base.checkpoint is None:
        return None
    width = models.adapter_vocabulary(origin) or _vocabulary(base)
    return None if width < rows else (base.identity, width, digest_of(Path(origin.folder), facts.others))


def _vocabulary(origin: models.Origin) -> int:
    """Rows of a model's embeddings; 0 where its config does not say."""
    from transformers import AutoConfig

    while models.is_adapter(origin):
        if (width := models.adapter_vocabulary(origin)) is not None:
            return width
        origin = models.adapter_base(origin)
    with suppress(UserError):
        return int(getattr(models.from_pretrained(AutoConfig, origin.folder).get_text_config(), "vocab_size", 0) or 0)
    return 0
