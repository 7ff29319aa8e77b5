"""A PPO run that is watched: what it evaluates on, what it publishes, when it stops, and that a kill changes none of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.schema import PPOStage
from stages import models
from stages.evaluation.statistics import Estimate
from stages.ppo import monitor, state, train
from stages.ppo.prompts import load_evaluation
from stages.registry import Registry
from stages.tokens import load_tokens
from stages.training import saves
from tests.stage import ppo_runs
from tests.stage.ppo_runs import HELD_OUT, LORA, PROMPTS, metrics, publish_reward, run, settings, weights, workspace

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
VOWELS = {"kind": "python", "function": "tests.stage.ppo_runs:share_of_vowels"}
FEWER = VOWELS | {"weight": -1.0}
MODES = {"full": {}, "lora": {"lora": LORA, "scorers": [VOWELS, {"kind": "model", "checkpoint": "reward/adapter", "weight": 0.1}], "ema_decay": 0.9}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("watched"))
    publish_reward(folder, "adapter", lora=True)
    return folder


def watched(place, output, mode="full", train=None, stopping=None, **evaluation):
    """A run of seven iterations, evaluated every two and saved every three."""
    section = {"every": 2, "prompts": str(place / "held_out.jsonl"), "samples_per_prompt": 3} | evaluation
    rhythm = {"iterations": 7, "save_every": 3, "learning_rate": 3e-3} | (train or {})
    return settings(place, output, rhythm, evaluation=section, stopping=stopping or {}, **MODES[mode], name=mode)


def collapsing(place, output):
    """What PPO trains on (few vowels, so short) is the opposite of what is held out: the start is the best, and the run has to stop."""
    values = watched(place, output, train={"iterations": 16, "rollout_batch_size": 16}, stopping={"over_optimisation": 0.5}, scorers=[VOWELS], samples_per_prompt=8, every=4)
    return values | {"scorers": [FEWER | {"weight": -10.0}], "kl_coef": 0.0}


def by_training_score(place, output):
    """The same, evaluated after every iteration, and the best is chosen by what PPO trains on: that rises on and on."""
    values = collapsing(place, output)
    return values | {"evaluation": values["evaluation"] | {"metric": "evaluation/score", "every": 1}, "train": values["train"] | {"save_every": 1}}


def noticed_at(monkeypatch, iteration):
    """Over-optimisation is seen at this iteration."""
    monkeypatch.setattr(monitor, "over_optimised", lambda _, now, __: Estimate(0.02, 0.01) if now.iteration == iteration else None)


def about_run(checkpoint):
    return checkpoint.info("stage_info")["run"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(place):
    """(metrics, weights, what the manifest says of the run, samples) by name of runs that nothing happened to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name, values in {**{mode: watched(place, f"whole-{mode}", mode) for mode in MODES}, "collapsing": collapsing(place, "whole-collapsing")}.items():
        checkpoint = run(values)
        found[name] = metrics(values), weights(checkpoint), about_run(checkpoint), (Path(values["output"]) / "samples.jsonl").read_text()
    torch.set_num_threads(threads)
    return found


def assert_as_uninterrupted(values, expected, checkpoint):
    lines, tensors, facts, samples = expected
    assert metrics(values) == lines
    assert about_run(checkpoint) == facts
    assert (Path(values["output"]) / "samples.jsonl").read_text() == samples
    assert equal(weights(checkpoint), tensors)


# -- what is evaluated


def test_row_23_evaluations_stand_where_the_config_says_and_hold_every_metric(place, uninterrupted):
    lines, _, facts, samples = uninterrupted["full"]
    evaluations = [line for line in lines if "evaluation/score" in line]
    assert [line["iteration"] for line in evaluations] == [0, 2, 4, 6, 7]
    assert [line["iteration"] for line in lines if "objective/score" in line] == list(range(1, 8))
    assert facts["evaluations"] == [{key: value for key, value in line.items() if key.startswith("evaluation/") or key == "iteration"} for line in evaluations]
    names = {"score", "heldout_score", "kl", "kl_k3", "length", "score_se", "kl_se", "kl_k3_se", "length_se", "eos_rate", "win_rate", "win_rate_low", "win_rate_high"}
    assert {f"evaluation/{name}" for name in names} <= evaluations[0].keys()
    first = evaluations[0]
    assert first["evaluation/kl"] == first["evaluation/kl_k3"] == 0.0
    assert first["evaluation/win_rate"] == 0.5
    assert evaluations[-1]["evaluation/kl"] > 0
    rows = [json.loads(line) for line in samples.splitlines()]
    assert [row["prompt"] for row in rows[:4]] == ["blue", "blue", "blue", "a long day"]
    assert len(rows) == 5 * len(HELD_OUT) * 3
    last = [row for row in rows if row["iteration"] == 7]
    assert sum(row["proxy"] for row in last) / len(last) == pytest.approx(evaluations[-1]["evaluation/score"])
    assert sum(row["k1"] for row in last) / len(last) == pytest.approx(evaluations[-1]["evaluation/kl"])


