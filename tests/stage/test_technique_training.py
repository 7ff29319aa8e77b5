"""Techniques while they train: resumed to the bit, noise and smoothing where they belong and nowhere else, frozen weights that do not move."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stages import models, sft
from stages.registry import Registry
from stages.training import guarding, publish
from tests.stage.runs import metrics, run, settings, weights, workspace

THAW = {"tune": {"method": "full", "freeze": {"first": 2, "unfreeze_every": 2}}}
NOISE = {"neftune_alpha": 5.0, "dropout": 0.1, "label_smoothing": 0.1, "weight_decay": 0.1}
ADAPTER = {"lora": {"rank": 4, "alpha": 8, "init": "pissa", "learning_rate_ratio": 8.0, "dropout": 0.1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("training"), rows=30, hidden=16, initializer_range=0.2)


class Interrupted(Exception):
    """Stands for a crash."""


def crashing(at: int):
    check = guarding.SkipSteps.on_pre_optimizer_step

    def crash(self, args, state, control, **kwargs):
        if state.global_step == at:
            raise Interrupted
        return check(self, args, state, control, **kwargs)

    return mock.patch.object(guarding.SkipSteps, "on_pre_optimizer_step", crash)


@pytest.mark.parametrize(("label", "changes", "train"), [("thaw", THAW, NOISE), ("adapter", ADAPTER, {"neftune_alpha": 5.0})])
def test_interrupted_and_run_again_it_ends_as_if_nothing_had_happened(place, label, changes, train):
    """Weights, metrics and learning rates, bit for bit; a layer is thawed before the save, and one after it."""
    common = TRAINED | train | {"max_steps": 6, "save_every": 3, "eval_every": 6}
    whole, broken = (settings(place, "sft", common, name=f"{label}-{name}", output=str(place / "out-sft"), **changes) for name in ("whole", "broken"))
    first, groups = run(*("sft", whole)), {}
    expected = {key: metrics(place, "sft", key) for key in ("loss", "eval_loss")}
    with crashing(4), pytest.raises(Interrupted):
        run("sft", broken)
    original = publish.publish
    with mock.patch.object(publish, "publish", lambda trainer, *a, **k: (groups.update(rates=[g["initial_lr"] for g in trainer.optimizer.param_groups]), original(trainer, *a, **k))[1]):
        second = run("sft", broken)
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {key: metrics(place, "sft", key) for key in expected} == expected
    assert sorted(set(groups["rates"])) == ([1e-3] if label == "thaw" else pytest.approx([1e-3, 8e-3]))


TRAINED = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3}
STILL = {"max_steps": 1, "batch_size": 23, "micro_batch_size": 1, "learning_rate": 1e-12}  # one step that moves nothing, over all training rows: 23 of 30


def still(place, name: str, **train):
    """(logged training loss, published metrics, checkpoint) of a step that moves nothing."""
    values = settings(place, "sft", STILL | train, name=name, output=str(place / f"out-{name}"), split={"validation": 0.2, "test": 0})
    checkpoint = run("sft", values)
    rows = [json.loads(line) for line in (place / f"out-{name}" / "metrics.jsonl").read_text().splitlines()]
    return next(row["sft/loss"] for row in rows if "sft/loss" in row), checkpoint.info("metrics"), checkpoint


@pytest.fixture(scope="module")
def plain(place):
    return still(place, "plain")


def test_label_smoothing_is_torch_s_cross_entropy_with_smoothing(place, plain):
    """Over the same rows, computed from full logits; the validation loss is the plain one."""
    rows, original = [], sft.labelled

    def seen(row):
        rows.append(original(row))
        return rows[-1]

    with mock.patch.object(sft, "labelled", seen):
        loss, validated, _ = still(place, "smoothed", label_smoothing=0.1)
    model = models.load_policy(models.Origin(str(place / "base"), None, None))
    logits, labels = [], []
    for row in rows[:23]:
        with torch.no_grad():
            logits.append(model(torch.tensor([row["input_ids"]])).logits[0, :-1])
        labels.append(torch.tensor(row["labels"][1:]))
    expected = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-100, label_smoothing=0.1).item()
    assert len(rows) == 30
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(loss - plain[0]) > 1e-3
    assert validated["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6)


def test_the_gradient_of_label_smoothing_is_that_of_full_logits():
    from transformers import LlamaForCausalLM

    from stages.tuning.smoothing import LastHidden, above_mean
    from tests.tiny import tiny_config

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(hidden=16, tie_word_embeddings=False))
    ids = torch.randint(0, 250, (2, 9))
    labels = ids.clone()
    labels[:, :3] = -100
    kept = LastHidden(model)
    logits = model(ids).logits[:, :-1]
    targets = labels[:, 1:]
    ours = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100) + 0.2 * above_mean(kept.take(), labels, model.lm_head) / (targets != -100).sum()
    theirs = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=0.2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(ours, list(model.parameters())), torch.autograd.grad(theirs, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("noise", [{"neftune_alpha": 30.0}, {"dropout": 0.3}])
def test_noise_is_there_in_training_and_nowhere_else(place, plain, noise):
    """Same evaluation, same weights, and a config that asks nobody for it."""
    name = next(iter(noise)).replace("_", "-")
    loss, validated, checkpoint = still(place, name, **noise)
    assert abs(loss - plain[0]) > 1e-4
    assert validated["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6)
    torch.testing.assert_close(weights(checkpoint), weights(plain[2]), rtol=0, atol=1e-10)
    folders = [found.model_dir for found in (checkpoint, plain[2])]
    assert (folders[0] / "config.json").read_text() == (folders[1] / "config.json").read_text()


def test_a_model_without_dropout_of_its_own_says_so():
    from configs.errors import UserError
    from stages.dropout import with_dropout

    with pytest.raises(UserError, match=r"train.dropout is 0.1, and Linear has no dropout of its own"):
        with_dropout(torch.nn.Linear(2, 2), 0.1)


def test_frozen_weights_are_published_as_they_were(place):
    """With weight decay and momentum; what was not frozen has moved."""
    run("sft", settings(place, "sft", TRAINED | {"weight_decay": 0.1, "max_steps": 3}, name="frozen", tune={"method": "full", "freeze": {"first": 1, "norms": True}}, output=str(place / "out-frozen")))
    before, after = load_file(place / "base" / "model.safetensors"), weights(Registry(place / "registry").resolve("sft/frozen"))
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {name for name in after if "layers.0." in name or "norm" in name}
