"""What a model folder may ask of the libraries that load it: weights in safetensors that lie in it, settings, and nothing that is code.

transformers and peft follow what the JSON files of a folder name: other files (an index of shards), pickles (where there is no safetensors file),
kernels from a hub (`attn_implementation`), Python packages (`megatron_core` of an adapter). Here the names are read before the libraries do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.00.pth", "adapter_model.bin")
ADAPTERS = ("LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
SOFT_REFUSED = ("prompt_tuning_init", "tokenizer_name_or_path", "tokenizer_kwargs")
LARGEST_JSON = 64 * 2**20  # bytes; a tokenizer.json of a large vocabulary has 20 MiB, an index a few
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX, ADAPTER)


def check_folder(folder: Path) -> None:
    """Refuse a model folder that would have a library unpickle, import or download something, or read weights outside of it.

    Raises:
        UserError: naming the file and what it asks for.
    """
    settings = {name: read_json(folder / name) for name in SETTINGS if (folder / name).is_file()}
    _refuse_pickled_weights(folder)
    _refuse_shards_elsewhere(folder, settings.get(INDEX))
    config = settings.get("config.json", {})
    for name, value in _named(config, ("attn_implementation", "_attn_implementation", "experts_implementation")):
        if any("/" in str(choice) for choice in (value.values() if isinstance(value, dict) else [value])):
            raise UserError(f"{folder / 'config.json'}: {name} is {value!r}, code that transformers would download and run; take it out, and set `attn_implementation` yourself")
    if (file := config.get("transformers_weights")) is not None and not (isinstance(file, str) and Path(file).name == file and file.endswith((".safetensors", ".safetensors.index.json"))):
        raise UserError(f"{folder / 'config.json'}: transformers_weights names {file!r}, expected a *.safetensors file of this folder; correct it or take it out")
    _check_adapter(folder, settings.get(ADAPTER))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        UserError: it is no JSON object, nested without end, or far larger than such a file is.
    """
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise UserError(f"{file} has {size / 2**20:.0f} MiB; a file of settings has a few: look at what it is")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: cannot be read as a JSON object ({str(error)[:100]}); get it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object, found a {type(found).__name__}; get it again")
    return found


def _refuse_pickled_weights(folder: Path) -> None:
    """Raise where there are weights, and none of them in safetensors."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = [name for name in PICKLED if (folder / name).exists()]
    if pickled:
        raise UserError(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when it is opened; expected *.safetensors. If you trust where it comes "
            "from, convert it once: load it with transformers there and save_pretrained it again, which writes safetensors"
        )


def _refuse_shards_elsewhere(folder: Path, index: dict[str, Any] | None) -> None:
    if index is None:
        return
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{folder / INDEX}: expected weight_map, the file of every tensor; get the file again")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names the shard {name!r}; expected *.safetensors files of the same folder: get the folder again, from who made it")


def _check_adapter(folder: Path, config: dict[str, Any] | None) -> None:
    if config is None:
        return
    where = folder / ADAPTER
    kind = str(config.get("peft_type"))
    if kind not in ADAPTERS:
        raise UserError(f"{where}: an adapter of type {kind}; expected one of those that are trained and loaded here: {', '.join(ADAPTERS)}")
    for key in SOFT_REFUSED:
        if config.get(key) not in (None, "RANDOM"):  # a tokenizer may bring code of its own, and the trained vectors need none
            raise UserError(f"{where}: {key} is {config[key]!r}, with which peft opens a tokenizer that the adapter names; trained vectors lie in the weights: set prompt_tuning_init to RANDOM and the tokenizer's keys to null")
    if (mapping := config.get("auto_mapping")) and not (isinstance(mapping, dict) and str(mapping.get("parent_library")).startswith("transformers.models.")):  # peft's own, without a task_type
        raise UserError(f"{where}: auto_mapping is {mapping!r}, with which peft imports a package that the adapter names; a trained adapter needs none: set it to null")
    for key in ("megatron_config", "corda_config", "eva_config", "loftq_config", "lora_ga_config"):
        if config.get(key):
            raise UserError(f"{where}: {key} is set, with which peft imports packages or opens files that the adapter names; a trained adapter needs none: set it to null")
    for key in ("init_lora_weights",):
        if config.get(key) not in (True, False, None, "gaussian", "orthogonal"):  # which draw numbers and nothing else
            raise UserError(f"{where}: {key} is {config[key]!r}, which changes the base's weights or opens files before the adapter is loaded; a trained adapter needs none: set it to true")
    if (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder} holds its adapter as adapter_model.bin, a pickle, which can run code when it is opened; expected adapter_model.safetensors")


def _named(config: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting of these names that is set, in the configs inside a config too."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in names and value is not None:
            yield key, value
        elif isinstance(value, dict):
            yield from _named(value, names)