def test_a_policy_that_does_not_change_writes_the_same_at_every_evaluation(place):
    """So a difference between two evaluations is one of the policies: the noise is no function of the iteration."""
    values = watched(place, "still", train={"learning_rate": 1e-30, "value_learning_rate": 3e-3})  # of a weight of 1e-2 that is no part that float32 has
    checkpoint = run(values)
    rows = [json.loads(line) for line in (Path(values["output"]) / "samples.jsonl").read_text().splitlines()]
    by_iteration = [[row | {"iteration": 0} for row in rows if row["iteration"] == n] for n in (0, 2, 4, 6, 7)]
    assert all(found == by_iteration[0] for found in by_iteration)
    assert len({row["completion"] for row in by_iteration[0][:3]}) == 3, "the samples of one prompt differ"
    assert about_run(checkpoint)["published_iteration"] == 0, "of equals the first"


def loaded(place, **changes):
    """The prompts an evaluation of this config uses, as text, or None."""
    cfg = PPOStage.model_validate(settings(place, **changes))
    tokens = load_tokens(models.find(cfg.init_from, cfg.registry))
    chosen = load_evaluation(cfg, tokens.formatter, cfg.max_length)
    return chosen and chosen.prompts.texts


def test_by_default_the_validation_part_of_the_prompts_is_used_and_the_test_part_never(place, tmp_path):
    from stages.data import Splitter, read_prompts

    file = tmp_path / "many.jsonl"
    texts = [f"number {n}" for n in range(60)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*texts, "number 3"]))
    split = {"validation": 0.3, "test": 0.3}
    (place / "apart.jsonl").write_text("".join(json.dumps({"prompt": f"apart {n}"}) + "\n" for n in range(10)))
    cfg = PPOStage.model_validate(settings(place, prompts=str(file), split=split))
    part = {row.prompt[0].content: Splitter(cfg.split).of(row) for row in read_prompts(cfg.prompts).rows}
    assert loaded(place, prompts=str(file), split=split) == [text for text in texts if part[text] == "validation"]
    assert loaded(place, prompts=str(file), split=split, evaluation={"max_prompts": 2}) == [text for text in texts if part[text] == "validation"][:2]
    own = loaded(place, prompts=str(place / "apart.jsonl"), split=split, evaluation={"prompts": str(file), "max_prompts": None})
    assert own == [text for text in texts if part[text] != "test"]


def test_prompts_that_are_trained_on_are_not_evaluated_on(place, tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ["new", PROMPTS[0].upper(), PROMPTS[1]]))
    assert loaded(place, evaluation={"prompts": str(file)}) == ["new"]
    with pytest.raises(UserError, match=r"evaluation\.prompts holds 5 prompts, all of the test part or trained on"):
        loaded(place, evaluation={"prompts": str(place / "prompts.jsonl")})


def test_without_held_out_prompts_there_is_no_evaluation_unless_something_counts_on_it(place, capsys):
    assert loaded(place) is None
    assert "no evaluation: the validation part of prompts is empty" in capsys.readouterr().out
    assert loaded(place, evaluation=None) is None
    for changes in ({"stopping": {"kl_budget": 3.0}}, {"stopping": {"patience": 3}}, {"evaluation": {"scorers": [VOWELS]}}):
        with pytest.raises(UserError, match="there are no held-out prompts"):
            loaded(place, **changes)
    with pytest.raises(ValueError, match=r"stopping\.patience is judged at evaluations, and evaluation is null"):
        PPOStage.model_validate(settings(place, evaluation=None, stopping={"patience": 3}))


