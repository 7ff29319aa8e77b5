"""Attacks by model folders, by names that lead elsewhere, and by registries of others."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import UserError
from tests.security.attack import HARMLESS, REFUSED, Attack, Place

AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.EvilTokenizer", None]}


def policy(place: Place, folder: Path) -> None:
    """What a stage does with `init_from`."""
    from stages import models

    origin = models.find(str(folder), place.folder / "registry")
    models.verify(origin)
    models.load_tokenizer(origin)
    models.load_policy(origin)


def with_weights(name: str, *, beside: bool) -> Callable[[Place], None]:
    """A folder whose weights are a pickle, alone or beside sound ones."""

    def run(place: Place) -> None:
        folder = place.model()
        place.torch_save(folder / name)
        if not beside:
            (folder / "model.safetensors").unlink()
        policy(place, folder)

    return run


def pickled_shards(place: Place) -> None:
    folder = place.model()
    place.torch_save(folder / "pytorch_model-00001-of-00001.bin")
    place.settings(folder / "pytorch_model.bin.index.json", metadata={}, weight_map={"lm_head.weight": "pytorch_model-00001-of-00001.bin"})
    (folder / "model.safetensors").unlink()
    policy(place, folder)


def config_key(**values: Any) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        folder = place.model(**values)
        (folder / "evil.py").write_text(place.code)
        place.torch_save(folder / "adapter_model.bin")
        policy(place, folder)

    return run


def shard_named(name: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        folder = place.model()
        (folder / "model.safetensors").rename(place.folder / "secret.safetensors")
        target = name.replace("HERE", str(place.folder))
        place.settings(folder / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": target})
        policy(place, folder)

    return run


def adapter(beside: bool = True, weights: str = "adapter_model.safetensors", **config: Any) -> Callable[[Place], None]:
    """A LoRA adapter folder on the sound model, changed."""

    def run(place: Place) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        folder = place.folder / "adapter"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(place.sound), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.save_pretrained(folder)
        for file in place.sound.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "evil.py").write_text(place.code)
        place.torch_save(folder / weights) if weights.endswith(".bin") else None
        place.torch_save(folder / "cache.pt")
        if not beside:
            (folder / "adapter_model.safetensors").unlink()
        values = json.loads(json.dumps(config).replace("HERE", str(folder)))
        place.settings(folder / "adapter_config.json", base_model_name_or_path=str(place.sound), **values)
        policy(place, folder)

    return run


def own_code(file: str, **values: Any) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        folder = place.model()
        place.settings(folder / file, **values)
        (folder / "evil.py").write_text(place.code + "class EvilConfig: pass\nclass Evil: pass\nclass EvilTokenizer: pass\n")
        policy(place, folder)

    return run


def own_code_of_generation(place: Place) -> None:
    folder = place.model()
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(place.code + "def generate(*a, **k): pass\n")
    place.settings(folder / "generation_config.json", custom_generate=str(folder))
    policy(place, folder)


def asked_on_the_terminal(place: Place) -> None:
    """transformers asks whether to run the code, and takes y for an answer; here somebody's pipe says y."""
    import io
    import sys

    from launch.data_cli import load_formatter

    folder = place.model()
    place.settings(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)
    place.settings(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=AUTO_MAP)
    (folder / "evil.py").write_text(place.code + "class EvilConfig: pass\nclass EvilTokenizer: pass\n")
    before, sys.stdin = sys.stdin, io.StringIO("y\n" * 9)
    try:
        load_formatter(str(folder), "auto")
    finally:
        sys.stdin = before


def planned(place: Place) -> None:
    from launch.plan.sources import read_config

    folder = place.model(model_type="evil", auto_map=AUTO_MAP)
    (folder / "evil.py").write_text(place.code + "class EvilConfig: pass\n")
    read_config(str(folder))


def header(content: bytes | None = None, length: int | None = None) -> Callable[[Place], None]:
    """A safetensors file with a header of the attacker's."""

    def run(place: Place) -> None:
        folder = place.model()
        text = content or b"{}"
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length if length is not None else len(text)) + text + b"\0" * 64)
        policy(place, folder)

    return run


