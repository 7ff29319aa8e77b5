"""Row 25 in whole runs: demonstrations mixed in, the average published, both resumed to the bit; presets as a run says them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.schema import PPOStage
from stages.ppo import evaluation
from stages.ppo.modules import POLICY, is_of
from stages.ppo.ptx import load_mix
from stages.registry import Registry
from tests.stage import ppo_runs
from tests.stage.ppo_runs import LORA, assembled, metrics, run, settings, weights, workspace

MORTAL = {"scorers": [{"kind": "python", "function": "tests.stage.ppo_runs:mortal"}]}
ONE_STEP = {"iterations": 1, "num_ppo_epochs": 1, "num_minibatches": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("extras"))


def ptx(place, **changes):
    return {"data": str(place / "demonstrations.jsonl"), "coef": 0.5, **changes}


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("mode", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_row_25_a_run_with_the_mix_and_the_average_goes_on_to_the_bit(place, monkeypatch, mode):
    """It fails in iteration 4, one iteration after a save; the average and the demonstrations' positions go on from there."""
    extras = {"ptx": ptx(place), "ema_decay": 0.9, "towards_start": 0.2, "train": {"iterations": 5, "save_every": 2, "warmup_iterations": 2, "schedule": "cosine"}}
    name = "lora" if mode else "full"
    whole, broken = (settings(place, f"{name}-{label}", **extras, **mode, **MORTAL) for label in ("whole", "broken"))
    expected = run(whole)
    monkeypatch.setattr(ppo_runs, "calls", 0)
    monkeypatch.setenv("PPO_TEST_DIES_AT", "raise:4")
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    saved = load_file(place / f"{name}-broken/resume/checkpoint-2/ema.safetensors")
    assert len(saved) > 0
    assert all((".lora_" in key) == bool(mode) and "value" not in key for key in saved), "the policy's tensors and no others"
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    monkeypatch.delenv("PPO_TEST_DIES_AT")
    resumed = run(broken)
    assert metrics(broken) == metrics(whole)
    assert all("ptx/loss" in line for line in metrics(whole))
    found, wanted = weights(resumed), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_row_25_what_is_published_is_the_average(place):
    """One optimizer step: 0.75 times the start policy's weights and 0.25 times those that a run without the average publishes."""
    start = weights(Registry(place / "registry").resolve("sft/one"))
    plain = weights(run(settings(place, "plain", ONE_STEP)))
    average = weights(run(settings(place, "average", ONE_STEP, ema_decay=0.75)))
    expected = {name: 0.75 * start[name] + 0.25 * plain[name] for name in start}
    assert largest_difference(plain, start) > 1e-4
    assert largest_difference(average, expected) < 1e-6


def test_row_25_what_is_published_lies_on_the_way_back(place):
    """Of weights all trained ones move; of an adapter, which starts at nothing, what it adds is scaled. It is evaluated as it is published."""
    start = weights(Registry(place / "registry").resolve("sft/one"))
    plain = weights(run(settings(place, "there", ONE_STEP)))
    back = weights(run(settings(place, "back", ONE_STEP, towards_start=0.25)))
    assert largest_difference(plain, start) > 1e-4
    assert largest_difference(back, {name: 0.25 * start[name] + 0.75 * plain[name] for name in start}) < 1e-6
    plain, back = (weights(run(settings(place, f"lora-{share}", ONE_STEP, lora=LORA, **changes))) for share, changes in (("there", {}), ("half", {"towards_start": 0.5})))
    assert any("lora_B" in name for name in back)
    for name, tensor in back.items():
        torch.testing.assert_close(tensor, 0.5 * plain[name] if "lora_B" in name else plain[name])