def test_held_out_prompts_without_room_for_a_completion_are_none(place, tmp_path, capsys):
    """Of too long ones the first max_prompts do not count either; nobody who asked for no evaluation is refused for them."""
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "x" * 200}) + "\n")
    short.write_text(long.read_text() + json.dumps({"prompt": "new"}) + "\n")
    assert loaded(place, evaluation={"prompts": str(short), "max_prompts": 1}) == ["new"]
    with pytest.raises(UserError, match=r"all 1 held-out prompts leave no room for sampling\.max_new_tokens within max_length"):
        loaded(place, evaluation={"prompts": str(long)})
    both = tmp_path / "both.jsonl"
    both.write_text((place / "prompts.jsonl").read_text() + long.read_text())
    assert loaded(place, prompts=str(both), split={"seed": 22, "validation": 0.2, "test": 0}) is None
    assert "no evaluation: all 1 held-out prompts leave no room" in capsys.readouterr().out


def test_a_metric_that_does_not_exist_is_named_before_training(place):
    values = watched(place, "misnamed", metric="evaluation/gold")
    with pytest.raises(UserError, match=r"evaluation\.metric: there is no 'evaluation/gold'; there are evaluation/eos_rate, .*evaluation/win_rate"):
        run(values)


def test_a_held_out_reward_model_is_pinned_verified_and_a_parent(place):
    scorer = {"kind": "model", "checkpoint": "reward/adapter"}
    values = watched(place, "second", train={"iterations": 2}, scorers=[scorer, VOWELS])
    checkpoint = run(values)
    assert "heldout_scorer" in [parent["role"] for parent in checkpoint.manifest["parents"]]
    assert checkpoint.info("config")["evaluation"]["scorers"][0]["checkpoint"].startswith("reward/adapter@")
    line = metrics(values)[0]
    assert line["evaluation/heldout_score"] == pytest.approx(line["evaluation/heldout_score/reward/adapter"] + line["evaluation/heldout_score/tests.stage.ppo_runs:share_of_vowels"])
    assert line["evaluation/heldout_score"] != line["evaluation/score"]


# -- what is published


def test_row_24_the_best_policy_is_published_and_the_manifest_says_which(place, uninterrupted):
    lines, _, facts, _ = uninterrupted["full"]
    scores = {line["iteration"]: line["evaluation/heldout_score"] for line in lines if "evaluation/score" in line}
    best = max(scores, key=scores.__getitem__)
    assert (facts["published_iteration"], facts["last_iteration"], facts["stopped"]) == (best, 7, None)
    assert (facts["best_metric"], facts["best_value"]) == ("evaluation/heldout_score", scores[best])
    longer = watched(place, "longer", train={"schedule": "constant"}, metric="-evaluation/length")
    lengths = {line["iteration"]: line["evaluation/length"] for line in metrics_of_run(longer) if "evaluation/length" in line}
    best = min(lengths, key=lengths.__getitem__)
    assert 0 < best < 7, "nothing to tell the best from the start or the last by"
    published = weights(Registry(longer["registry"]).resolve("ppo/full"))
    shorter = watched(place, "shorter", train={"schedule": "constant", "iterations": best}, metric="-evaluation/length")
    assert equal(weights(run(shorter)), published), "a run that ends there ends with it"


def metrics_of_run(values):
    run(values)
    return metrics(values)


def test_row_24_over_optimisation_stops_a_run_and_publishes_its_best(place, uninterrupted, capsys):
    lines, tensors, facts, _ = uninterrupted["collapsing"]
    assert facts["stopped"] == "over_optimisation"
    assert facts["last_iteration"] < 16
    assert facts["published_iteration"] == 0
    assert lines[-1]["iteration"] == facts["last_iteration"]
    start = weights(Registry(place / "registry").resolve("sft/one"))
    assert equal({name: start[name] for name in tensors}, tensors)


