"""The kinds of bad input, as a table: what is wrong, the command that meets it, and what the one error message must say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.chain.bad_world import Case, World, flip, train, truncate

HERE = "tests.chain.bad_scorers"


def stage(name: str, *overrides: str, **changes: Any):
    """A case that is a stage's config with changes."""
    return lambda world: [name, "--config", world.config(name, **changes), *overrides]


def chain(*options: str, **changes: Any):
    """A case that is a chain file with changes."""
    return lambda world: ["run", world.config("chain", **changes), *options]


def evaluation(*options: str, **changes: Any):
    """A case that is an evaluation's config with changes."""
    return lambda world: ["eval", "--config", world.config("eval", **changes), *options]


def data(name: str, file: str, rows: list[Any], **changes: Any):
    """A case that is a stage on these rows."""
    return lambda world: [name, "--config", world.config(name, data=world.rows(file, rows), **changes)]


def scorer(function: str):
    """A case that is PPO with a function as its scorer."""
    return stage("ppo", scorers=[{"kind": "python", "function": f"{HERE}:{function}"}])


def text(name: str, content: str):
    """A case that is a config file with this text."""

    def arrange(world: World) -> list[str]:
        (world / f"{name}.yaml").write_text(content.format(folder=world.folder))
        return [name, "--config", str(world / f"{name}.yaml")]

    return arrange


def spoilt(spoil: Any, arrange: Any):
    """A case whose world is spoilt first."""

    def both(world: World) -> list[str]:
        spoil(world)
        return arrange(world)

    return both


def weights_of(which: str):
    return lambda world: getattr(world, which).model_dir / "model.safetensors"


def flipped(which: str):
    return lambda world: flip(weights_of(which)(world))


def deleted(which: str):
    return lambda world: weights_of(which)(world).unlink()


def template(content: str):
    """A template file in place of the model's own."""
    return spoilt(lambda world: (world / "odd.jinja").write_text(content), lambda world: stage("sft", template=str(world / "odd.jinja"))(world))


def edit_manifest(world: World) -> None:
    manifest = world.sft.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version":1', '"version":7'))


def other_tokenizer(world: World) -> Path:
    """A model like the base, with two ids exchanged."""
    import shutil

    shutil.copytree(world / "base", world / "other")
    file = world / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    return world / "other"


def pad_is_eos(world: World) -> None:
    """Publish sft/padded: a checkpoint (of another program, say) whose tokenizer pads with its EOS."""
    from transformers import AutoTokenizer

    from stages.tokens import tokenizer_digest

    tokenizer = AutoTokenizer.from_pretrained(world.sft.model_dir)
    tokenizer.pad_token = tokenizer.eos_token

    def write(folder: Path) -> None:
        for name in ("config.json", "model.safetensors", "generation_config.json"):
            (folder / name).write_bytes((world.sft.model_dir / name).read_bytes())
        tokenizer.save_pretrained(folder)

    facts = world.sft.info("tokenizer") | {"pad_id": tokenizer.eos_token_id, "digest": tokenizer_digest(tokenizer)}
    world.registry.publish("sft", "padded", write, info={"tokenizer": facts})


def poison_base(world: World) -> None:
    """Put a NaN into the base's weights."""
    from safetensors.torch import load_file, save_file

    file = world / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def adapter_then_other_base(world: World) -> list[str]:
    """Train sft/adapter on base, then change base."""
    train(world, "sft", name="adapter", lora={"rank": 2})
    flip(world / "base" / "model.safetensors")
    return stage("dpo", init_from="sft/adapter")(world)


def adapter_then_no_base(world: World) -> list[str]:
    train(world, "sft", name="adapter", lora={"rank": 2})
    (world / "base").rename(world / "moved")
    return stage("dpo", init_from="sft/adapter")(world)


def mamba(world: World) -> list[str]:
    """A causal model for which transformers has no sequence classifier."""
    import shutil

    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=258, bos_token_id=257, pad_token_id=256))
    shutil.copytree(world / "base", world / "mamba")
    model.save_pretrained(world / "mamba")
    return stage("reward", init_from=str(world / "mamba"))(world)


def latin_1(world: World) -> list[str]:
    (world / "latin.jsonl").write_bytes('{"prompt": "caf\xe9", "completion": "oui"}\n'.encode("latin-1"))
    return stage("sft", data=str(world / "latin.jsonl"))(world)


def ragged_csv(world: World) -> list[str]:
    (world / "odd.csv").write_text("prompt,completion\na,b\nc\n")
    return stage("sft", data=str(world / "odd.csv"))(world)


