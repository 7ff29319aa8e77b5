"""Adapters as peft has them: their configs, and the layers that may have one."""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch import nn

from configs.errors import UserError
from configs.schema import IA3, Lora, Technique

INIT = {"default": True, "gaussian": "gaussian", "pissa": "pissa", "pissa_fast": "pissa_niter_16", "olora": "olora"}
"""`lora.init` -> peft's init_lora_weights."""


def check_lora_targets(model: Any, lora: Lora | None, *, head: bool = True) -> None:
    """Raise UserError where `lora.target_modules` names layers that the model does not have, or that can't have an adapter.

    `head` false: nor may the output head have one.
    """
    if lora is None or lora.target_modules == "all-linear":
        return
    names = [name for name, module in model.named_modules() if name]
    wanted = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    if isinstance(lora.target_modules, str):  # peft takes one text as a regular expression over whole names
        hit = [name for name in names if re.fullmatch(lora.target_modules, name)]
        missing = wanted if not hit else []
    else:
        hit = [name for name in names if any(name == target or name.endswith(f".{target}") for target in wanted)]
        missing = [target for target in wanted if not any(name == target or name.endswith(f".{target}") for name in hit)]
    if missing:
        linear = linear_layers(model)
        close = difflib.get_close_matches(missing[0], linear, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"lora.target_modules: {type(model).__name__} has no module {', '.join(map(repr, missing))}; its linear layers are "
            f"{', '.join(linear)}; all-linear takes all of them but the head.{hint}"
        )
    refuse_tied(model, [model.get_submodule(name) for name in hit])
    if not head and any(model.get_submodule(name) is model.get_output_embeddings() for name in hit):
        raise UserError("lora.target_modules names the output head; in PPO the value function has an adapter of its own and no use for that layer: leave it out")


def refuse_tied(model: Any, layers: list[Any]) -> None:
    """Raise where an adapter is on one of two layers that share their weights: merged, it would change the other one too."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and inputs.weight is outputs.weight and any(layer is inputs or layer is outputs for layer in layers):
        raise UserError(
            f"an adapter on the embedding or the output head of {type(model).__name__}, which share one weight: merged into it, the adapter would "
            "change both; leave these layers out of target_modules"
        )


def lora_config(lora: Lora, task: str) -> Any:
    """The peft config of a `lora:` section; `task` is CAUSAL_LM or SEQ_CLS (which saves the score head with the adapter)."""
    from peft import LoraConfig

    arguments: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none", "init_lora_weights": INIT[lora.init]}
    return LoraConfig(**arguments, use_rslora=lora.rslora, use_dora=lora.dora, target_modules=lora.target_modules, task_type=task)


def ia3_config(ia3: IA3, model: Any) -> Any:
    """The peft config of IA3 on `model`.

    Raises:
        UserError: peft has no choice of layers for this architecture and the config makes none, or names layers that it lacks.
    """
    from peft import IA3Config
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    )

    kind = model.config.model_type
    targets = ia3.target_modules if ia3.target_modules is not None else TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    inputs = ia3.feedforward_modules if ia3.feedforward_modules is not None else TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind)
    if targets is None or inputs is None:
        raise UserError(
            f"tune.method ia3: peft has no choice of layers for {kind}; name them: tune.target_modules (keys, values, the MLP's last layer) and tune.feedforward_modules (the last of "
            f"these); {type(model).__name__} has the linear layers {', '.join(linear_layers(model))}"
        )
    names = [name for name, _ in model.named_modules()]
    if missing := [target for target in targets if not any(name == target or name.endswith(f".{target}") for name in names)]:
        raise UserError(f"tune.target_modules: {type(model).__name__} has no module {', '.join(map(repr, missing))}; its linear layers are {', '.join(linear_layers(model))}")
    refuse_tied(model, [model.get_submodule(name) for name in names if any(name == target or name.endswith(f".{target}") for target in targets)])
    return IA3Config(task_type="CAUSAL_LM", target_modules=list(targets), feedforward_modules=list(inputs))


def linear_layers(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def peft_config(technique: Technique, task: str, model: Any) -> Any:
    """What a TRL trainer is given as `peft_config`; None where no layers get adapters (a soft prompt is put in front of the model by itself, stages/soft).

    Raises:
        UserError: layers that `model` does not have.
    """
    if isinstance(technique, Lora):
        return lora_config(technique, task)
    return ia3_config(technique, model) if isinstance(technique, IA3) else None
