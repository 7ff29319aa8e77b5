"""A model from outside becomes a checkpoint that any stage can start from: what the contract asks for is found out and recorded.

Every tensor is copied byte by byte, into files as this registry lays them out (stages/shards.py), so that children share what they leave alone.
Written anew are the tokenizer (with a pad token that is no EOS and its chat template), config.json (without
`auto_map`, which would name code) and the generation config. Code, pickles and whatever else lies in the folder stay behind.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from stages.foreign import check_folder, read_json
from stages.registry.finite import read_header
from stages.registry.manifest import Checkpoint, Parent
from stages.registry.names import check_name
from stages.registry.regrouping import regroup

if TYPE_CHECKING:
    from stages.models import Origin
    from stages.registry.registry import Registry

STAGES = ("sft", "reward", "dpo", "ppo")
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SOFT = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
BASE = "base"  # in a folder with a soft prompt: the weights under it (stages/soft/folder.py)
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]


@dataclass(frozen=True)
class Source:
    """Where the files lie, and where they came from. revision: the commit on the hub, None for a folder."""

    asked: str
    folder: Path
    revision: str | None = None


@dataclass
class Found:
    """What was found out about a model from outside."""

    weights: list[str]  # file names
    config: dict[str, Any]  # of config.json or adapter_config.json
    tensors: dict[str, list[int]]  # name -> shape, of all weights
    tokens: Any = None  # stages.tokens.ModelTokens
    stage_info: dict[str, Any] = field(default_factory=dict)
    parents: list[Parent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base_folder: str = ""  # of an adapter: what peft is given
    grown: bool = False  # whether the embeddings must grow for a new pad token
    under: tuple[Source, Found, bool] | None = None  # of a soft prompt that brings the weights under it: these, and whether they are an adapter


def import_model(
    registry: Registry, asked: str, family: str, *, base: str | None = None, template: str = "auto", revision: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Checkpoint:  # fmt: skip
    """Publish a Hugging Face folder or a model of the hub as STAGE/NAME.

    base: what an adapter was trained on (a registry reference, a folder or a hub name); its adapter_config.json says it otherwise. template: as in a
    stage's config. revision: branch, tag or commit on the hub. `say` is told what had to be mended. Raises UserError.
    """
    stage, name = _names(family)
    source = locate(asked, revision)
    adapter = (source.folder / ADAPTER).is_file()
    found = _look(source, adapter)
    _check_kind(found, stage, adapter, asked)
    if adapter and found.config["peft_type"] in SOFT and (source.folder / BASE).is_dir():
        _add_under(found, source, registry, base, stage, template)
    elif adapter:
        _add_base(found, source, registry, base, stage, template)
    elif base is not None:
        raise UserError(f"--base: {asked} holds whole weights, no adapter; leave it out")
    else:
        _add_tokens(found, source, template)
    if stage == "reward":
        found.stage_info |= {"score_position": "last_token", "head": "score", "mean": 0.0, "std": 1.0, "n": 0, "calibrated": False}
        found.notes.append("its scores on demonstrations are not known: mean 0 and standard deviation 1 are recorded, so PPO centres by nothing")
    for note in found.notes:
        say(note)
    parent = Parent("imported_from", source=asked) if source.revision else Parent.external(source.folder, "imported_from")
    facts = {"kind": "hub" if source.revision else "folder", "name": asked if source.revision else source.folder.name, "revision": source.revision}
    info = {"source": facts, "licence": licence_of(source.folder), "tokenizer": found.tokens.facts, "stage_info": found.stage_info, "notes": found.notes}
    need = sum((source.folder / file).stat().st_size for file in found.weights)
    return registry.publish(stage, name, lambda folder: _write(folder, source, found, adapter), parents=[parent, *found.parents], info=info, need_bytes=need)


def _names(family: str) -> tuple[str, str]:
    stage, slash, name = family.partition("/")
    if not slash or stage not in STAGES:
        raise UserError(f"--as {family}: expected STAGE/NAME with one of the stages {', '.join(STAGES)}, such as sft/base: the stage says what the model can be used for")
    return stage, check_name(name, "--as: name")


def locate(asked: str, revision: str | None = None) -> Source:
    """The folder of a model: itself, or a download from the hub. Raises UserError."""
    folder = Path(asked).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"--revision goes with a name on the hub; {asked} is a folder")
        return Source(asked, folder.absolute())
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", asked) or ".." in asked:
        raise UserError(f"{asked}: no such folder, and no name on the hub (org/model)")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(asked, revision=revision, allow_patterns=DOWNLOADED))
    except Exception as error:  # which client the hub's library uses changes
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{asked} can't be had from the hub: {first} (without network: download it elsewhere with `hf download`, then import the folder)") from None
    return Source(asked, found, found.name)


def _look(source: Source, adapter: bool) -> Found:
    """The weights and what their headers and config say. Raises UserError."""
    folder = source.folder
    if not adapter and not (folder / "config.json").is_file():
        raise UserError(f"{source.asked} holds neither config.json nor {ADAPTER}; expected a Hugging Face model folder, as save_pretrained writes it")
    weights = _adapter_weights(source) if adapter else _whole_weights(source)
    tensors: dict[str, list[int]] = {}
    for file in weights:
        path = _inside(folder, file, source)
        tensors |= {name: entry["shape"] for name, entry in read_header(path)[0].items() if name != "__metadata__"}
    missing = set(_indexed(folder, source)) - tensors.keys() if not adapter else set()
    if missing:
        raise UserError(f"{folder / INDEX} names {len(missing)} tensors that no file holds, such as {min(missing)!r}; get the weights again")
    check_folder(folder)
    return Found(weights, read_json(folder / (ADAPTER if adapter else "config.json")), tensors)


def _adapter_weights(source: Source) -> list[str]:
    if not (source.folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{source.asked}: an adapter without {ADAPTER_WEIGHTS}. {_remedy(source)}")
    return [ADAPTER_WEIGHTS]


def _whole_weights(source: Source) -> list[str]:
    indexed = _indexed(source.folder, source)
    if indexed:
        return sorted(set(indexed.values()))
    if (source.folder / WEIGHTS).is_file():
        return [WEIGHTS]
    raise UserError(f"{source.asked} holds no {WEIGHTS} and no {INDEX}. {_remedy(source)}")


def _remedy(source: Source) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in source.folder.glob(pattern))
    if not pickles:
        return "Get the weights (*.safetensors) too"
    return (
        f"Its weights are pickles ({', '.join(pickles[:3])}), which can run code when they are opened and are never opened here. Take a revision with safetensors, or, "
        "if you trust whoever made them, convert them in a container without secrets: "
        "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('FOLDER').save_pretrained('CONVERTED')\""
    )


def _indexed(folder: Path, source: Source) -> dict[str, str]:
    """Tensor -> file, of a model in several files; {} without an index."""
    if not (folder / INDEX).is_file():
        return {}
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) and re.fullmatch(r"[\w][\w.-]*\.safetensors", file) for file in index.values()):
        raise UserError(f"{folder / INDEX}: weight_map must give a file name (*.safetensors, in this folder) for every tensor; get it again")
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            raise UserError(f"{source.asked}: {INDEX} names {file}, which is not there; get the weights again")
    return index


def _inside(folder: Path, name: str, source: Source) -> Path:
    """A file of the folder, or, in a download, of the cache that its links point into."""
    home = folder.resolve()  # which may be a link to a download itself
    real, allowed = (folder / name).resolve(), [home]
    if home.parent.name == "snapshots":
        allowed.append((home.parent.parent / "blobs").resolve())
    if not real.is_file() or not any(real.is_relative_to(place) for place in allowed):
        raise UserError(f"{source.asked}: {name} is a link out of its folder, to {real}; copy the file there instead")
    return real


def _check_kind(found: Found, stage: str, adapter: bool, asked: str) -> None:
    """The model is what the stage's name promises. Raises UserError."""
    if adapter:
        if found.config.get("peft_type") not in ("LORA", *SOFT):
            raise UserError(f"{asked} is an adapter of type {found.config.get('peft_type')}; only LORA adapters and soft prompts ({', '.join(SOFT)}) are read here")
        scores = any(re.search(r"(^|\.)score\.weight$", name) for name in found.tensors)
        kind = "ForSequenceClassification" if found.config.get("task_type") == "SEQ_CLS" else "ForCausalLM"
    else:
        scores = "score.weight" in found.tensors
        architecture = str(next(iter(found.config.get("architectures") or []), "ForSequenceClassification" if scores else "ForCausalLM"))
        kind = next((kind for kind in ("ForCausalLM", "ForSequenceClassification") if architecture.endswith(kind)), architecture)
        if kind == architecture:
            raise UserError(f"{asked} is a {architecture}; a stage can start from a …ForCausalLM, and a reward model is a …ForSequenceClassification with one label")
    if (kind == "ForSequenceClassification") != (stage == "reward"):
        fits = "reward" if kind == "ForSequenceClassification" else "sft (or dpo, ppo)"
        raise UserError(f"{asked} is a …{kind}: it can't be a checkpoint of stage {stage}; import it as {fits}/NAME")
    if stage == "reward":
        shape = next((shape for name, shape in found.tensors.items() if re.search(r"(^|\.)score\.weight$", name)), None)
        if not scores or shape is None or shape[0] != 1:
            told = f"a head `score` with {shape[0]} outputs" if shape else "no head named `score`"
            raise UserError(f"{asked} has {told}; a reward model here reads one score from a linear head `score` [1, d]")