def foreign_folder(world: World) -> list[str]:
    return stage("sft", registry=str(world / "base"))(world)


CONFIGS = [
    Case("unknown key", stage("sft", train={"learning_rte": 1e-4}), ("sft.yaml:", "train.learning_rte", "Did you mean 'learning_rate'?")),
    Case("wrong type", stage("sft", train={"batch_size": "eight"}), ("sft.yaml:", "train.batch_size", "'eight'")),
    Case("duplicate key", text("sft", "name: tiny\nseed: 1\nseed: 2\ninit_from: {folder}/base\ndata: {folder}/sft.jsonl\n"), ("sft.yaml:3", "seed", "line 2")),
    Case("broken YAML", text("sft", "name: tiny\ndata: [a, b\nseed: 1\n"), ("sft.yaml:", "]")),
    Case("missing key", stage("sft", data=None), ("sft.yaml", "data", "missing")),
    Case("missing config", lambda world: ["sft", "--config", str(world / "stf.yaml")], ("stf.yaml", "no such file")),
    Case("unknown override", stage("sft", "train.epoch=2"), ("command line", "train.epoch", "Did you mean 'epochs'?")),
    Case("unknown trainer key", stage("sft", trainer={"weight_dcay": 0.1}), ("sft.yaml:", "trainer.weight_dcay", "Did you mean 'weight_decay'?")),
    Case("trainer key of ours", stage("sft", trainer={"seed": 3}), ("trainer.seed", "set `seed` instead")),
    Case("ppo without scorers", stage("ppo", scorers=None), ("ppo.yaml", "scorers", "missing")),
    Case(
        "chain whose ppo has neither reward nor scorers", lambda world: chain(ppo={"prompts": str(world / "prompts.jsonl")})(world),
        ("chain.yaml", "ppo.scorers", "missing", "`reward` section"),
    ),
    Case("relation", stage("ppo", value_function="adapter"), ("ppo.yaml", "value_function", "lora")),
    Case("split leaves nothing", stage("sft", split={"validation": 0.5, "test": 0.5}), ("sft.yaml", "split", "below 1")),
    Case("unknown machine", stage("sft", machine="cpux"), ("machine", "'cpux'", "Did you mean 'cpu'?")),
    Case("unknown stage to start from", chain("--from", "ppo"), ("--from ppo", "no section 'ppo'", "sft")),
    Case("chain without its data", chain(sft={"data": "nowhere.jsonl"}), ("sft: nowhere.jsonl does not exist", "start at")),
    Case(
        "prepare function that is not there",
        lambda world: chain(prepare={"rows": {"run": f"{HERE}:maek", "writes": [str(world / "made.jsonl")]}})(world), (f"{HERE}:maek", "no function 'maek'"),
    ),
    Case("batch not divisible", stage("sft", train={"batch_size": 6, "micro_batch_size": 4}), ("train.batch_size 6", "multiple of 4", "change one")),
    Case("rollout not divisible", stage("ppo", train={"rollout_batch_size": 5, "num_minibatches": 2}), ("rollout_batch_size 5", "num_minibatches 2")),
    Case("output below a file", lambda world: stage("sft", output=str(world / "sft.jsonl" / "out"))(world), ("sft.jsonl/out", "output")),
]  # fmt: skip

