"""The `tune:` and `lora:` sections: what they mean, and one clear error for what can't be."""

from __future__ import annotations

import pytest

from configs.errors import UserError
from configs.explain import explain
from configs.load import load_text
from configs.schema import (
    IA3,
    Full,
    LoraTuning,
    PPOStage,
    PrefixTuning,
    QLoraTuning,
    RewardStage,
    freezes_base,
    lora_of,
    technique_of,
)

SFT = "name: demo\ninit_from: models/base\ndata: rows.jsonl\n"
PPO = "name: demo\ninit_from: models/base\nprompts: rows.jsonl\nscorers: [{kind: length, target: 5}]\n"


@pytest.mark.parametrize(
    ("text", "technique", "freezes"),
    [
        ("", Full(), False),
        ("tune: full\n", Full(), False),
        ("tune: {method: full, freeze: {first: 2}}\n", Full(freeze={"first": 2}), False),
        ("lora: {rank: 4, dora: true}\n", LoraTuning(rank=4, dora=True), True),
        ("tune: {method: lora, rank: 4, init: pissa}\n", LoraTuning(rank=4, init="pissa"), False),
        ("tune: qlora\n", QLoraTuning(), True),
        ("tune: ia3\n", IA3(), True),
        ("tune: {method: prefix_tuning, virtual_tokens: 5}\n", PrefixTuning(virtual_tokens=5), True),
    ],
)
def test_one_property_says_what_is_trained(text, technique, freezes):
    cfg = load_text(SFT + text, "sft")
    assert cfg.technique == technique_of(cfg) == technique
    assert type(cfg.technique) is type(technique)
    assert freezes_base(cfg) is freezes


def test_the_other_stages_have_lora():
    values = {"name": "demo", "init_from": "x", "data": "rows.jsonl", "lora": {"rank": 3, "rslora": True}}
    assert RewardStage.model_validate(values).technique == LoraTuning(rank=3, rslora=True)
    assert lora_of(PPOStage.model_validate({"name": "demo", "init_from": "x", "prompts": "p", "scorers": [{"kind": "length", "target": 5}], "lora": {"rank": 3}})).rank == 3
    assert lora_of(RewardStage.model_validate(values | {"lora": None})) is None


BAD = {
    "two techniques": ("tune: ia3\nlora: {rank: 4}\n", "c:5: lora is short for `tune: {method: lora, …}`, and tune (method: ia3) is given too; keep one of them"),
    "unknown": ("tune: lorra\n", "c:4: tune: method is 'lorra'; expected one of full, lora, qlora, ia3, prompt_tuning, prefix_tuning, p_tuning. Did you mean 'lora'?"),
    "no method": ("tune: {rank: 4}\n", "c:4: tune: `method` is missing; expected one of full, lora, qlora, ia3, prompt_tuning, prefix_tuning, p_tuning"),
    "of another technique": ("tune: {method: ia3, rank: 4}\n", "c:4: tune.rank: unknown key; expected one of method, target_modules, feedforward_modules"),
    "half of ia3": ("tune: {method: ia3, target_modules: [q_proj]}\n", "c:4: tune: target_modules and feedforward_modules go together"),
    "both ends": ("tune:\n  method: full\n  freeze: {first: 1, keep_last: 1}\n", "c:6: tune.freeze: first and keep_last say the same thing in two ways; give one of them"),
    "a schedule of nothing": ("tune:\n  method: full\n  freeze: {norms: true, unfreeze_every: 3}\n", "c:6: tune.freeze: unfreeze_every thaws the layers that `first` or `keep_last` froze"),
    "no expression": ("tune:\n  method: full\n  freeze: {patterns: ['(']}\n", "c:6: tune.freeze.patterns: '(' is no regular expression"),
    "rounded away": ("lora: {quantization: nf4, init: pissa}\n", "c:4: lora: init: pissa takes its start out of the base's weights, which quantization: nf4 rounds"),
    "sizes nothing": ("tune: {method: prefix_tuning, encoder_hidden_size: 8}\n", "c:4: tune: encoder_hidden_size is that of the network that prefix_projection: true trains through"),
    "dropout by TRL's name": ("trainer: {disable_dropout: false}\n", "c:4: trainer.disable_dropout: the stage sets this itself; set `train.dropout` instead"),
    "noise by TRL's name": ("trainer: {neftune_noise_alpha: 5.0}\n", "c:4: trainer.neftune_noise_alpha: the stage sets this itself; set `train.neftune_alpha` instead"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_each_mistake_is_one_clear_line(case):
    text, expected = BAD[case]
    with pytest.raises(UserError) as error:
        load_text(SFT + text, "sft", "c")
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bottleneck", "houlsby", "Pfeiffer"])
def test_bottleneck_adapters_are_not_in_peft_and_that_is_said(name):
    import peft

    with pytest.raises(UserError, match=rf"c:4: tune: method {name.lower()}: bottleneck adapters .* are not in peft .*use lora with the bottleneck's width as rank"):
        load_text(SFT + f"tune: {name}\n", "sft", "c")
    assert not [kind for kind in peft.PeftType if any(word in kind.value for word in ("BOTTLENECK", "HOULSBY", "PFEIFFER"))], "peft has them now: build them"


@pytest.mark.parametrize(
    ("lora", "why"),
    [
        ("{init: pissa}", "lora.init is pissa, which moves a part of the base into the policy's adapter"),
        ("{init: olora}", "lora.init is olora"),
        ("{learning_rate_ratio: 4}", "lora.learning_rate_ratio is 4.0; PPO trains policy and value adapters at rates of its own"),
        ("{quantization: nf4}", "lora.quantization: in PPO the backbone is shared by all models, and its key is `quantization: nf4` of the stage"),
        ("{dora: true}\nengine: vllm", "lora.dora: engine vllm is given weights with a plain low-rank update added"),
        ("{dora: true}\ntrain: {weight_decay: 0.1}", "lora.dora with train.weight_decay 0.1: PPO decays all that it trains"),
    ],
)
def test_ppo_refuses_by_name_what_one_shared_backbone_can_not_do(lora, why):
    with pytest.raises(UserError, match=r"c:\d: ") as error:
        load_text(PPO + f"lora: {lora}\n", "ppo", "c")
    assert why in str(error.value)


@pytest.mark.parametrize("lora", ["{rslora: true}", "{dora: true}", "{init: gaussian}"])
def test_ppo_takes_the_variants_that_leave_the_base_alone(lora):
    assert lora_of(load_text(PPO + f"lora: {lora}\n", "ppo")) is not None


def test_every_technique_is_explained_with_when_to_use_it():
    lines = explain("sft.tune.method").splitlines()
    assert lines[1] == "  type     one of full, lora, qlora, ia3, prompt_tuning, prefix_tuning, p_tuning"
    for name in ("full", "lora", "qlora", "ia3", "prompt_tuning", "prefix_tuning", "p_tuning"):
        assert any(line.strip().startswith(("meaning  " + name + ": ", name + ": ")) for line in lines), name
    assert "technique  method: lora, qlora" in explain("sft.tune.rank")
    assert "technique  method: prompt_tuning, prefix_tuning, p_tuning" in explain("tune.virtual_tokens")