def _add_tokens(found: Found, source: Source, template: str) -> None:
    from stages.models import Origin

    found.tokens = _tokens(Origin(str(source.folder), None, None), template)
    found.notes += found.tokens.notes
    rows = found.config.get("vocab_size")
    if isinstance(rows, int) and len(found.tokens.tokenizer) > rows:
        found.grown = True
        found.notes.append(f"the embeddings grow from {rows} to {len(found.tokens.tokenizer)} rows for the new pad token")


def _tokens(origin: Origin, template: str, base: Origin | None = None) -> Any:
    """What load_tokens will find in the published folder: written and read again, a tokenizer may differ from the one in the folder it came from."""
    from stages.models import Origin
    from stages.tokens import load_tokens, tokenizer_digest

    tokens = load_tokens(origin, template, base)
    with tempfile.TemporaryDirectory() as folder:
        tokens.tokenizer.save_pretrained(folder)
        from stages.models import load_tokenizer

        again = load_tokenizer(Origin(folder, None, None))
    if tokenizer_digest(again) != tokens.facts["digest"]:
        raise UserError(f"{origin.asked}: its tokenizer is another one after it was saved and read again, so stages could not trust it; save it with this version of transformers first")
    return tokens


def _add_base(found: Found, source: Source, registry: Registry, base: str | None, stage: str, template: str) -> None:
    """What lies under an adapter, and whose tokenizer it speaks."""
    from stages import models

    asked = base or str(found.config.get("base_model_name_or_path") or "")
    if not asked:
        raise UserError(f"{source.asked}: {ADAPTER} names no base model; give it with --base (a registry reference, a folder or a hub name)")
    try:
        origin = models.find(asked, registry.root)
    except UserError as error:
        raise UserError(f"{source.asked} is an adapter on {asked}: {error}. Give the base with --base (a registry reference, a folder or a hub name)") from None
    own = any(source.folder.glob("tokenizer*"))
    if origin.checkpoint is not None:
        theirs = origin.checkpoint.info("tokenizer")
        mine = _tokens(models.Origin(str(source.folder), None, None), template, origin) if own else None
        if mine is not None and (mine.facts["digest"], mine.facts["template_digest"]) != (theirs["digest"], theirs["template_digest"]):
            found.notes.append(f"its tokenizer or template is not that of {origin.checkpoint.ref}")
        found.tokens = mine or _tokens(origin, "auto")
    else:
        found.tokens = _tokens(models.Origin(str(source.folder), None, None) if own else origin, template, origin)
    found.notes += found.tokens.notes
    _check_fits(found, origin, source)
    embedded = [shape[0] for name, shape in found.tensors.items() if re.search(r"embed_tokens|wte|lm_head", name) and len(shape) == 2 and "lora" not in name]
    vocabulary = max(embedded, default=None) or len(found.tokens.tokenizer)
    found.stage_info["adapter"] = models.adapter_facts(origin) | {"vocabulary": vocabulary}
    found.base_folder = origin.folder
    found.parents.append(origin.parent("base"))