ROWS = [
    Case("missing file", lambda world: stage("sft", data=str(world / "sfd.jsonl"))(world), ("sfd.jsonl", "no such file", "did you mean sft.jsonl")),
    Case("broken JSON", data("sft", "odd.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, '{"prompt": "e",']), ("odd.jsonl:3", "broken JSON")),
    Case("wrong role", data("sft", "odd.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}]), ("odd.jsonl:1", "'bot'", "assistant")),
    Case("roles in a wrong order", data("sft", "odd.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}]), ("odd.jsonl:1", "user")),
    Case("only equal pairs", data("reward", "odd.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 8), ("odd.jsonl:1", "chosen equals rejected in all 8 pairs")),
    Case("empty completion", data("sft", "odd.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "  "}]), ("odd.jsonl:2", "completion", "empty", "take them out")),
    Case("number for a text", data("dpo", "odd.jsonl", [{"prompt": "a", "chosen": 3, "rejected": "b"}]), ("odd.jsonl:1", "chosen")),
    Case("demonstrations for a reward model", lambda world: stage("reward", data=str(world / "sft.jsonl"))(world), ("sft.jsonl:1", "chosen", "rejected")),
    Case("empty file", data("sft", "odd.jsonl", []), ("odd.jsonl", "no rows")),
    Case("column that is not there", lambda world: stage("sft", data=[{"path": str(world / "sft.jsonl"), "columns": {"prompt": "question"}}])(world), ("sft.jsonl:1", "'question'", "'completion'")),
    Case("not UTF-8", latin_1, ("latin.jsonl", "UTF-8", "convert")),
    Case("ragged CSV", ragged_csv, ("odd.csv:3", "cells")),
    Case("unknown suffix", lambda world: stage("sft", data=str(world / "sft.yaml"))(world), ("sft.yaml", ".jsonl")),
    Case("dataset without network", stage("sft", data="hf:nobody/nothing"), ("hf:nobody/nothing", "could not be loaded", "network")),
    Case("all rows too long", stage("sft", max_length=6), ("all ", "longer than max_length = 6", "raise max_length")),
    Case("fewer rows than a batch", stage("sft", train={"batch_size": 64, "micro_batch_size": 4}), ("training rows, fewer than one batch", "train.batch_size 64")),
    Case("no room for a prompt", stage("ppo", sampling={"max_new_tokens": 64}), ("max_new_tokens 64", "max_length 64")),
    Case("more new tokens than positions", stage("ppo", max_length=4096, sampling={"max_new_tokens": 600}), ("max_new_tokens 600", "512")),
    Case("empty test split", lambda world: evaluation(split={"validation": 0.1, "test": 0.0}, checkpoints={"base": str(world / "base")})(world), ("prompts.jsonl", "test subset", "subset: all")),
    Case("another split", evaluation(split={"seed": 5, "validation": 0.1, "test": 0.2}), ("sft/tiny", "another split", "split.seed is 5 here and 0 there")),
    Case("template that is not there", stage("sft", template="plane"), ("'plane'", "plain")),
    Case("template with a syntax error", template("{% for message in messages %}{{ message"), ("odd.jinja", "template")),
    Case("template that cannot render", template("{{ messages[0].name.upper() }}"), ("odd.jinja", "template")),
    Case("template without the answer", template("{% for message in messages %}{{ message.role }}{% endfor %}"), ("odd.jinja", "assistant")),
]  # fmt: skip

MODELS = [
    Case("folder without config.json", spoilt(lambda world: (world / "empty").mkdir(), lambda world: stage("sft", init_from=str(world / "empty"))(world)), ("empty", "config.json")),
    Case("no such folder", stage("sft", init_from="./bse"), ("./bse", "no such folder")),
    Case("no such hub model", stage("sft", init_from="nobody/nothing"), ("nobody/nothing",)),
    Case("misspelt name", stage("dpo", init_from="sft/tinny"), ("sft/tinny", "Did you mean sft/tiny?")),
    Case("misspelt stage", stage("dpo", init_from="stf/tiny"), ("stf/tiny", "Did you mean sft/tiny?")),
    Case("no such version", stage("dpo", init_from="sft/tiny@9"), ("no version 9", "version 1")),
    Case("no such alias", stage("dpo", init_from="sft/tiny@production"), ("no alias 'production'", "version 1", "align registry alias sft/tiny production")),
    Case("best of a metric nobody recorded", stage("dpo", init_from="sft/tiny@best:charm"), ("charm", "loss")),
    Case("parent of the wrong stage", stage("dpo", init_from="reward/tiny"), ("reward/tiny@1", "expected 'sft'", "sft/tiny")),
    Case("policy as a scorer", stage("ppo", scorers=[{"kind": "model", "checkpoint": "sft/tiny"}]), ("sft/tiny@1", "expected 'reward'")),
    Case("reward model as PPO's reference", stage("ppo", reference="reward/tiny"), ("reward/tiny@1", "expected 'sft'")),
    Case("reference with another tokenizer", lambda world: stage("dpo", reference=str(other_tokenizer(world)))(world), ("other", "another tokenizer", "descend from one")),
    Case("PPO's reference with another tokenizer", lambda world: stage("ppo", reference=str(other_tokenizer(world)))(world), ("other", "another tokenizer", "descend from one")),
    Case("another template", stage("dpo", template="chatml"), ("sft/tiny@1", "template: chatml", "different chat templates", "Leave `template` out")),
    Case("pad is EOS", spoilt(pad_is_eos, stage("dpo", init_from="sft/padded")), ("sft/padded@1", "pad token and end-of-text token are both id 258", "train the stage again")),
    Case("deleted weights", spoilt(deleted("sft"), stage("dpo")), ("sft/tiny", "model/model.safetensors: is missing", "Train it again")),
    Case("deleted weights of the base", spoilt(lambda world: (world / "base" / "model.safetensors").unlink(), stage("sft")), ("base", "model.safetensors")),
    Case("flipped bit under reward", spoilt(flipped("sft"), stage("reward")), ("sft/tiny@1", "model/model.safetensors: its content changed", "Train it again")),
    Case("flipped bit under dpo", spoilt(flipped("sft"), stage("dpo")), ("sft/tiny@1", "model/model.safetensors: its content changed", "verify")),
    Case("flipped bit in PPO's scorer", spoilt(flipped("reward"), stage("ppo", scorers=[{"kind": "model", "checkpoint": "reward/tiny"}])), ("reward/tiny@1", "its content changed")),
    Case("flipped bit in what is evaluated", spoilt(flipped("sft"), evaluation()), ("sft/tiny@1", "its content changed")),
    Case("edited manifest", spoilt(edit_manifest, stage("dpo", init_from="sft/tiny@1")), ("manifest.json", "sft/tiny")),
    Case("truncated safetensors", spoilt(lambda world: truncate(world / "base" / "model.safetensors"), stage("sft")), ("base", "model.safetensors", "again")),
    Case("weights that are NaN", spoilt(poison_base, stage("sft")), ("model.norm.weight", "NaN")),
    Case("no tokenizer", spoilt(lambda world: [(world / "base" / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], stage("sft")), ("base", "no tokenizer", "copy")),
    Case("config.json that is broken", spoilt(lambda world: truncate(world / "base" / "config.json"), stage("sft")), ("base", "config")),
    Case("adapter whose base changed", adapter_then_other_base, ("sft/adapter@1", "adapter", "train the adapter again")),
    Case("adapter whose base is gone", adapter_then_no_base, ("sft/adapter@1", "base", "not there any more")),
    Case("architecture without a classifier", mamba, ("Mamba", "reward model", "start from another model")),
    Case("LoRA on modules that are not there", stage("sft", lora={"target_modules": ["q_prj"]}), ("q_prj", "q_proj")),
]  # fmt: skip

SCORERS = [
    Case("scorer that raises", scorer("raises"), (f"{HERE}:raises", "on prompt 0", "KeyError: 'order'", "bad_scorers.py:10, in raises")),
    Case("scorer with a wrong number", scorer("too_few"), (f"{HERE}:too_few", "returned 1 scores for 12 completions")),
    Case("scorer with NaN", scorer("not_a_number"), (f"{HERE}:not_a_number", "score 0 is nan", "finite")),
    Case("scorer with text", scorer("words"), (f"{HERE}:words", "'good'", "expected a number")),
    Case("scorer that is not there", scorer("rases"), (f"{HERE}:rases", "no function 'rases'", "raises")),
    Case("scorer in no module", stage("ppo", scorers=[{"kind": "python", "function": "nowhere:f"}]), ("nowhere:f", "no module 'nowhere'")),
    Case("broken regular expression", stage("ppo", scorers=[{"kind": "regex", "pattern": "(a"}]), ("(a", "regular expression")),
    Case("evaluation's scorer that raises", evaluation(scorers=[{"kind": "python", "function": f"{HERE}:raises"}]), (f"{HERE}:raises", "KeyError: 'order'", "bad_scorers.py:10, in raises")),
    Case("label that is not there", evaluation(against="stf"), ("against", "'stf'", "sft")),
    Case("reward model evaluated as a policy", evaluation(checkpoints={"r": "reward/tiny"}), ("reward/tiny@1", "expected 'sft'")),
]  # fmt: skip

PLACES = [
    Case("registry is a file", lambda world: stage("sft", registry=str(world / "sft.jsonl"))(world), ("sft.jsonl is a file", "choose another path")),
    Case("registry below a file", lambda world: stage("sft", registry=str(world / "sft.jsonl" / "registry"))(world), ("sft.jsonl/registry", "choose another")),
    Case("registry is another folder", foreign_folder, ("base is not a registry", "empty or new folder")),
    Case("no registry there", lambda world: stage("dpo", registry=str(world / "nothing"))(world), ("nothing: no registry here", "Train a stage first")),
]  # fmt: skip

CASES = [*CONFIGS, *ROWS, *MODELS, *SCORERS, *PLACES]
