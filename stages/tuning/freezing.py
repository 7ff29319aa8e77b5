"""Which parameters full training leaves alone, and when it takes them up: functions of the config and of the number of steps taken."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

from configs.errors import UserError
from configs.schema import Freeze
from stages.zero import gather

LAYER = re.compile(r"(.*?)\.(\d+)\..+")


class Choice(NamedTuple):
    """Names of parameters: those that are never trained, and of each frozen decoder layer, from the bottom up, those that a schedule may take up."""

    never: frozenset[str]
    layers: tuple[frozenset[str], ...]


def decoder_layers(model: Any) -> dict[str, int]:
    """Parameter -> its decoder layer, counted from 0; parameters outside of the layers are not in it.

    Raises:
        UserError: the architecture does not have one stack of layers of the length that its config says.
    """
    count = model.config.get_text_config().num_hidden_layers
    stacks: dict[str, dict[str, int]] = {}
    for name, _ in model.named_parameters():
        if found := LAYER.fullmatch(name):
            stacks.setdefault(found[1], {})[name] = int(found[2])
    fitting = [names for names in stacks.values() if len(set(names.values())) == count]
    if len(fitting) != 1:
        raise UserError(f"tune.freeze: {type(model).__name__} has {len(fitting)} stacks of {count} decoder layers, expected one; name what to freeze in tune.freeze.patterns")
    return fitting[0]


def choose(model: Any, freeze: Freeze) -> Choice:
    """What `freeze` means for `model`.

    Raises:
        UserError: more layers than there are, a pattern that is found in no parameter's name, or nothing that is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    never = {name for pattern in freeze.patterns for name in names if re.search(pattern, name)}
    if unused := [pattern for pattern in freeze.patterns if not any(re.search(pattern, name) for name in names)]:
        raise UserError(f"tune.freeze.patterns: {unused[0]!r} is found in no parameter's name of {type(model).__name__}; they are such as {', '.join(names[:3])}, {names[-1]}")
    kinds = [(nn.Embedding,)] if freeze.embeddings else []
    for path, module in model.named_modules():
        if any(isinstance(module, kind) for kind in kinds) or (freeze.norms and "norm" in type(module).__name__.lower()):
            never |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    layers = _frozen_layers(model, freeze)
    everything = never.union(*layers)
    if (everything >= set(names) and freeze.unfreeze_every is None) or never >= set(names):
        raise UserError("tune.freeze leaves nothing to train; freeze less")
    return Choice(frozenset(never), tuple(frozenset(layer - never) for layer in layers))


def _frozen_layers(model: Any, freeze: Freeze) -> list[set[str]]:
    """The parameters of each layer that `first` or `keep_last` freezes, from the bottom up."""
    if freeze.first is None and freeze.keep_last is None:
        return []
    layer_of = decoder_layers(model)
    there = max(layer_of.values()) + 1
    key, asked = ("first", freeze.first) if freeze.first is not None else ("keep_last", freeze.keep_last)
    assert asked is not None
    if asked > there:
        raise UserError(f"tune.freeze.{key} is {asked}, and {type(model).__name__} has {there} decoder layers")
    return [{name for name, layer in layer_of.items() if layer == number} for number in range(asked if key == "first" else there - asked)]


class Thaw:
    """Freezes parameters of a model; with a schedule, takes its layers up again from the top: one more after every `every` optimizer steps.

    All that are ever trained require gradients until the first step, so that the optimizer and DDP know them. A parameter that requires none has
    none, and AdamW leaves one without a gradient alone: no update, no decay, no moments.
    """

    def __init__(self, model: Any, freeze: Freeze) -> None:
        self.choice, self.every = choose(model, freeze), freeze.unfreeze_every
        self.parameters = dict(model.named_parameters())
        self.frozen: int | None = None  # layers, since they were last set
        for name in self.choice.never if self.every else self.choice.never.union(*self.choice.layers):
            self.parameters[name].requires_grad_(False)

    def at(self, step: int) -> None:
        """Make ready for the step that follows `step` steps."""
        if self.every is None:
            return
        frozen = max(0, len(self.choice.layers) - step // self.every)
        if frozen == self.frozen:
            return
        for number, names in enumerate(self.choice.layers):
            for name in names:
                self.parameters[name].requires_grad_(number >= frozen)
        self.frozen = frozen

    def __str__(self) -> str:
        sizes = {name: gather.shape(value).numel() for name, value in self.parameters.items()}
        held = self.choice.never.union(*self.choice.layers)
        text = f"freeze: {sum(sizes[n] for n in held):,} of {sum(sizes.values()):,} parameters are frozen ({len(self.choice.layers)} decoder layers)"
        return text if self.every is None else f"{text}; one layer more is trained after every {self.every} steps, all of them from step {self.every * len(self.choice.layers) + 1}"
