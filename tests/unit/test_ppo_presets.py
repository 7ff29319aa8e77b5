"""Presets: each against a table of its own, the user's keys win wherever they are written, and what changes is printed."""

from __future__ import annotations

import json

import pytest
import yaml

from configs import presets
from configs.errors import UserError
from configs.load import dump, load, load_text
from configs.schema import PPOStage, PPOTrain, Sampling
from launch.cli import main

PPO = "name: a\ninit_from: b\nprompts: p\nscorers: [{kind: model, checkpoint: reward/r}]\n"

# Written from the sources, not from configs/presets.py: Huang et al. 2024 (arXiv:2403.17031) and its ppo.py; Ouyang et al. 2022
# (arXiv:2203.02155), appendix C; OpenRLHF's train_ppo_ray.py and the example that the README names.
NPLUS = {
    "kl_coef": 0.05, "adaptive_kl": None, "missing_eos": "replace", "missing_eos_penalty": 1, "reward_at": "post_eos", "center_scores": True,
    "scale_scores": False, "score_clip": None, "gamma": 1, "gae_lambda": 0.95, "bootstrap_cut_off": False, "whiten_advantages": True,
    "whiten_rewards": False, "clip_range": 0.2, "clip_range_high": None, "dual_clip": None, "value_clip_range": 0.2, "vf_coef": 0.1,
    "value_function": "auto", "ptx": None, "ema_decay": None, "towards_start": None, "sampling.temperature": 0.7, "sampling.stop_at_eos": True,
    "train.num_ppo_epochs": 4, "train.num_minibatches": 1, "train.learning_rate": 3e-6, "train.value_learning_rate": None,
    "train.schedule": "linear", "train.learning_rate_floor": 0, "train.warmup_iterations": 0, "train.adam_beta1": 0.9, "train.adam_beta2": 0.999,
    "train.adam_epsilon": 1e-5, "train.weight_decay": 0.01, "train.max_grad_norm": None, "train.value_warmup_iterations": 0,
}  # fmt: skip
OPENRLHF = {
    "kl_coef": 0.01, "adaptive_kl": None, "missing_eos": "none", "reward_at": "last_token", "center_scores": True, "scale_scores": True,
    "score_clip": 10, "gamma": 1, "gae_lambda": 1, "bootstrap_cut_off": False, "whiten_advantages": True, "whiten_rewards": False,
    "clip_range": 0.2, "clip_range_high": None, "dual_clip": None, "value_clip_range": 0.5, "vf_coef": 1, "value_function": "auto",
    "ptx": None, "ema_decay": None, "towards_start": None, "sampling.temperature": 1, "sampling.stop_at_eos": True, "train.num_ppo_epochs": 1,
    "train.num_minibatches": 8, "train.learning_rate": 5e-7, "train.value_learning_rate": 9e-6, "train.schedule": "cosine",
    "train.learning_rate_floor": 0.1, "train.warmup_iterations": 3, "train.adam_beta1": 0.9, "train.adam_beta2": 0.95,
    "train.adam_epsilon": 1e-8, "train.weight_decay": 0, "train.max_grad_norm": 1, "train.value_warmup_iterations": 0,
}  # fmt: skip
INSTRUCTGPT = {
    "kl_coef": 0.02, "adaptive_kl": None, "center_scores": True, "scale_scores": False, "gamma": 1, "clip_range": 0.2, "clip_range_high": None,
    "dual_clip": None, "value_function": "auto", "ptx": None, "ema_decay": 0.992, "towards_start": None, "sampling.temperature": 1, "train.num_ppo_epochs": 1,
    "train.num_minibatches": 8, "train.value_learning_rate": 9e-6, "train.schedule": "constant", "train.warmup_iterations": 10,
    "train.adam_beta1": 0.9, "train.adam_beta2": 0.95,
}  # fmt: skip
EXPECTED = {"nplus": NPLUS, "instructgpt": INSTRUCTGPT, "openrlhf": OPENRLHF}


@pytest.fixture
def write(tmp_path):
    def write_text(text: str):
        (tmp_path / "c.yaml").write_text(text)
        return tmp_path / "c.yaml"

    return write_text


