"""Every health check is provoked in a real run by what causes it; a healthy run provokes none."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from stages.ppo import health, state, train
from stages.ppo.engines import native
from stages.registry import Registry
from tests.stage.ppo_runs import metrics, publish_policy, run, weights, workspace
from tests.stage.ppo_runs import settings as default_settings

EAGER = {"learning_rate": 0.02, "num_ppo_epochs": 2, "num_minibatches": 1, "rollout_batch_size": 16, "micro_batch_size": 16, "schedule": "constant"}
GENTLE = {"learning_rate": 1e-4, "rollout_batch_size": 32, "micro_batch_size": 32}
FREE = {"kl_coef": 0.0, "value_function": "head"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("health"))
    scale_eos(folder / "base", 0.4)
    publish_policy(folder, "one")
    return folder


def scale_eos(base, factor):
    """Make a policy end sooner or later; the base that other tests share writes one token as often as more."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[258] *= factor
    model.save_pretrained(base)


def settings(folder, output, train=None, **changes):
    """A config of a run that learns gently."""
    return default_settings(folder, output, GENTLE | (train or {}), **changes)


def scorer(name):
    return [{"kind": "python", "function": f"tests.stage.test_ppo_health:{name}"}]


def failed(values):
    """Names of the checks that failed, in which iterations."""
    found: dict[str, list[int]] = {}
    for line in metrics(values):
        for key in line:
            if key.startswith(health.PREFIX):
                found.setdefault(key.removeprefix(health.PREFIX), []).append(line["iteration"])
    return found


def provoked(values):
    """Run and return what failed; the manifest counts the same."""
    checkpoint = run(values)
    found = failed(values)
    assert checkpoint.info("stage_info")["health"] == {name: len(iterations) for name, iterations in found.items()}
    return found


def nearly_e(prompts, completions, **_):
    return [-sum(min(abs(ord(c) - ord("e")), 100) / 100 for c in str(text)) for text in completions]


def brevity(prompts, completions, **_):
    return [-len(str(text)) / 10 for text in completions]


def tally(prompts, completions, **_):
    return [float(len(str(text))) for text in completions]


def constant(prompts, completions, **_):
    return [0.7] * len(completions)


def test_a_healthy_run_provokes_no_check(place, capsys):
    values = settings(place, "healthy", {"iterations": 12, "value_learning_rate": 3e-3}, health={"grace_iterations": 5})
    assert provoked(values) == {}
    assert "warning" not in capsys.readouterr().out


def test_a_huge_learning_rate(place, capsys):
    found = provoked(settings(place, "huge", EAGER | {"iterations": 2, "learning_rate": 0.3, "num_ppo_epochs": 4, "max_grad_norm": None}, **FREE))
    assert {"ratio_explosion", "clip_fraction"} <= found.keys()
    said = capsys.readouterr().out
    assert "warning: clip_fraction: clip fraction 0." in said
    assert "Remedy: lower train.learning_rate" in said


def test_a_scorer_that_pays_for_one_token(place):
    """The nearer to "e" the better; half the entropy is gone within six iterations of 32 completions of two tokens."""
    pinned = {"missing_eos": "none", "sampling": {"max_new_tokens": 2, "stop_at_eos": False}, "health": {"min_entropy_share": 0.5}}
    train_ = EAGER | {"iterations": 7, "learning_rate": 0.01, "num_ppo_epochs": 4, "rollout_batch_size": 32, "micro_batch_size": 32}
    values = settings(place, "e", train_, **FREE, **pinned, scorers=scorer("nearly_e"))
    found = provoked(values)["entropy_collapse"]
    entropy = [line["policy/entropy"] for line in metrics(values)]
    assert found == [i for i, now in enumerate(entropy, 1) if now < 0.5 * entropy[0]]


def test_a_scorer_that_pays_for_brevity(place):
    found = provoked(settings(place, "brief", EAGER | {"iterations": 7}, **FREE, scorers=scorer("brevity"), missing_eos="none"))
    assert {"length_drift", "short_completions"} <= found.keys()
    assert 1 not in found["length_drift"]


