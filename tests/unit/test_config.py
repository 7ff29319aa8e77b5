"""Config files: what loads, what it means, and one clear error for everything that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import dump, load, load_text, save
from configs.yaml_lines import parse, to_yaml

SFT = "name: demo\ninit_from: models/base\ndata: rows.jsonl\n"
PPO = "name: demo\ninit_from: models/base\nprompts: rows.jsonl\nscorers: [{kind: length, target: 5}]\n"
CHAIN = """\
name: demo
base: ${assets}/model
seed: 3
max_length: 256
sft:
  data: ${assets}/rows.jsonl
reward:
  data: pairs.jsonl
  max_length: 128
ppo:
  prompts: prompts.jsonl
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes c.yaml in an empty working directory and returns its name, so that messages start with `c.yaml:`."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "c.yaml"

    return write


def problems(file: str, kind: str = "sft", overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(UserError) as error:
        load(file, kind, overrides)
    return str(error.value).splitlines()


def test_numbers_are_read_as_yaml_1_2_reads_them():
    read = parse("[3e-6, 1E+3, 1_000, 0x10, 010, 1:30, yes, off, '3e-6', 2024-01-01, .5, -.inf, ~, 1.]", "x").data
    assert read == [3e-6, 1000.0, 1000, 16, "010", "1:30", "yes", "off", "3e-6", "2024-01-01", 0.5, float("-inf"), None, 1.0]
    assert [type(v) for v in read[:3]] == [float, float, int]


def test_a_learning_rate_without_a_point_is_a_number(write):
    assert load(write(SFT + "train: {learning_rate: 3e-6}\n"), "sft").train.learning_rate == 3e-6


def test_every_value_has_its_line():
    lines = parse("a: 1\nb:\n  - c: 2\n    d: 3\n  - e\n", "x").lines
    assert lines[("a",)] == 1
    assert lines[("b", 0, "d")] == 4
    assert lines[("b", 1)] == 5


def test_a_bare_path_is_a_list_of_one_source(write):
    assert [source.path for source in load(write(SFT), "sft").data] == ["rows.jsonl"]


# Overrides ---------------------------------------------------------------------------------------------------------


def test_overrides_win_and_are_typed_as_yaml(write):
    cfg = load(write(SFT), "sft", ["train.learning_rate=1e-4", "data.0.path=other.jsonl", "data.0.weight=2", "lora.rank=4", "seed=7"])
    assert (cfg.train.learning_rate, cfg.data[0].path, cfg.data[0].weight, cfg.lora.rank, cfg.seed) == (1e-4, "other.jsonl", 2.0, 4, 7)


def test_null_switches_off(write):
    assert load(write(SFT + "lora: {rank: 4}\n"), "sft", ["lora=null"]).lora is None


def test_the_last_of_two_overrides_wins(write):
    assert load(write(SFT), "sft", ["seed=1", "seed=2"]).seed == 2


def test_a_wrong_override_is_located_on_the_command_line(write):
    found = problems(write(SFT), overrides=("train.learning_rat=1", "train.epochs=many", "seed", "seed=", "data.3.path=x", "name.x=1"))
    assert "command line: train.learning_rat=1: train.learning_rat: unknown key. Did you mean 'learning_rate'?" in found
    assert "command line: train.epochs=many: train.epochs: found 'many'; expected a number" in found
    assert "command line: seed: expected key=value, such as train.learning_rate=1e-4" in found
    assert any(line.startswith("command line: seed=: the value is empty; write seed=null") for line in found)
    assert any(line.startswith("command line: data.3.path=x: data.3: no such item; the list has 1") for line in found)
    assert any(line.startswith("command line: name.x=1: name: this is the value 'demo', not a section") for line in found)
    assert len(found) == 6


# References --------------------------------------------------------------------------------------------------------


def test_references_take_the_value_after_overrides(write):
    cfg = load(write(CHAIN), "chain", ["assets=/data", "output=out/${name}"])
    assert cfg.base == "/data/model"
    assert cfg.sft.data[0].path == "/data/rows.jsonl"
    assert str(cfg.registry) == "out/demo/registry"


def test_the_output_of_a_chain_can_be_referred_to_without_being_given(write):
    assert load(write(CHAIN.replace("data: pairs", "data: ${output}/pairs")), "chain", ["assets=a"]).reward.data[0].path == "runs/demo/pairs.jsonl"


def test_a_whole_reference_keeps_its_type_and_an_escaped_one_its_text(write):
    text = CHAIN + "prepare: {w: {run: 'a:b', with: {n: '${seed}', t: 'x${seed}', raw: '$${seed}'}, writes: [x]}}\n"
    assert load(write(text), "chain", ["assets=a"]).prepare["w"].arguments == {"n": 3, "t": "x3", "raw": "${seed}"}


def test_an_unset_reference_says_what_to_type(write):
    found = problems(write(CHAIN), "chain")
    assert found == [
        "c.yaml:2: base: ${assets} has no value; give it on the command line: assets=PATH",
        "c.yaml:6: sft.data: ${assets} has no value; give it on the command line: assets=PATH",
    ]


def test_unknown_and_circular_references(write):
    assert problems(write(CHAIN.replace("model", "${naem}")), "chain", ("assets=a",)) == [
        "c.yaml:2: base: ${naem} is no top-level key of this file. Did you mean '${name}'?"
    ]
    found = problems(write(CHAIN.replace("seed: 3", "machine: ${template}\ntemplate: ${machine}")), "chain", ("assets=a",))
    assert found == [
        "c.yaml:3: machine: ${template} refers to itself through template -> machine -> template",
        "c.yaml:4: template: ${machine} refers to itself through machine -> template -> machine",
    ]


# Chains ------------------------------------------------------------------------------------------------------------


def test_a_chain_fills_its_sections_and_a_section_may_differ(write):
    cfg = load(write(CHAIN), "chain", ["assets=a"])
    assert (cfg.sft.max_length, cfg.reward.max_length, cfg.ppo.seed) == (256, 128, 3)
    assert (cfg.sft.init_from, cfg.reward.init_from, cfg.ppo.scorers[0].checkpoint) == ("a/model", "sft/demo", "reward/demo")


def test_a_wrong_shared_value_is_reported_once_at_its_own_line(write):
    assert problems(write(CHAIN.replace("max_length: 256", "max_length: long")), "chain", ("assets=a",)) == [
        "c.yaml:4: max_length: found 'long'; expected a whole number"
    ]


def test_a_wrong_value_inside_the_shared_split_is_reported_once(write):
    assert problems(write(CHAIN + "split: {validation: 0.5, test: 0.6}\n"), "chain", ("assets=a",)) == [
        "c.yaml:12: split: validation 0.5 + test 0.6 leave nothing to train on; their sum must be below 1"
    ]


def test_the_stages_of_a_chain_share_one_split(write):
    found = problems(write(CHAIN.replace("reward:\n", "reward:\n  split: {seed: 4}\n")), "chain", ("assets=a",))
    assert len(found) == 1
    assert "reward: has a split of its own" in found[0]
    write(dump(load(write(CHAIN + "split: {seed: 4}\n"), "chain", ["assets=a"])))  # what was resolved says it in every section
    assert load("c.yaml", "chain").reward.split.seed == 4


def test_a_stage_is_switched_off_from_the_command_line(write):
    cfg = load(write(CHAIN), "chain", ["assets=a", "reward=null", "ppo=null"])
    assert cfg.reward is None
    assert cfg.sft is not None


# What is wrong, kind by kind: text of the file, and the one line that says so -----------------------------------------

BAD = {
    "unknown key": (SFT + "sed: 1\n", "c.yaml:4: sed: unknown key. Did you mean 'seed'?"),
    "unknown nested key": (SFT + "train:\n  epoch: 1\n", "c.yaml:5: train.epoch: unknown key. Did you mean 'epochs'?"),
    "key of another section": (SFT + "batch_size: 8\n", "c.yaml:4: batch_size: unknown key. Did you mean 'train.batch_size'?"),
    "text for a number": (SFT + "seed: one\n", "c.yaml:4: seed: found 'one'; expected a whole number"),
    "quoted number": (SFT + "seed: '1'\n", "c.yaml:4: seed: found '1'; expected a whole number"),
    "fraction for a whole number": (SFT + "seed: 1.5\n", "c.yaml:4: seed: found 1.5; expected a whole number"),
    "true for a number": (SFT + "seed: true\n", "c.yaml:4: seed: found true; expected a whole number"),
    "yes for true": (SFT + "packing: yes\n", "c.yaml:4: packing: found 'yes'; expected true or false"),
    "null where a value must be": (SFT + "seed:\n", "c.yaml:4: seed: found null; expected a whole number"),
    "number for text": (SFT + "template: 7\n", "c.yaml:4: template: found 7; expected text; put quotes around it"),
    "not a number": (SFT + "train: {learning_rate: .nan}\n", "c.yaml:4: train.learning_rate: found nan; expected a finite number"),
    "out of range": (SFT + "train: {warmup: 1.5}\n", "c.yaml:4: train.warmup: found 1.5; expected a number below 1"),
    "zero": (SFT + "train: {batch_size: 0}\n", "c.yaml:4: train.batch_size: found 0; expected a number of at least 1"),
    "unknown choice": (SFT + "loss_on: lst\n", "c.yaml:4: loss_on: found 'lst'; expected 'all' or 'last'. Did you mean 'last'?"),
    "missing key": ("name: demo\ndata: x\n", "c.yaml:1: init_from: missing (A registry name such as sft/demo@3, a Hugging Face folder, or a Hugging Face model name)"),
    "section that is a value": (SFT + "train: 3\n", "c.yaml:4: train: found 3; expected a section (key: value)"),
    "empty list": ("name: demo\ninit_from: x\ndata: []\n", "c.yaml:3: data: found an empty list; expected at least 1 item"),
    "bad name": (SFT.replace("demo", "My Run"), "c.yaml:1: name: found 'My Run'; expected a name of a-z, 0-9, dot, dash and underscore, at most 64 characters, that starts with a letter or digit"),
    "path outside": (SFT.replace("demo", "../x"), "c.yaml:1: name: found '../x'; expected a name of a-z, 0-9, dot, dash and underscore, at most 64 characters, that starts with a letter or digit"),
    "duplicate key": (SFT + "seed: 1\nseed: 2\n", "c.yaml:5: seed: this key stands twice (first in line 4); remove one"),
    "wrong member of either-or": (SFT + "lora: {target_modules: 3}\n", "c.yaml:4: lora.target_modules: found 3; expected text or a list; put quotes around it"),
    "wrong item of either-or": (SFT + "lora:\n  target_modules: [a, 3]\n", "c.yaml:5: lora.target_modules.1: found 3; expected text; put quotes around it"),
    "python object": (SFT + "seed: !!python/name:os.system x\n", "c.yaml:4: found tag:yaml.org,2002:python/name:os.system 'x'; expected plain text, a number, true, false or null"),
    "unknown trainer argument": (SFT + "trainer:\n  optimm: sgd\n", "c.yaml:5: trainer.optimm: SFTConfig has no such argument. Did you mean 'optim'?"),
    "trainer argument that is ours": (SFT + "trainer: {bf16: true}\n", "c.yaml:4: trainer.bf16: the stage sets this itself; set `train.precision` instead"),
    "trainer argument of the wrong type": (SFT + "trainer: {eval_accumulation_steps: many}\n", "c.yaml:4: trainer.eval_accumulation_steps: found 'many'; expected a whole number or null"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_each_mistake_is_one_clear_line(write, case):
    text, expected = BAD[case]
    found = problems(write(text))
    if case in ("duplicate key", "python object"):  # the rest of the file is still checked
        assert found[0] == expected
    else:
        assert found == [expected]


BAD_PPO = {
    "a controller of nothing": (PPO + "kl_coef: 0\nadaptive_kl: {target: 3}\n", "c.yaml:6: adaptive_kl multiplies kl_coef, and kl_coef is 0: it would stay 0; give kl_coef a value to start from, or leave adaptive_kl out"),
    "metric of no evaluation": (PPO + "evaluation: {metric: score}\n", "c.yaml:5: evaluation.metric: found 'score'; expected the name of a metric, such as evaluation/heldout_score or evaluation/win_rate, with a minus before it where lower is better"),
    "unknown scorer": (PPO.replace("length", "lenght"), "c.yaml:4: scorers.0: kind is 'lenght'; expected one of model, ensemble, length, repetition, regex, keyword, python. Did you mean 'length'?"),
    "scorer without a kind": (PPO.replace("kind: length, ", ""), "c.yaml:4: scorers.0: `kind` is missing; expected one of model, ensemble, length, repetition, regex, keyword, python"),
    "missing key of a scorer": (PPO.replace(", target: 5", ""), "c.yaml:4: scorers.0.target: missing (Words)"),
    "key of another scorer": (PPO.replace("target", "taget"), "c.yaml:4: scorers.0.taget: unknown key; expected one of weight, kind, target. Did you mean 'target'?"),
    "value_init with adapters": (PPO + "lora: {}\nvalue_init: reward/demo\n", "c.yaml:6: value_init is for a value copy (full training, value_function: copy); adapters start from the reward adapter among the scorers, a head at 0: leave it out"),
    "value_init with a head": (PPO + "value_function: head\nvalue_init: reward/demo\n", "c.yaml:6: value_init is for a value copy (full training, value_function: copy); adapters start from the reward adapter among the scorers, a head at 0: leave it out"),
    "scale without a reward model": (PPO + "scale_scores: true\n", "c.yaml:5: scale_scores divides by the spread of one reward model's scores, and the scorers hold 0 reward models; set it to false"),
    "scale with two": (PPO.replace("{kind: length, target: 5}", "{kind: model, checkpoint: reward/a}, {kind: model, checkpoint: reward/b}") + "scale_scores: true\n", "c.yaml:5: scale_scores divides by the spread of one reward model's scores, and the scorers hold 2 reward models; set it to false"),
    "relation": (PPO + "value_function: adapter\n", "c.yaml:5: value_function: adapter needs a `lora:` section; use copy or head for full training"),
    "relation in a section": (PPO + "lora:\n  dropout: 0.1\n", "c.yaml:6: lora.dropout is 0.1; PPO recomputes what the rollout stored and needs 0"),
    "batches that do not divide": (PPO + "train:\n  rollout_batch_size: 10\n  num_minibatches: 3\n", "c.yaml:6: train.rollout_batch_size 10 is not a multiple of train.num_minibatches 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PPO)
def test_each_mistake_in_ppo_is_one_clear_line(write, case):
    text, expected = BAD_PPO[case]
    found = problems(write(text), "ppo")
    assert expected in found
    assert len(found) == (2 if case == "key of another scorer" else 1)  # there `target` is missing too


def test_all_problems_come_at_once_in_the_order_of_the_file(write):
    text = "name: Demo\ninit_from: x\nseed: a\nseed: b\ntrain: {epochs: 0}\nfoo: 1\ntrainer: {bar: 1}\n"
    starts = [line.split(": ")[0] + " " + line.split(": ")[1] for line in problems(write(text), overrides=("lora.rank=0",))]
    assert starts == [
        "c.yaml:1 name", "c.yaml:1 data", "c.yaml:4 seed", "c.yaml:4 seed", "c.yaml:5 train.epochs", "c.yaml:6 foo", "c.yaml:7 trainer.bar",
        "command line lora.rank=0",
    ]  # fmt: skip


UNREADABLE = {
    "empty": (b"", "c.yaml:1: the file is empty"),
    "only a comment": (b"# nothing\n", "c.yaml:1: the file is empty"),
    "a list": (b"- a\n", "c.yaml:1: found a list of 1 at the top; expected keys"),
    "a text": (b"hello\n", "c.yaml:1: found 'hello' at the top; expected keys"),
    "a tab": (b"name: x\ntrain:\n\tepochs: 1\n", "c.yaml:3: broken YAML:"),
    "an open bracket": (b"name: x\ndata: [a, b\nseed: 1\n", "c.yaml:3: broken YAML:"),
    "a colon in a text": (b"name: x\ntemplate: a: b\n", "c.yaml:2: broken YAML:"),
    "two documents": (b"name: x\n---\nname: y\n", "c.yaml:2: broken YAML:"),
    "not UTF-8": (b"name: x\nbase: caf\xe9\n", "c.yaml:2: this is not UTF-8 text"),
    "a control character": (b"name: x\nseed: \x07\n", "c.yaml:2: broken YAML:"),
    "a key that is a list": (b"name: x\n[a]: 1\n", "c.yaml:2: a key must be text"),
    "an endless anchor": (b"name: &a [*a]\n", "c.yaml:1: an anchor"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_that_are_no_config(write, case):
    text, expected = UNREADABLE[case]
    found = problems(write(text))
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_anchors_that_multiply_themselves_are_refused(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "an anchor" in problems(write("\n".join(lines)))[0]


def test_merge_keys_work(write):
    cfg = load(write(SFT + "train: &t {epochs: 2}\n"), "sft")
    assert cfg.train.epochs == 2
    merged = parse("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a}\n", "x")
    assert merged.data["b"] == {"x": 3, "y": 2}
    assert merged.data["c"] == {"x": 1, "y": 2}
    assert merged.problems == []


def test_a_missing_file_names_those_beside_it(write):
    write(SFT)
    assert problems("d.yaml") == ["d.yaml: no such file; in . there are: c.yaml"]
    assert problems(".") == [".: this is a folder; expected a YAML file"]


# Writing -----------------------------------------------------------------------------------------------------------

WHOLE = {
    "sft": SFT + "train: {learning_rate: 3e-6}\ntrainer: {optim: sgd}\nlora: {target_modules: [q, v]}\n",
    "reward": SFT + "demonstrations: [{path: d.jsonl, columns: {prompt: question}}]\n",
    "dpo": SFT + "reference: sft/x@2\nbeta: 1e-3\n",
    "ppo": PPO + "adaptive_kl: {target: 3}\n",
    "eval": "prompts: p.jsonl\ncheckpoints: {'1': a, no: b}\nscorers: [{kind: regex, pattern: '^$${x}: #'}, {kind: keyword, words: ['3e-6', 'yes', '~', '1:30', '']}]\n",
    "chain": CHAIN.replace("${assets}", "a") + "prepare: {w: {run: 'a:b', with: {n: 1, f: 1.0, t: '1e5', r: '$$${x}', u: 'ü\n'}, writes: [x]}}\n"
    "dpo: {data: x}\neval: {prompts: p, scorers: [{kind: length, target: 3}]}\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_saved_loads_as_the_same_config(write, kind, tmp_path):
    cfg = load(write(WHOLE[kind]), kind)
    save(cfg, tmp_path / "out" / "config.yaml")
    assert load(tmp_path / "out" / "config.yaml", kind) == cfg
    assert load_text(dump(cfg), kind) == cfg
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.yaml"]


def test_the_alias_of_a_preparation_step_is_written(write):
    text = dump(load(write(WHOLE["chain"]), "chain"))
    assert "with:" in text
    assert "arguments" not in text


def test_a_section_of_a_chain_is_a_config_of_its_own(write):
    cfg = load(write(WHOLE["chain"]), "chain")
    for kind, section in {"sft": cfg.sft, "reward": cfg.reward.member(1), "dpo": cfg.dpo, "ppo": cfg.ppo}.items():
        assert load_text(dump(section), kind) == section


@pytest.mark.parametrize("value", ["3e-6", "1e5", "yes", "null", "~", "", "010", "1:30", "a: b", "# x", "2024-01-01", "<<", "=", "x\ny", "é", " a ", "0x1F", "-", "1_000", "True"])
def test_text_stays_text(value):
    assert parse(to_yaml({"a": [value]}), "x").data == {"a": [value]}


@pytest.mark.parametrize("value", [3e-6, 1e20, 1.0, -0.5, 123456789.123, 0, -7, True, False, None, 1e-300])
def test_numbers_stay_numbers(value):
    read = parse(to_yaml({"a": value}), "x").data["a"]
    assert read == value
    assert type(read) is type(value)


def test_what_may_have_changed_is_checked_with_did_you_mean(tmp_path):
    """In the file and on the command line; a chain hands each stage the keys that it has."""
    from configs.allowed import chain_with_allowed, with_allowed

    file = tmp_path / "sft.yaml"
    file.write_text("name: a\ninit_from: base\ndata: rows.jsonl\nallow_changed: [data]\n")
    cfg = load(file, "sft")
    assert with_allowed(cfg, ["schedule", "train.learning_rate", "data"]).allow_changed == ["data", "schedule", "train.learning_rate"]
    with pytest.raises(UserError, match=r"--allow-changed: 'shedule' can't be allowed to change; expected one of data, .*Did you mean 'schedule'"):
        with_allowed(cfg, ["shedule"])
    file.write_text("name: a\ninit_from: base\ndata: rows.jsonl\nallow_changed: [train.learning_rat]\n")
    with pytest.raises(UserError, match=r"sft.yaml:4: allow_changed: .*Did you mean 'train.learning_rate'"):
        load(file, "sft")
    file.write_text("name: a\nbase: b\nsft: {data: rows.jsonl}\ndpo: {data: pairs.jsonl}\n")
    chain = chain_with_allowed(load(file, "chain"), ["beta", "data"])
    assert (chain.sft.allow_changed, chain.dpo.allow_changed) == (["data"], ["beta", "data"])
    with pytest.raises(UserError, match=r"--allow-changed: 'betta'.*Did you mean 'beta'"):
        chain_with_allowed(chain, ["betta"])