def test_row_25_the_way_back_takes_dora_s_magnitudes_along(place):
    """They started as the lengths of the base weight's rows; halfway are their means with those."""
    start = weights(Registry(place / "registry").resolve("sft/one"))
    there, back = (weights(run(settings(place, f"dora-{share}", ONE_STEP, lora=LORA | {"dora": True}, **changes))) for share, changes in (("there", {}), ("half", {"towards_start": 0.5})))
    magnitudes = [name for name in back if "lora_magnitude_vector" in name]
    assert magnitudes
    moved = 0.0
    for name, tensor in back.items():
        if name in magnitudes:
            layer = name.removeprefix("base_model.model.").split(".lora_magnitude_vector")[0]
            lengths = torch.linalg.norm(start[f"{layer}.weight"], dim=1)
            moved = max(moved, (there[name] - lengths).abs().max().item())
            torch.testing.assert_close(tensor, 0.5 * (there[name] + lengths))
        else:
            torch.testing.assert_close(tensor, 0.5 * there[name] if "lora_B" in name else there[name])
    assert moved > 1e-4


def test_row_25_weights_on_the_way_back_are_what_is_evaluated(place):
    """KL grows with the square of the way, near the start: half of it is left with much less than half of the KL. Rollouts are the policy's own."""
    evaluated = {"evaluation": {"every": 1, "prompts": str(place / "held_out.jsonl"), "samples_per_prompt": 16}}
    there, half = (settings(place, name, {"iterations": 2}, **evaluated, towards_start=back) for name, back in (("seen-there", None), ("seen-half", 0.5)))
    for values in (there, half):
        run(values)
    (_, first, second), (_, half_first, half_second) = metrics(there), metrics(half)
    assert 0 < half_first["evaluation/kl_k3"] < 0.5 * first["evaluation/kl_k3"]
    assert 0 < half_second["evaluation/kl_k3"] < 0.5 * second["evaluation/kl_k3"]
    assert half_second["objective/kl"] == second["objective/kl"]


def test_row_25_an_earlier_best_is_published_as_it_was_evaluated(place, monkeypatch):
    """The second of three evaluations is the best: what is published went back a quarter of the way once, as in a run that ends there."""
    scripted = iter([0.0, 2.0, 1.0])
    inner = evaluation.metrics_of
    monkeypatch.setattr(evaluation, "metrics_of", lambda *of: inner(*of) | {"evaluation/scripted": next(scripted)})
    watched = {"every": 1, "prompts": str(place / "held_out.jsonl"), "metric": "evaluation/scripted"}
    longer = weights(run(settings(place, "longer", ONE_STEP | {"iterations": 2, "schedule": "constant"}, towards_start=0.25, evaluation=watched)))
    there = weights(run(settings(place, "ends-there", ONE_STEP | {"schedule": "constant"}, towards_start=0.25)))
    assert all(torch.equal(longer[name], there[name]) for name in there)


def test_row_25_a_run_goes_back_to_the_weights_that_it_began_with_or_not_at_all(place, monkeypatch):
    """Another checkpoint under init_from may be allowed by config; its weights are no start of this run."""
    ppo_runs.publish_policy(place, "two")
    values = settings(place, "began", {"iterations": 3, "save_every": 1}, towards_start=0.2, **MORTAL)
    monkeypatch.setattr(ppo_runs, "calls", 0)
    monkeypatch.setenv("PPO_TEST_DIES_AT", "raise:3")
    with pytest.raises(KeyboardInterrupt):
        run(values)
    monkeypatch.delenv("PPO_TEST_DIES_AT")
    with pytest.raises(UserError, match=r"towards_start leads back to the weights that the run began with, and sft/two.* is not what checkpoint-\d was made from"):
        run(values | {"init_from": "sft/two", "allow_changed": ["config"]})