def _add_under(found: Found, source: Source, registry: Registry, base: str | None, stage: str, template: str) -> None:
    """The weights that a soft prompt brings along, whole or an adapter, and whose tokenizer they speak: that of the prompt's folder."""
    from stages import models

    place = Source(source.asked, source.folder / BASE, source.revision)
    adapter = (place.folder / ADAPTER).is_file()
    inner = _look(place, adapter)
    _check_kind(inner, stage, adapter, f"{source.asked}/{BASE}")
    if adapter:
        _add_base(inner, place, registry, base, stage, template)
    elif base is not None:
        raise UserError(f"--base: {source.asked} brings the weights under its soft prompt, in {BASE}; leave it out")
    top = models.Origin(str(source.folder), None, None)
    found.tokens = inner.tokens = _tokens(top, template, models.Origin(inner.base_folder or str(place.folder), None, None))
    rows = inner.config.get("vocab_size")
    if isinstance(rows, int) and len(found.tokens.tokenizer) > rows:
        raise UserError(f"{source.asked}: its tokenizer has {len(found.tokens.tokenizer)} tokens and the model in {BASE} {rows}; save both with one pad token that is no EOS first")
    found.stage_info |= inner.stage_info
    found.parents += inner.parents
    found.notes += found.tokens.notes
    found.base_folder, found.under = f"./{BASE}", (place, inner, adapter)