def test_a_policy_that_never_ends(place, tmp_path):
    folder = shutil.copytree(place, tmp_path / "endless")
    scale_eos(folder / "base", -0.5)
    publish_policy(folder, "one")
    small = {"iterations": 5, "rollout_batch_size": 8}
    assert provoked(settings(folder, "endless", small)) == {"no_eos": [4, 5]}, "24 completions without an EOS may be an accident, 32 are not"
    fixed = settings(folder, "fixed", small, sampling={"max_new_tokens": 10, "stop_at_eos": False})
    assert provoked(fixed) == {}, "where every completion is meant to be cut, no EOS is missing"


def test_a_scorer_that_says_nothing(place):
    found = provoked(settings(place, "flat", {"iterations": 1}, scorers=scorer("constant"), **FREE))
    assert found == {"flat_scores": [1]}


def test_scores_outside_the_clip(place):
    found = provoked(settings(place, "clipped", {"iterations": 1}, scorers=scorer("tally"), score_clip=0.5, **FREE))
    assert found.keys() == {"score_clipped"}


def test_values_that_may_not_move_as_far_as_they_must(place):
    train_ = {"iterations": 1, "num_ppo_epochs": 4, "value_learning_rate": 0.1, "max_grad_norm": None}
    found = provoked(settings(place, "narrow", train_, scorers=scorer("tally"), value_clip_range=0.01, score_clip=None, **FREE))
    assert found.keys() == {"value_clip"}


def test_a_score_that_rises_against_the_held_out_one(place):
    """Trained on brevity, held out for length: the best held-out score is an early one."""
    (place / "held_out.jsonl").write_text('{"prompt": "a ship"}\n{"prompt": "blue and green"}\n{"prompt": "who"}\n')
    evaluation = {"every": 1, "prompts": str(place / "held_out.jsonl"), "samples_per_prompt": 16, "scorers": scorer("tally")}
    values = settings(
        place, "against", EAGER | {"iterations": 7, "learning_rate": 0.01}, **FREE, scorers=scorer("brevity"), missing_eos="none", evaluation=evaluation,
        stopping={"over_optimisation": None},
    )  # fmt: skip
    found = provoked(values)["over_optimisation"]
    assert min(found) > 3, "three evaluations after the best one at the earliest"


# -- injected faults


def faulty_models(monkeypatch, break_it):
    """The models of the next run, after `break_it` has had them."""
    build = train.build_models

    def built(*arguments):
        models = build(*arguments)
        break_it(models)
        return models

    monkeypatch.setattr(train, "build_models", built)


def faulty_sampler(monkeypatch, sample_otherwise):
    """Rollouts from `sample_otherwise(sample, model, prompt_ids, **keywords)`."""
    sample = native.sample
    monkeypatch.setattr(native, "sample", lambda model, prompt_ids, **keywords: sample_otherwise(sample, model, prompt_ids, **keywords))


def test_a_value_head_that_predicts_the_opposite(place, monkeypatch):
    def corrupt(models):
        with torch.no_grad():
            models.trained.value_head.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(0))

    faulty_models(monkeypatch, corrupt)
    values = settings(place, "corrupt", {"iterations": 8, "learning_rate": 1e-6, "value_warmup_iterations": 1}, health={"grace_iterations": 2}, **FREE)
    assert provoked(values)["explained_variance"][0] == 7, "one iteration of warm-up, two of grace, four that are looked at"


def test_rollouts_from_weights_that_were_not_updated(place, monkeypatch):
    """They come from the reference, not from the policy: KL has the sign of -KL(reference || policy)."""
    stale = {}

    def sample_from_the_start(sample, model, prompt_ids, **keywords):
        return sample(stale.setdefault("model", deepcopy(model)), prompt_ids, **keywords)

    faulty_sampler(monkeypatch, sample_from_the_start)
    found = provoked(settings(place, "stale", EAGER | {"iterations": 4, "learning_rate": 0.01}, **FREE))
    assert {"negative_kl", "sampler_gap"} <= found.keys()