def test_row_25_the_mix_moves_the_policy_towards_the_demonstrations(place):
    """The same run with and without: with the mix the demonstrations' loss falls, without a mention of it in the metrics nothing changes."""
    values = settings(place, "mixed", {"iterations": 4}, ptx=ptx(place, coef=5.0, ratio=2.0))
    checkpoint = run(values)
    losses = [line["ptx/loss"] for line in metrics(values)]
    assert losses[-1] < losses[0] - 0.1
    assert checkpoint.info("data")["ptx"]["rows"]["train"] == 5
    off = settings(place, "off", {"iterations": 1}, ptx=ptx(place, coef=0.0))
    none = settings(place, "none", {"iterations": 1})
    first, second = weights(run(off)), weights(run(none))
    assert metrics(off) == metrics(none)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_row_25_with_adapters_the_mix_teaches_the_policys_alone(place, checkpointing):
    """Against transformers' own loss with labels, on one backbone whose policy adapter has been moved off zero."""
    cfg, accelerator, tokens, built, _ = assembled(settings(place, "adapters", {"gradient_checkpointing": checkpointing}, lora=LORA, ptx=ptx(place)))
    mix, _ = load_mix(cfg, tokens, built.trained.policy)
    module, numbers = built.trained, [0, 3, 4]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    count, total = 0, 0.0
    for row in (mix.rows[n] for n in numbers):
        ids, mask = (torch.tensor([row[key]]) for key in ("input_ids", "completion_mask"))
        total = total + module.policy(input_ids=ids, labels=torch.where(mask.bool(), ids, -100), use_cache=False).loss * int(mask.sum())
        count += int(mask.sum())
    names = [name for name, p in module.named_parameters() if p.requires_grad and is_of(name, POLICY)]
    expected = torch.autograd.grad(0.5 * total / count, [module.get_parameter(name) for name in names])
    module.train(checkpointing)
    loss = mix.add_gradients(module, accelerator, numbers, 2)
    assert loss == pytest.approx((total / count).item(), rel=1e-5)
    assert {name for name, p in module.named_parameters() if p.grad is not None} == set(names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(module.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)
    assert max(gradient.abs().max().item() for gradient in expected) > 1e-3


def test_row_25_other_demonstrations_are_other_data(place, monkeypatch):
    values = settings(place, "changed", {"save_every": 1}, ptx=ptx(place), **MORTAL)
    monkeypatch.setattr(ppo_runs, "calls", 0)
    monkeypatch.setenv("PPO_TEST_DIES_AT", "raise:2")
    with pytest.raises(KeyboardInterrupt):
        run(values)
    (place / "other.jsonl").write_text((place / "demonstrations.jsonl").read_text().replace("red", "blue"))
    with pytest.raises(UserError, match=r"data\.ptx: \w+… → \w+…"):
        run(values | {"ptx": ptx(place, data=str(place / "other.jsonl")), "allow_changed": ["config"]})


def test_row_25_demonstrations_held_out_from_training_are_not_mixed_in(place):
    (place / "held.jsonl").write_text('{"prompt": "red"}\n')
    split = {"validation": 0, "test": 0, "test_prompts": str(place / "held.jsonl")}
    checkpoint = run(settings(place, "held", {"iterations": 1}, ptx=ptx(place), split=split))
    rows = checkpoint.info("data")["ptx"]["rows"]
    assert (rows["train"], rows["test"]) == (4, 1)


@pytest.mark.parametrize("preset", ["nplus", "instructgpt", "openrlhf"])
def test_a_run_with_a_preset_says_what_it_changes_and_publishes_the_values(place, capsys, preset):
    train = {"iterations": 2, "rollout_batch_size": 8, "micro_batch_size": 4}
    values = settings(place, preset, preset=preset) | {"train": train | ({"warmup_iterations": 1} if preset == "instructgpt" else {})}
    values |= {"scale_scores": False} if preset == "openrlhf" else {}
    checkpoint = run(values)
    assert f"ppo: preset {preset} changes:" in capsys.readouterr().out
    cfg = PPOStage.model_validate(values)
    assert checkpoint.info("config")["kl_coef"] == cfg.kl_coef
    assert checkpoint.info("config")["train"]["num_ppo_epochs"] == cfg.train.num_ppo_epochs
    assert len(metrics(values)) == 2