def tensors(**entries: tuple[int, int]) -> bytes:
    return json.dumps({name: {"dtype": "F32", "shape": [max(0, (end - begin) // 4)], "data_offsets": [begin, end]} for name, (begin, end) in entries.items()}).encode()


def settings_without_end(file: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        folder = place.model()
        (folder / file).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        policy(place, folder)

    return run


def named(call: Callable[[Any, Place], Any]) -> Callable[[Place], None]:
    """Something with a name that leads out of the registry."""

    def run(place: Place) -> None:
        from stages.registry import Registry

        registry = Registry(place.folder / "root" / "registry")
        registry.publish("sft", "demo", lambda folder: copied(place.sound, folder))
        before = sorted(path for path in place.folder.rglob("*") if "registry" not in path.parts)
        try:
            call(registry, place)
        finally:
            assert before == sorted(path for path in place.folder.rglob("*") if "registry" not in path.parts), "something was written outside"

    return run


def copied(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def hostile_manifest(**changes: Any) -> Callable[[Place], None]:
    """A registry of somebody else's: its manifests carry right hashes, for whoever writes them can compute those."""

    def run(place: Place) -> None:
        from stages.registry import Registry
        from stages.registry.sealing import seal

        registry = Registry(place.folder / "registry")
        checkpoint = registry.publish("sft", "demo", lambda folder: copied(place.sound, folder))
        body = {key: value for key, value in checkpoint.manifest.items() if key != "hash"} | changes
        (checkpoint.path / "manifest.json").write_bytes(seal(body))
        Registry(registry.root).list()
        Registry(registry.root).resolve(checkpoint.id, deep=True)

    return run


def manifest_without_end(place: Place) -> None:
    from stages.registry import Registry

    registry = Registry(place.folder / "registry")
    checkpoint = registry.publish("sft", "demo", lambda folder: copied(place.sound, folder))
    (checkpoint.path / "manifest.json").write_text("[" * 200_000)
    Registry(registry.root).list()
    Registry(registry.root).resolve(checkpoint.id)


def file_becomes_a_link(place: Place) -> None:
    from stages.registry import Registry

    registry = Registry(place.folder / "registry")
    checkpoint = registry.publish("sft", "demo", lambda folder: copied(place.sound, folder))
    weights = checkpoint.model_dir / "model.safetensors"
    weights.rename(place.folder / "moved")
    weights.symlink_to(place.folder / "moved")
    registry.resolve("sft/demo", deep=True)


def published_link(place: Place) -> None:
    from stages.registry import Registry

    secret = place.write("secret.txt", "secret")

    def write(folder: Path) -> None:
        copied(place.sound, folder)
        (folder / "notes.txt").symlink_to(secret)

    Registry(place.folder / "registry").publish("sft", "demo", write)


def claim_elsewhere(place: Place) -> None:
    """A version's claim that names a folder outside."""
    from stages.registry import Registry
    from stages.registry.sealing import seal

    registry = Registry(place.folder / "registry")
    registry.publish("sft", "demo", lambda folder: copied(place.sound, folder))
    (place.folder / "evil").mkdir()
    (registry.root / "versions" / "sft" / "demo" / "00000007.json").write_bytes(seal({"id": "../../evil"}))
    registry.resolve("sft/demo@7")


def open_to_all(place: Place) -> None:
    """A registry that every user may write to is told of, by name."""
    import contextlib
    import io

    from stages.registry import Registry

    root = place.folder / "registry"
    Registry(root).publish("sft", "demo", lambda folder: copied(place.sound, folder))
    (root / "checkpoints").chmod(0o777)
    from stages.registry.layout import warn_where_anyone_writes

    warn_where_anyone_writes.cache_clear()
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        Registry(root).resolve("sft/demo")
    assert "every user of this machine" in told.getvalue()
    raise UserError(told.getvalue())


def found(asked: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from stages import models

        models.from_pretrained(__import__("transformers").AutoConfig, models.find(asked, place.folder / "registry").folder)

    return run


def data_of_hub(name: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from configs.schema.common import Source
        from stages.data import read_demonstrations

        place.write("set/set.py", place.code)
        place.write("set/rows.jsonl", '{"prompt": "a", "completion": "b"}\n')
        read_demonstrations([Source(path="hf:" + name.replace("HERE", str(place.folder)))])

    return run


def publish_as(stage: str, name: str) -> Callable[[Any, Place], Any]:
    return lambda registry, place: registry.publish(stage, name, lambda folder: copied(place.sound, folder))


ATTACKS = [
    Attack("manifest lists model/../../x", "a registry of somebody else's", REFUSED, hostile_manifest(files={"model/../../../x": {"size": 1, "blake3": "0"}}), "damaged"),
    *(Attack(f"weights: {name}", "init_from: a model folder", REFUSED, with_weights(name, beside=False), "a pickle") for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth")),
    Attack("weights: sharded pickles", "init_from: a model folder", REFUSED, pickled_shards, "a pickle"),
    Attack("pickle beside safetensors", "init_from: a model folder", HARMLESS, with_weights("pytorch_model.bin", beside=True)),
    Attack("transformers_weights: adapter_model.bin", "config.json", REFUSED, config_key(transformers_weights="adapter_model.bin"), "transformers_weights"),
    Attack("transformers_weights: ../x", "config.json", REFUSED, config_key(transformers_weights="../secret.safetensors"), "transformers_weights"),
    Attack("attn_implementation of a hub", "config.json (code is downloaded)", REFUSED, config_key(attn_implementation="evil/kernel"), "download and run"),
    Attack("experts_implementation of a hub", "config.json (code is downloaded)", REFUSED, config_key(text_config={"experts_implementation": "evil/kernel"}), "download and run"),
    *(Attack(f"shard {name}", "model.safetensors.index.json", REFUSED, shard_named(name), "shard") for name in ("../secret.safetensors", "HERE/secret.safetensors", "a/../../secret.safetensors")),
    Attack("adapter_model.bin alone", "a LoRA folder", REFUSED, adapter(beside=False, weights="adapter_model.bin"), "a pickle"),
    Attack("adapter_model.bin beside safetensors", "a LoRA folder", HARMLESS, adapter(weights="adapter_model.bin")),
    Attack("prompt tuning with code", "adapter_config.json (its tokenizer's code)", REFUSED, adapter(peft_type="PROMPT_TUNING", prompt_tuning_init="TEXT", tokenizer_name_or_path="HERE", tokenizer_kwargs={"trust_remote_code": True}), "prompt_tuning_init"),
    Attack("prompt tuning, a tokenizer of its own", "adapter_config.json (a tokenizer is opened)", REFUSED, adapter(peft_type="PROMPT_TUNING", prompt_tuning_init="RANDOM", tokenizer_name_or_path="HERE"), "tokenizer_name_or_path"),
    Attack("p-tuning, settings of a tokenizer", "adapter_config.json (its tokenizer's code)", REFUSED, adapter(peft_type="P_TUNING", tokenizer_kwargs={"trust_remote_code": True}), "tokenizer_kwargs"),
    Attack("a kind of adapter that is not trained here", "adapter_config.json (other loaders)", REFUSED, adapter(peft_type="XLORA", adapters={"a": "HERE"}), "XLORA"),
    Attack("ia3 with auto_mapping", "adapter_config.json (a module is imported)", REFUSED, adapter(peft_type="IA3", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}), "auto_mapping"),
    Attack("ia3 as a pickle", "an adapter's folder", REFUSED, adapter(beside=False, weights="adapter_model.bin", peft_type="IA3"), "a pickle"),
    Attack("megatron_core", "adapter_config.json (a module is imported)", REFUSED, adapter(megatron_config={"a": 1}, megatron_core="evil"), "megatron_config"),
    Attack("auto_mapping", "adapter_config.json (a module is imported)", REFUSED, adapter(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}), "auto_mapping"),
    Attack("corda's cache", "adapter_config.json (a pickle is opened)", REFUSED, adapter(init_lora_weights="corda", corda_config={"cache_file": "HERE/cache.pt"}), "corda_config"),
    Attack("an initialisation that changes the base", "adapter_config.json", REFUSED, adapter(init_lora_weights="pissa"), "init_lora_weights"),
    Attack("auto_map, unknown architecture", "config.json", REFUSED, own_code("config.json", model_type="evil", architectures=["Evil"], auto_map=AUTO_MAP), "code"),
    Attack("auto_map, known architecture", "config.json", HARMLESS, own_code("config.json", auto_map=AUTO_MAP)),
    Attack("auto_map of a tokenizer", "tokenizer_config.json", HARMLESS, own_code("tokenizer_config.json", auto_map=AUTO_MAP)),
    Attack("auto_map of another repository", "config.json", REFUSED, own_code("config.json", model_type="evil", auto_map={"AutoConfig": "evil/repo--evil.EvilConfig"}), "code"),
    Attack("custom_generate", "a model folder's generate.py", HARMLESS, own_code_of_generation),
    Attack("yes on standard input", "align data show --tokenizer", REFUSED, asked_on_the_terminal),
    Attack("auto_map", "align plan", REFUSED, planned),
    Attack("header of 2^60 bytes", "model.safetensors", REFUSED, header(length=2**60), "safetensors"),
    Attack("header of 100 MB in a small file", "model.safetensors", REFUSED, header(length=10**8), "safetensors"),
    Attack("tensors that overlap", "model.safetensors", REFUSED, header(tensors(a=(0, 48), b=(16, 64)))),
    Attack("tensors beyond the file", "model.safetensors", REFUSED, header(tensors(a=(0, 2**40))), "safetensors"),
    Attack("negative offsets", "model.safetensors", REFUSED, header(tensors(a=(-64, 0), b=(0, 64)))),
    Attack("header without end", "model.safetensors", REFUSED, header(b"[" * 100_000), "safetensors"),
    *(Attack(f"{file} without end", "a model folder", REFUSED, settings_without_end(file)) for file in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")),
    *(Attack(f"publish as {stage}/{name}", "the registry", REFUSED, named(publish_as(stage, name)), "name") for stage, name in (("sft", "../../evil"), ("../..", "evil"), ("sft", "a/b"), ("sft", "/tmp/x"), ("sft", "a\nb"))),
    *(Attack(f"look up {ref}", "the registry", REFUSED, named(lambda registry, place, ref=ref: registry.resolve(ref))) for ref in ("sft/../../x", "sft/demo@../x", "../../registry", "20260101t000000-aaaaaaaaaaaa/../..", "sft/demo@best:../../x y")),
    Attack("alias ../../x", "the registry", REFUSED, named(lambda registry, place: registry.set_alias("sft/demo", "../../x", "sft/demo")), "name"),
    Attack("alias of ../..", "the registry", REFUSED, named(lambda registry, place: registry.set_alias("../../x", "a", "sft/demo")), "name"),
    Attack("manifest lists ../../x", "a registry of somebody else's", REFUSED, hostile_manifest(files={"../../../x": {"size": 1, "blake3": "0"}}), "damaged"),
    Attack("manifest is named ../../x", "a registry of somebody else's", REFUSED, hostile_manifest(name="../../x"), "no name"),
    Attack("manifest with an escape sequence for a stage", "a registry of somebody else's", REFUSED, hostile_manifest(stage="\x1b[2J"), "no name"),
    Attack("manifest of another checkpoint", "a registry of somebody else's", REFUSED, hostile_manifest(id="20260101t000000-aaaaaaaaaaaa"), "not the folder"),
    Attack("manifest with sizes as text", "a registry of somebody else's", REFUSED, hostile_manifest(files={"model/config.json": {"size": "1"}}), "sizes"),
    Attack("manifest without end", "a registry of somebody else's", REFUSED, manifest_without_end, "damaged"),
    Attack("published file becomes a link", "the registry", REFUSED, file_becomes_a_link, "plain file"),
    Attack("link among what is published", "the registry", REFUSED, published_link, "link"),
    Attack("version claimed for ../../evil", "the registry", REFUSED, claim_elsewhere),
    Attack("registry that everyone may write to", "the registry", REFUSED, open_to_all, "chmod o-w"),
    *(Attack(f"model {name}", "a hub name that is a path", REFUSED, found(name)) for name in ("../evil", "/etc/passwd", "~/x", "a/../../b", "foo/..", "..")),
    *(Attack(f"data hf:{name}", "a hub name that is a path", REFUSED, data_of_hub(name), "hf:OWNER/NAME") for name in ("HERE/set", "../set", "./set", "/etc", "a/../b", "a/b/c")),
]