def test_row_24_over_optimisation_publishes_nothing_after_the_held_out_peak_whatever_the_metric(place, monkeypatch, capsys):
    """The policy of the start, which two others have outdone in the training score since, in a run that goes on, and in one that was cut twice."""
    noticed_at(monkeypatch, 3)
    start, seal, found = weights(Registry(place / "registry").resolve("sft/one")), saves.seal, []
    for name in ("scored", "scored-cut"):
        values = by_training_score(place, name)
        for cut in (".staging-checkpoint-2", "publication") if name == "scored-cut" else ():
            with monkeypatch.context() as patch:
                patch.setattr(saves, "seal", lambda folder, *rest, cut=cut: die() if folder.name == cut else seal(folder, *rest))
                patch.setattr(train, "publish_checkpoint", die)
                with pytest.raises(KeyboardInterrupt):
                    run(values)
        checkpoint = run(values)
        facts, tensors = about_run(checkpoint), weights(checkpoint)
        assert (facts["stopped"], facts["last_iteration"], facts["published_iteration"], facts["heldout_peak"]) == ("over_optimisation", 3, 0, 0)
        assert equal({key: start[key] for key in tensors}, tensors)
        assert "ppo: publishing iteration 0 of 3, the best by evaluation/score up to iteration 0, where the held-out score was highest" in capsys.readouterr().out
        found.append((facts, metrics(values)))
    assert found[0] == found[1]
    scores = [line["evaluation/score"] for line in found[0][1] if "evaluation/score" in line]
    assert len({max(scores[: n + 1]) for n in range(len(scores))}) >= 3, "the start is none of the two newest that were the best by the training score"


def test_an_over_optimised_policy_is_not_published_where_nothing_better_can_be_read(place, monkeypatch):
    noticed_at(monkeypatch, 2)
    monkeypatch.setattr(state, "load_best", damaging({0}, state.load_best))
    with pytest.raises(UserError, match=r"none of the best policies can be read, and the last one is over-optimised: its held-out score has fallen; delete \S+ and run again"):
        run(by_training_score(place, "scored-damaged"))


def test_row_24_a_run_above_its_kl_budget_stops_and_publishes_what_is_within(place, capsys):
    values = watched(place, "budget", train={"iterations": 30}, stopping={"kl_budget": 0.5})
    checkpoint = run(values)
    facts = about_run(checkpoint)
    kl = {row["iteration"]: row["evaluation/kl"] for row in facts["evaluations"]}
    assert facts["stopped"] == "kl_budget"
    assert kl[facts["last_iteration"]] > 0.5 >= kl[facts["published_iteration"]]
    assert "ppo: stopped after iteration" in capsys.readouterr().out


def test_a_run_that_starts_above_its_kl_budget_says_so(place):
    from tests.tiny import tiny_model

    tiny_model(place / "other", initializer_range=0.4)
    values = watched(place, "far", stopping={"kl_budget": 0.5}) | {"reference": str(place / "other"), "template": "raw"}
    with pytest.raises(UserError, match=r"no policy of this run may be published: at iteration 0, KL .* is above stopping\.kl_budget 0\.5"):
        run(values)


# -- interrupted


def test_an_evaluation_that_is_switched_on_within_a_run_starts_there(place, monkeypatch):
    """The line of that evaluation is none of an iteration: health checks and the manifest's metrics pass over it."""
    values = watched(place, "switched", train={"save_every": 1}) | {"evaluation": None}
    with monkeypatch.context() as patch:
        patch.setattr(saves, "seal", lambda folder, *rest, seal=saves.seal: die() if folder.name == ".staging-checkpoint-3" else seal(folder, *rest))
        with pytest.raises(KeyboardInterrupt):
            run(values)
    checkpoint = run(watched(place, "switched", train={"save_every": 1}, metric="-evaluation/kl") | {"allow_changed": ["config", "data"]})
    assert [line["iteration"] for line in metrics(values) if "evaluation/score" in line] == [2, 4, 6, 7]
    assert [line["iteration"] for line in metrics(values) if "objective/score" in line] == list(range(1, 8))
    found = about_run(checkpoint)["published_iteration"]
    assert {"objective/score", "evaluation/score"} <= checkpoint.info("metrics").keys(), f"of iteration {found}"


def die(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("mode", "name"), [("full", "checkpoint-6"), ("full", "best-2"), ("lora", "best-6"), ("lora", "checkpoint-3")])
def test_trap_14_a_run_cut_while_it_writes_ends_as_the_uninterrupted_one(place, uninterrupted, mode, name, monkeypatch):
    """checkpoint-6: between an evaluation and its save; best-N: half a best policy lies there."""
    values = watched(place, f"cut-{mode}-{name}", mode)
    seal = saves.seal
    with monkeypatch.context() as patch:
        patch.setattr(saves, "seal", lambda folder, *rest: die() if folder.name == f".staging-{name}" else seal(folder, *rest))
        with pytest.raises(KeyboardInterrupt):
            run(values)
    assert_as_uninterrupted(values, uninterrupted[mode], run(values))