def test_a_sampler_at_another_temperature(place, monkeypatch):
    def hotter(sample, model, prompt_ids, sampling, **keywords):
        return sample(model, prompt_ids, sampling=sampling.model_copy(update={"temperature": 2.0}), **keywords)

    faulty_sampler(monkeypatch, hotter)
    assert "sampler_gap" in provoked(settings(place, "hot", {"iterations": 1}, **FREE))


def test_an_update_that_does_not_compute_what_the_rollout_stored(place, monkeypatch):
    real = train.experience_of

    def noisy(*arguments, **keywords):
        experience, rewards = real(*arguments, **keywords)
        experience.old_logprobs.add_(0.3 * torch.randn(experience.old_logprobs.shape, generator=torch.Generator().manual_seed(0)))
        return experience, rewards

    monkeypatch.setattr(train, "experience_of", noisy)
    assert "first_step" in provoked(settings(place, "noisy", {"iterations": 1}, **FREE))


def test_gradients_that_are_not_finite(place, monkeypatch):
    calls = []

    def overflow_once(gradient):
        calls.append(1)
        return gradient * float("nan") if len(calls) == 1 else gradient

    faulty_models(monkeypatch, lambda models: models.trained.value_head.weight.register_hook(overflow_once))
    assert provoked(settings(place, "overflow", {"iterations": 2, "num_minibatches": 1}, **FREE)) == {"skipped_steps": [1]}


# -- what a failed check does


def test_a_warning_is_printed_when_it_starts_and_again_only_after_it_had_gone(place, monkeypatch, capsys):
    """flat, flat, spread, flat: two warnings, three lines with the mark."""
    turns = iter([constant, constant, tally, constant])
    monkeypatch.setattr("tests.stage.test_ppo_health.turn", lambda *a, **k: next(turns)(*a, **k), raising=False)
    values = settings(place, "turns", {"iterations": 4}, scorers=scorer("turn"), **FREE)
    assert provoked(values)["flat_scores"] == [1, 2, 4]
    assert capsys.readouterr().out.count("warning: flat_scores: ") == 2


def test_stop_saves_and_ends_the_run_and_the_same_command_goes_on(place, capsys):
    values = settings(place, "stop", {"iterations": 4, "save_every": 100}, scorers=scorer("constant"), health={"action": "stop"}, **FREE)
    with pytest.raises(UserError, match=r"flat_scores: all completions scored 0.7\. Cause: .* Remedy: check the scorers"):
        run(values)
    assert len(metrics(values)) == 1
    assert (Path(values["output"]) / "resume" / "checkpoint-1").exists()
    assert not Registry(values["registry"]).list("ppo", "stop")
    capsys.readouterr()
    resumed = run(values)
    said = capsys.readouterr().out
    assert "continuing from checkpoint-1" in said
    assert "warning" not in said, "what failed before the interruption has been said"
    straight = settings(place, "straight", {"iterations": 4, "save_every": 100}, scorers=scorer("constant"), **FREE)
    whole = run(straight)
    assert metrics(values) == metrics(straight)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


def test_stop_on_a_full_disk_names_the_check_all_the_same(place, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write_position", full)
    with pytest.raises(UserError, match=r"flat_scores(.|\n)*could not be saved as it is"):
        run(settings(place, "stop-full", {"iterations": 2}, scorers=scorer("constant"), health={"action": "stop"}, **FREE))
    assert "the save after iteration 1 could not be written ([Errno 28] No space left on device)" in capsys.readouterr().out


def test_off_and_ignored_checks_are_not_made(place):
    ill = settings(place, "off", {"iterations": 1}, scorers=scorer("constant"), health={"action": "off"}, **FREE)
    assert provoked(ill) == {}
    ignored = settings(place, "ignored", {"iterations": 1}, scorers=scorer("constant"), health={"ignore": ["flat_scores"]}, **FREE)
    assert provoked(ignored) == {}