def flat(cfg: PPOStage) -> dict:
    """Every field by its dotted name; sections that are lists or null whole."""
    values = cfg.model_dump()
    return {
        **{k: v for k, v in values.items() if k not in ("train", "sampling")},
        **{f"{section}.{k}": v for section in ("train", "sampling") for k, v in values[section].items()},
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_what_its_source_does_and_nothing_else_changes(write, name):
    plain, with_preset = (flat(load(write(PPO + line), "ppo")) for line in ("", f"preset: {name}\n"))
    assert with_preset == plain | {"preset": name} | EXPECTED[name]
    assert with_preset != plain | {"preset": name}


def test_every_preset_of_the_schema_has_a_table_and_sources():
    assert set(EXPECTED) == set(presets.PRESETS) == set(PPOStage.model_json_schema()["properties"]["preset"]["anyOf"][0]["enum"])
    for name, preset in presets.PRESETS.items():
        fields = [setting.field for setting in preset.settings]
        assert len(fields) == len(set(fields))
        assert {f for f in fields if not f.startswith("ptx.")} | {"ptx"} == set(EXPECTED[name])
        assert all(setting.source for setting in preset.settings)


def test_the_mix_is_instructgpts_only_where_there_is_something_to_mix(write):
    cfg = load(write(PPO + "preset: instructgpt\nptx: {data: d}\n"), "ppo")
    assert (cfg.ptx.coef, cfg.ptx.ratio) == (27.8, 8)
    cfg = load(write(PPO + "preset: instructgpt\nptx: {data: d, coef: 1}\n"), "ppo")
    assert (cfg.ptx.coef, cfg.ptx.ratio) == (1, 8)
    with pytest.raises(UserError, match=r"c.yaml:5: ptx.coef: missing \(Weight of their loss"):
        load(write(PPO + "ptx: {data: d}\n"), "ppo")


@pytest.mark.parametrize(("iterations", "warmup"), [(100, 3), (10, 1), (101, 4), (34, 2)])
def test_openrlhfs_warm_up_is_three_percent_rounded_up(write, iterations, warmup):
    cfg = load(write(PPO + f"preset: openrlhf\ntrain: {{iterations: {iterations}}}\n"), "ppo")
    assert cfg.train.warmup_iterations == warmup


MINE = {"kl_coef": 0.3, "score_clip": 5, "sampling.temperature": 0.9, "train.max_grad_norm": 2, "train.learning_rate": 1e-4}


def assert_mine_win(cfg):
    """MINE win, sections that hold some of them keep the preset's others."""
    values = flat(cfg)
    assert values == flat(PPOStage.model_validate({"name": "a", "init_from": "b", "prompts": "p", "scorers": [{"kind": "model", "checkpoint": "reward/r"}]})) | {
        "preset": "nplus", "name": values["name"], "init_from": values["init_from"], "output": values["output"], "registry": values["registry"]} | NPLUS | MINE  # fmt: skip


def test_explicit_wins_in_the_file_whatever_the_order(write):
    mine = "kl_coef: 0.3\nscore_clip: 5\nsampling: {temperature: 0.9}\ntrain: {max_grad_norm: 2, learning_rate: 1e-4}\n"
    assert_mine_win(load(write(PPO + mine + "preset: nplus\n"), "ppo"))
    assert_mine_win(load(write(PPO + "preset: nplus\n" + mine), "ppo"))


def test_explicit_wins_on_the_command_line_with_the_preset_in_the_file_or_beside_it(write):
    words = [f"{key}={value}" for key, value in MINE.items()]
    assert_mine_win(load(write(PPO + "preset: nplus\n"), "ppo", words))
    assert_mine_win(load(write(PPO + "preset: openrlhf\n"), "ppo", [*words, "preset=nplus"]))


def test_explicit_wins_in_a_chain(write):
    chain = "name: a\nbase: b\nseed: 0\nppo:\n  prompts: p\n  preset: nplus\n  scorers: [{kind: model, checkpoint: reward/r}]\n  kl_coef: 0.3\n  train: {max_grad_norm: 2}\n"
    assert_mine_win(load(write(chain), "chain", ["ppo.score_clip=5", "ppo.sampling.temperature=0.9", "ppo.train.learning_rate=1e-4"]).ppo)


def test_explicit_wins_in_python_also_in_sections_that_are_models():
    common = {"name": "a", "init_from": "b", "prompts": "p", "scorers": [{"kind": "model", "checkpoint": "reward/r"}], "preset": "nplus", "kl_coef": 0.3, "score_clip": 5}
    assert_mine_win(PPOStage(**common, train={"max_grad_norm": 2, "learning_rate": 1e-4}, sampling={"temperature": 0.9}))
    assert_mine_win(PPOStage(**common, train=PPOTrain(max_grad_norm=2, learning_rate=1e-4), sampling=Sampling(temperature=0.9)))


def test_what_equals_our_default_wins_too_and_so_does_null(write):
    cfg = load(write(PPO + "preset: openrlhf\nkl_coef: 0.05\ntrain: {max_grad_norm: null, warmup_iterations: 0}\nscore_clip: null\n"), "ppo")
    assert (cfg.kl_coef, cfg.train.max_grad_norm, cfg.train.warmup_iterations, cfg.score_clip) == (0.05, None, 0, None)
    assert cfg.gae_lambda == 1


def test_the_caller_keeps_its_mapping():
    data = {"name": "a", "init_from": "b", "prompts": "p", "scorers": [{"kind": "length", "target": 5}], "preset": "nplus", "train": {"iterations": 5}}
    before = json.dumps(data)
    PPOStage.model_validate(data)
    assert json.dumps(data) == before


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_saved_holds_the_values_and_loads_as_the_same(write, name):
    cfg = load(write(PPO + f"preset: {name}\nkl_coef: 0.3\n"), "ppo")
    saved = yaml.safe_load(dump(cfg))
    assert (saved["preset"], saved["kl_coef"], saved["train"]["num_ppo_epochs"]) == (name, 0.3, EXPECTED[name]["train.num_ppo_epochs"])
    again = load_text(dump(cfg), "ppo")
    assert again == cfg
    assert presets.described(again) == presets.described(cfg)


BAD = {
    "unknown preset": (PPO + "preset: nplu\n", "c.yaml:5: preset: found 'nplu'; expected 'nplus', 'instructgpt' or 'openrlhf'. Did you mean 'nplus'?"),
    "a list": (PPO + "preset: [nplus]\n", "c.yaml:5: preset: found a list of 1; expected 'nplus', 'instructgpt' or 'openrlhf'. Did you mean 'nplus'?"),
    "beside a section that is none": (PPO + "preset: nplus\ntrain: 5\n", "c.yaml:6: train: found 5; expected a section (key: value)"),
    "beside a wrong value": (PPO + "preset: openrlhf\ntrain:\n  iterations: many\n", "c.yaml:7: train.iterations: found 'many'; expected a whole number"),
    "a relation that the preset breaks": (
        PPO + "preset: instructgpt\ntrain:\n  iterations: 5\n",
        "c.yaml:5: train.warmup_iterations 10 must be below train.iterations 5, or no iteration has the peak learning rate"),
    "a relation in a section that is not there": (
        PPO.replace("{kind: model, checkpoint: reward/r}", "{kind: length, target: 5}") + "preset: openrlhf\n",
        "c.yaml:5: scale_scores divides by the spread of one reward model's scores, and the scorers hold 0 reward models; set it to false"),
    "a batch that its minibatches do not divide": (
        PPO + "train:\n  rollout_batch_size: 12\npreset: instructgpt\n", "c.yaml:6: train.rollout_batch_size 12 is not a multiple of train.num_minibatches 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_problem_with_a_presets_value_is_one_line_at_the_preset(write, case):
    text, expected = BAD[case]
    with pytest.raises(UserError) as error:
        load(write(text), "ppo")
    assert [line[line.index("c.yaml") :] for line in str(error.value).splitlines()] == [expected]


def test_a_chains_problem_is_at_the_preset_too(write):
    chain = "name: a\nbase: b\nppo:\n  prompts: p\n  scorers: [{kind: length, target: 5}]\n  preset: openrlhf\n"
    with pytest.raises(UserError, match=r"c.yaml:6: ppo: scale_scores divides"):
        load(write(chain), "chain")


def test_described_says_what_changes_what_is_kept_and_what_cannot_be_done(write):
    lines = presets.described(load(write(PPO + "preset: nplus\nsampling: {temperature: 0.9}\n"), "ppo"))
    assert lines[0] == "preset nplus changes:"
    assert "  reward_at: last_token -> post_eos (rewards[sequence_lengths + 1] += scores, or on the last token where there is no position after it)" in lines
    assert "  score_clip: 10.0 -> null (scores are not clipped)" in lines
    assert "  train.max_grad_norm: 1.0 -> null (gradients are not clipped)" in lines
    assert "  sampling.temperature: 0.9 is yours; the preset has 0.7 (Args.temperature)" in lines
    assert not any("kl_coef" in line for line in lines), "what is our default does not change"
    assert sum(line.startswith("  note: ") for line in lines) == 2
    assert presets.described(load(write(PPO), "ppo")) == []


def test_show_and_dry_run_print_it(write, tmp_path, capsys):
    file = write(PPO + f"preset: instructgpt\noutput: {tmp_path}/out\n")
    assert main(["config", "show", str(file), "--kind", "ppo"]) == 0
    shown = capsys.readouterr().out
    assert "#   kl_coef: 0.05 -> 0.02 (C.4: beta = 0.02)" in shown
    assert yaml.safe_load(shown)["kl_coef"] == 0.02
    assert main(["config", "show", str(file), "--kind", "ppo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ema_decay"] == 0.992
    assert main(["ppo", "--config", str(file), "--dry-run"]) == 0
    assert "  ema_decay: null -> 0.992 (C.4: exponential moving averages of the weights)" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "out/plan.yaml").read_text())["train"]["num_minibatches"] == 8