@pytest.mark.parametrize("name", ["full", "collapsing"])
def test_trap_14_a_run_cut_before_its_publication_publishes_the_same(place, uninterrupted, name, monkeypatch):
    """After the last iteration, and after an early stop."""
    values = watched(place, "unpublished") if name == "full" else collapsing(place, "unpublished-early")
    with monkeypatch.context() as patch:
        patch.setattr(train, "publish_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            run(values)
    assert_as_uninterrupted(values, uninterrupted[name], run(values))


def test_trap_14_a_run_killed_by_the_kernel_inside_an_evaluation_ends_as_the_uninterrupted_one(place, uninterrupted, monkeypatch):
    """SIGKILL in the third evaluation, in a process of its own. Its scorer is called in evaluations alone, else the values are the same."""
    mortal = {"evaluation": {"every": 2, "prompts": str(place / "held_out.jsonl"), "samples_per_prompt": 3, "scorers": [VOWELS | {"function": "tests.stage.ppo_runs:mortal"}]}}
    whole, killed = (watched(place, output) | mortal for output in ("whole-mortal", "killed"))
    whole_checkpoint = run(whole)
    config = place / "killed.json"
    config.write_text(json.dumps(killed))
    environment = os.environ | {"PPO_TEST_DIES_AT": "kill:4", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-m", "stages.ppo", "--config", str(config)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert [line["iteration"] for line in metrics(killed)] == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(ppo_runs, "calls", 0)
    expected = metrics(whole), weights(whole_checkpoint), about_run(whole_checkpoint), (Path(whole["output"]) / "samples.jsonl").read_text()
    assert_as_uninterrupted(killed, expected, run(killed))


def damaging(names, load_best):
    """load_best, before which the kept policies of the iterations in `names` lose a bit."""

    def damage(folder, module, iteration):
        if iteration in names:
            file = folder / f"best-{iteration}" / "weights.safetensors"
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        return load_best(folder, module, iteration)

    return damage


def test_a_damaged_best_policy_is_named_and_an_older_one_published(place, uninterrupted, monkeypatch, capsys):
    best = uninterrupted["full"][2]["published_iteration"]
    assert best > 0
    monkeypatch.setattr(state, "load_best", damaging({best}, state.load_best))
    checkpoint = run(watched(place, "damaged"))
    said = capsys.readouterr().out
    assert f"the best policy, of iteration {best}, can't be used: weights.safetensors is damaged; falling back to an older one" in said
    older = about_run(checkpoint)["published_iteration"]
    assert older < best
    if older == 0:
        start = weights(Registry(place / "registry").resolve("sft/one"))
        assert equal({name: start[name] for name in weights(checkpoint)}, weights(checkpoint))


def test_where_every_best_policy_is_damaged_the_last_is_published_if_the_budget_allows_it(place, monkeypatch, capsys):
    monkeypatch.setattr(state, "load_best", damaging(set(range(7)), state.load_best))
    train = {"iterations": 3}
    assert about_run(run(watched(place, "all-damaged", train=train)))["published_iteration"] == 3
    assert "none of the best policies can be used; the last one is published, of iteration 3" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"none of the best policies can be read, and the last has a KL of .* nats, which stopping.kl_budget does not allow"):
        run(watched(place, "all-damaged-far", train={"iterations": 30}, stopping={"kl_budget": 0.5}))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), "SafetensorError"])
def test_a_full_disk_costs_what_was_to_be_written_and_not_the_run(place, uninterrupted, error, monkeypatch, capsys):
    """Every save and every best policy after the start: the run goes on, and the start is what can be published."""
    import safetensors
    import safetensors.torch

    best = uninterrupted["full"][2]["published_iteration"]
    save_file = safetensors.torch.save_file

    def full(tensors, path, **more):
        if ".staging" in str(path) and not str(path.parent).endswith("best-0"):
            path.write_bytes(b"half")
            raise error if isinstance(error, OSError) else safetensors.SafetensorError("I/O error: No space left on device")
        save_file(tensors, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        values = watched(place, f"full-disk-{type(error).__name__}")
        checkpoint = run(values)
    said = capsys.readouterr().out
    assert f"best-{best} could not be written" in said
    assert "the save after iteration 3 could not be written" in said
    assert f"the best policy, of iteration {best}, can't be used: it is not there" in said
    assert metrics(values) == uninterrupted["full"][0]
    assert about_run(checkpoint)["published_iteration"] == 0