def _check_fits(found: Found, base: Origin, source: Source) -> None:
    """Every layer that the adapter changes exists in its base with that width. Raises UserError."""
    from stages import models

    if models.is_adapter(base) or not Path(base.folder).is_dir():
        return  # what loads them merges first, and compares then
    shapes = _look(Source(base.asked, Path(base.folder)), adapter=False).tensors
    for name, shape in found.tensors.items():
        layer = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name)
        if layer is None:
            continue
        there = shapes.get(f"{layer.group(1)}.weight")
        if there is None or there[-1] != shape[-1]:
            told = "does not have" if there is None else f"has with {there[-1]} inputs, not {shape[-1]}"
            raise UserError(f"{source.asked} changes the layer {layer.group(1)}, which {base.asked} {told}: it was trained on another base; give that one with --base")


def _write(folder: Path, source: Source, found: Found, adapter: bool) -> None:
    """Fill the model folder."""
    tokens = found.tokens
    if found.grown:
        _write_grown(folder, source, found)
    elif adapter or not regroup([_inside(source.folder, file, source) for file in found.weights], folder):
        for file in found.weights:
            shutil.copyfile(_inside(source.folder, file, source), folder / file)
        if (source.folder / INDEX).is_file() and not adapter:
            shutil.copyfile(_inside(source.folder, INDEX, source), folder / INDEX)
    config = {key: value for key, value in found.config.items() if key != "auto_map"}
    if adapter:
        _dump(folder / ADAPTER, config | {"base_model_name_or_path": found.base_folder})
    elif not found.grown:
        _dump(folder / "config.json", config | {"pad_token_id": tokens.pad_id})
        eos = tokens.eos_ids
        _dump(folder / "generation_config.json", {"bos_token_id": tokens.tokenizer.bos_token_id, "eos_token_id": eos if len(eos) > 1 else eos[0], "pad_token_id": tokens.pad_id})
    tokens.tokenizer.save_pretrained(folder)
    if found.under is not None:
        (folder / BASE).mkdir()
        _write(folder / BASE, *found.under)


def _write_grown(folder: Path, source: Source, found: Found) -> None:
    """The model with larger embeddings, in the precision of its file."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from stages import models

    scorer = "score.weight" in found.tensors
    cls, extra = (AutoModelForSequenceClassification, {"num_labels": 1}) if scorer else (AutoModelForCausalLM, {})
    model = models.from_pretrained(cls, str(source.folder), dtype="auto", **extra)
    models.resize_to(model, len(found.tokens.tokenizer))
    models.save_model(model, found.tokens.tokenizer, folder, eos_ids=found.tokens.eos_ids, like=models.Origin(str(source.folder), None, None))


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def licence_of(folder: Path) -> str | None:
    """The licence that a model's card names in its first lines (`license: apache-2.0`); None when it names none."""
    try:
        with open(folder / "README.md", encoding="utf-8") as card:
            lines: Iterable[str] = [card.readline(500) for _ in range(60)]
    except (OSError, UnicodeDecodeError):
        return None
    found = next((match for line in lines if (match := re.fullmatch(r"license:\s*([\w.-]{1,64})\s*", line))), None)
    return found.group(1) if found else None
