"""A soft prompt on disk: a peft folder as `PeftModel.from_pretrained` reads it. What lies under it is another checkpoint, or (of a model that was
trained on under its prompt) the folder `base` in it, whole weights or an adapter.

`AutoModelForCausalLM.from_pretrained` of such a folder fails, as transformers has no soft prompts: it never gives the model without its prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from configs.errors import UserError
from stages import foreign
from stages.soft.prompt import Shape, SoftPrompt, of, put_at
from stages.zero import gather

if TYPE_CHECKING:
    from stages.models import Origin

KINDS = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix_tuning"}  # peft's name -> ours
BASE = "base"  # in a folder with a prompt: the weights under it
ENCODER = "prompt_encoder.safetensors"  # in resumable saves: all that is trained
VECTORS, FILE = "prompt_embeddings", "adapter_model.safetensors"  # peft's names


def is_prompt(origin: Origin) -> bool:
    """Whether a model folder holds a soft prompt."""
    return _settings(Path(origin.folder)) is not None


def method_of(origin: Origin) -> str:
    """prompt_tuning, p_tuning or prefix_tuning: of an origin that has a prompt."""
    settings = _settings(Path(origin.folder))
    assert settings is not None, origin.folder
    return KINDS[str(settings["peft_type"]).upper()]


def virtual_tokens(folder: Path | str) -> int:
    """The positions that a folder's own prompt takes from the text; 0 of whole weights and of other adapters."""
    settings = _settings(Path(folder))
    return _shape(Path(folder), settings).length if settings is not None else 0


def beneath(origin: Origin) -> Origin:
    """What lies under the prompt of a model, whole weights or an adapter; the origin itself where it has no prompt."""
    from stages.models import adapter_base

    return adapter_base(origin) if is_prompt(origin) else origin


def same_prompt(one: Origin, other: Origin) -> bool:
    """Whether two models have the same prompt in front, or neither has one."""
    folders = [Path(origin.folder) for origin in (one, other)]
    settings = [_settings(folder) for folder in folders]
    if None in settings:
        return settings == [None, None]
    shapes = [_shape(folder, found) for folder, found in zip(folders, settings, strict=True) if found is not None]
    return shapes[0] == shapes[1] and torch.equal(*(_tensors(folder)[VECTORS] for folder in folders))


def attach(model: Any, folder: Path | str) -> Any:
    """Put the prompt of a folder in front of a model, frozen; returns the model.

    Raises:
        UserError: a folder that is not what peft writes, a prompt of another model's width, or a model that has a prompt already.
    """
    shape, vectors, settings = opened(model, folder)
    prompt = SoftPrompt(shape, vectors.float().to(model.get_input_embeddings().weight.device))
    prompt.settings = settings
    put_at(model, prompt)
    return model


def opened(model: Any, folder: Path | str) -> tuple[Shape, torch.Tensor, dict[str, Any]]:
    """The prompt of a folder for a model: what it is, its numbers [n, columns], and adapter_config.json. Embeddings that had grown with it are put into the model.

    Raises:
        UserError: as `attach`.
    """
    folder = Path(folder)
    foreign.check_folder(folder)
    settings = _settings(folder)
    assert settings is not None, folder
    shape, tensors = _shape(folder, settings), _tensors(folder)
    vectors = tensors.pop(VECTORS)
    embeddings = model.get_input_embeddings().weight
    if not shape.is_prefix and shape.width != gather.shape(embeddings)[1]:
        raise UserError(f"{folder}: a soft prompt of width {shape.width}, and {type(model).__name__} has embeddings of width {gather.shape(embeddings)[1]}: it was trained on another model")
    _load_grown(model, tensors, folder)
    return shape, vectors, settings


def put_aside(model: Any, folder: Path) -> Path:
    """Write the frozen prompt of a model to its folder, and return where the weights under it belong; the folder itself where there is none."""
    prompt = of(model)
    if prompt is None or prompt.encode is not None:
        return folder
    from safetensors.torch import save_file

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = getattr(inner, "score", None)
    task = "SEQ_CLS" if head is not None else "CAUSAL_LM"
    settings = prompt.settings | {"task_type": task, "inference_mode": True, "base_model_name_or_path": f"./{BASE}", "auto_mapping": None}
    weights = folder / BASE
    weights.mkdir(parents=True, exist_ok=True)
    (folder / foreign.ADAPTER).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {VECTORS: prompt.numbers()}
    if head is not None:  # which peft wants beside the prompt of a classifier
        head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
        tensors |= {f"base_model.score.{name}": value for name, value in head.state_dict().items()}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / FILE, metadata={"format": "pt"})
    return weights


@torch.no_grad()
def described(model: Any) -> dict[str, Any]:
    """What a manifest records of a model's prompt: stage_info["soft_prompt"]; {} where it has none."""
    prompt = of(model)
    if prompt is None:
        return {}
    numbers = prompt.numbers().detach().cpu().contiguous()
    return {"soft_prompt": {"method": prompt.shape.method, "virtual_tokens": prompt.shape.length, "digest": blake3(numbers.numpy().tobytes()).hexdigest()}}


def _settings(folder: Path) -> dict[str, Any] | None:
    """adapter_config.json of a folder with a prompt; None of any other."""
    if not (folder / foreign.ADAPTER).is_file():
        return None
    found = foreign.read_json(folder / foreign.ADAPTER)
    return found if str(found.get("peft_type")).upper() in KINDS else None


def _shape(folder: Path, settings: dict[str, Any]) -> Shape:
    method = KINDS[str(settings["peft_type"]).upper()]
    names = ("num_virtual_tokens", "token_dim", *(("num_layers", "num_attention_heads") if method == "prefix_tuning" else ()))
    numbers = [settings.get(name) for name in names]
    if not all(isinstance(number, int) and 0 < number < 2**20 for number in numbers) or settings.get("num_transformer_submodules") not in (1, None):
        told = ", ".join(f"{name} {settings.get(name)!r}" for name in (*names, "num_transformer_submodules"))
        raise UserError(f"{folder / foreign.ADAPTER}: not what peft writes for the soft prompt of a causal language model ({told}); get the folder again")
    return Shape(method, *numbers)  # type: ignore[arg-type]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The prompt [n, columns] under VECTORS, and embeddings that had grown, by their names in the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _settings(folder)
    assert settings is not None, folder
    shape = _shape(folder, settings)
    try:
        found = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error}); get the folder again") from None
    vectors = found.get(VECTORS)
    if vectors is None or tuple(vectors.shape) != (shape.length, shape.columns):
        told = "holds none" if vectors is None else f"holds {list(vectors.shape)} numbers"
        raise UserError(f"{folder / FILE}: expected a soft prompt {VECTORS} [{shape.length}, {shape.columns}] as {foreign.ADAPTER} says, and it {told}; get the folder again")
    return found


def _load_grown(model: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Embeddings that peft saved with the prompt because a pad token had made them grow."""
    if not tensors:
        return
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None) if layer is not None]
    with gather.whole([p for layer in layers for p in layer.parameters()], changed=True):
        places = model.state_dict()
        for key, tensor in tensors.items():
            place = places.get(key.removeprefix("base_model."))
            if place is None and "lm_head" in key:
                continue  # a classifier has no use for it
            if place is None or place.shape != tensor.shape:
                raise UserError(f"{folder / FILE}: holds {key} {list(tensor.shape)}, which {type(model).__name__} has no place for; it was trained on another model")
            place.copy_(tensor)
