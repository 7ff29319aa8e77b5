"""The Python lines that load a published model whose weights lie under a soft prompt, with nothing but peft and transformers.

Such a folder is two models: the prompt, and under it `base`. `AutoPeftModelForCausalLM` reads where the second lies from where Python was started,
not from the folder, so it can't open one by its path.
"""

from __future__ import annotations

import json

from stages.registry.manifest import MODEL, Checkpoint

BASE = "base"  # in a model folder with a soft prompt: the weights under it (stages/soft/folder.py)
NOTE = "Load the weights in `base` first, then the prompt, as above: AutoPeftModelForCausalLM can't find them by the folder's path."


def auto_class(checkpoint: Checkpoint) -> str:
    """The transformers class of a checkpoint's weights."""
    return "AutoModelForSequenceClassification" if checkpoint.stage == "reward" else "AutoModelForCausalLM"


def outside_arguments(checkpoint: Checkpoint) -> str:
    """What that class must be told beside a folder that is not this checkpoint's: an adapter's base knows nothing of its one score."""
    return ", num_labels=1" if checkpoint.stage == "reward" else ""


def is_stacked(checkpoint: Checkpoint) -> bool:
    """Whether a soft prompt stands in front of weights of the checkpoint's own, whole ones or an adapter."""
    return any(f"{MODEL}/{BASE}/{name}" in checkpoint.manifest["files"] for name in ("config.json", "adapter_config.json"))


def stacked_lines(checkpoint: Checkpoint, folder: str, outside: str) -> list[str]:
    """What gives `model`, to be run as it is; of a checkpoint that is stacked. `folder`: where its model lies; `outside`: what an adapter in `base` belongs to."""
    cls, under = auto_class(checkpoint), f"{folder}/{BASE}"
    imports = ["from peft import PeftModel", f"from transformers import {cls}", ""]
    if f"{MODEL}/{BASE}/config.json" in checkpoint.manifest["files"]:
        weights = [f"base = {cls}.from_pretrained({_quoted(under)})"]
    else:
        weights = [
            f"base = {cls}.from_pretrained({_quoted(outside)}{outside_arguments(checkpoint)})",
            f"base = PeftModel.from_pretrained(base, {_quoted(under)}).merge_and_unload()",
        ]
    return [*imports, *weights, f"model = PeftModel.from_pretrained(base, {_quoted(folder)})"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
