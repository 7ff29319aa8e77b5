"""The parts of `align sweep` that need no process: the space, the metric, the journal, the places, the errors."""

from __future__ import annotations

import json

import pytest

from configs.errors import MissingExtra, UserError
from configs.schema import Chain
from configs.schema.sweep import Range
from launch.cli import main
from launch.sweep import evaluations, jobs, slots, study
from launch.sweep.metric import Metric, metric_of
from launch.sweep.space import combinations, fields_of, from_text, size
from tests.chain.sweeps import LR, Sweeps


@pytest.fixture
def world(tmp_path):
    return Sweeps(tmp_path)


def test_ranges_and_lists_are_read_from_the_command_line():
    found = from_text(["a=1e-5..1e-3:log", "b=4,8,16", "c=0..0.3", "d=8..64:step=8", "e=[all-linear, [q_proj, v_proj]]", "f=linear,cosine"])
    assert found["a"] == Range(low=1e-5, high=1e-3, log=True)
    assert found["b"] == [4, 8, 16]
    assert found["c"] == Range(low=0, high=0.3)
    assert found["d"] == Range(low=8, high=64, step=8)
    assert found["e"] == ["all-linear", ["q_proj", "v_proj"]]
    assert found["f"] == ["linear", "cosine"]


@pytest.mark.parametrize(
    ("word", "says"),
    [("a", "expected KEY="), ("=1", "expected KEY="), ("a=x..y", "are numbers"), ("a=2..1", "low 2 must be below high 1"), ("a=0..1:log", "must lie above 0"), ("a=", "expected KEY=")],
)
def test_a_space_that_is_none_is_refused(word, says):
    with pytest.raises(UserError, match=says):
        from_text([word])


def test_whole_numbers_are_told_by_the_schema_and_combinations_counted():
    space = from_text(["sft.lora.rank=1..3", "sft.train.epochs=1..2:step=0.5", "sft.loss_on=all,last"])
    rank, epochs, loss = fields_of(space, Chain)
    assert (rank.whole, epochs.whole) == (True, False)
    assert rank.every() == [1, 2, 3]
    assert epochs.every() == [1, 1.5, 2]
    assert size([rank, epochs, loss]) == 18
    assert combinations([rank, loss])[:2] == [{"sft.lora.rank": 1, "sft.loss_on": "all"}, {"sft.lora.rank": 1, "sft.loss_on": "last"}]
    with pytest.raises(UserError, match=r"a grid needs steps or a list of values for sft\.train\.learning_rate"):
        combinations(fields_of(from_text([f"{LR}=1e-5..1e-3:log"]), Chain))
    with pytest.raises(UserError, match="expected whole numbers"):
        fields_of(from_text(["sft.lora.rank=0.5..3"]), Chain)
    with pytest.raises(UserError, match="a value stands twice"):
        fields_of(from_text(["sft.lora.rank=4,4"]), Chain)


def test_the_config_s_own_values_are_found_in_the_space():
    rank, rate, targets = fields_of(from_text(["sft.lora.rank=8..64:step=8", f"{LR}=1e-5..1e-3:log", "sft.lora.target_modules=all-linear,[q_proj]"]), Chain)
    assert [rank.label_of(16), rank.label_of(12), rate.label_of(1e-4), rate.label_of(1), rate.label_of(None)] == [[16], None, [1e-4], None, None]
    assert targets.label_of(["q_proj"]) == ['["q_proj"]']
    assert targets.value_of('["q_proj"]') == ["q_proj"]
    assert [rate.value_of(0.00012345678912), rate.value_of(0.000123456), rate.value_of(0.00099999999999)] == [0.0001235, 0.000123456, 0.001]


def test_a_key_that_is_none_and_a_value_out_of_range_are_told_before_anything_starts(world):
    with pytest.raises(UserError) as error:
        world.setting("sft.trian.learning_rate=1e-5..1e-3", "sft.train.warmup=0.5..1.5", "ppo.kl_coef=-1,0.1")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("space: sft.trian.learning_rate=")
    assert "Did you mean 'train'?" in lines[0]
    assert lines[1] == "space: sft.train.warmup=1.5: sft.train.warmup: found 1.5; expected a number below 1"
    assert lines[2] == "space: ppo.kl_coef=-1: ppo.kl_coef: found -1; expected a number of at least 0"
    with pytest.raises(UserError, match=r"sft\.train\.batch_size 12 is not a multiple of 8"):
        world.setting("sft.train.batch_size=12,16", sampler="grid")
    assert not world.out.exists()


def test_by_default_the_first_stage_s_learning_rate_is_tried_around_the_config_s(world):
    setting = world.setting()
    (field,) = setting.fields
    assert (field.key, field.values) == (LR, Range(low=1e-3, high=1e-1, log=True))
    assert (setting.metric.name, setting.metric.stage, setting.metric.goal) == ("evaluation/loss", "sft", "min")
    assert setting.first() == {LR: 1e-2}
    assert setting.parts.own == {"sft"}
    assert "no space was given: sft.train.learning_rate is tried from 0.001 to 0.1" in setting.notes[0]
    assert world.setting(stage="dpo").fields[0].key == "dpo.train.learning_rate"
    assert world.setting("ppo.kl_coef=0.01..0.1").metric == Metric("evaluation/score", "ppo", "max")


def test_the_section_of_the_chain_is_read_and_the_command_line_wins(world):
    world.file.write_text(world.file.read_text() + f"sweep: {{space: {{{LR}: {{low: 1e-4, high: 1e-2, log: true}}}}, trials: 5, sampler: random}}\n")
    setting = world.setting(trials=7)
    assert (setting.spec.trials, setting.spec.sampler, setting.fields[0].values) == (7, "random", Range(low=1e-4, high=1e-2, log=True))
    with pytest.raises(UserError, match="--trials: found 0"):
        world.setting(trials=0)


def test_metrics_and_their_stages(world):
    chain = world.setting().chain([])
    assert metric_of(chain, "reward/eval_accuracy", None, None, []).stage == "reward"
    assert metric_of(chain, "ece", "reward", None, []).goal == "min"
    assert metric_of(chain, "evaluation/win_rate", None, None, ["sft", "ppo"]) == Metric("evaluation/win_rate", "ppo", "max")
    with pytest.raises(UserError, match="the chain has no section 'eval'; it has sft, reward, dpo, ppo"):
        metric_of(chain, "eval/ppo/score", None, None, [])
    with pytest.raises(UserError, match="is of the stage sft, and stage says dpo"):
        metric_of(chain, "sft/loss", "dpo", None, [])
    with pytest.raises(UserError, match=r"split\.validation is 0"):
        world.setting(overrides=["split.validation=0"])


def test_the_test_part_is_looked_at_by_no_trial_and_never_chosen_by(world):
    """A trial trains its SFT; where another stage is swept, SFT is made once and measured as ever."""
    setting = world.setting("sft.train.learning_rate=1e-3,1e-2")
    values = [("sft.train.learning_rate", 1e-3)]
    assert setting.chain(values).sft.evaluation.test
    assert not setting.trial_chain(values, 0).sft.evaluation.test
    assert "test: true" in setting.subject.text(values), "best.yaml measures it, once"
    assert world.setting("dpo.train.learning_rate=1e-3,1e-2").shared_chain().sft.evaluation.test
    with pytest.raises(UserError, match=r"metric 'test/loss': the test part is looked at once, and never to choose by; take evaluation/loss"):
        world.setting("sft.train.learning_rate=1e-3,1e-2", metric="test/loss", stage="sft")


def test_a_metric_of_one_s_own_is_better_the_way_that_the_config_says(world):
    own = '{metrics: [{kind: python, function: "m:distance"}], generate: {rows: 4}, metric: evaluation/distance, mode: min}'
    chain = world.setting(overrides=[f"sft.evaluation={own}", "sft.train.save_every=10"]).chain([])
    assert metric_of(chain, "evaluation/distance", "sft", None, []).goal == "min"
    assert metric_of(chain, "evaluation/distance", "sft", "max", []).goal == "max"
    assert metric_of(chain, "evaluation/rouge1", "sft", None, []).goal == "max"


def test_without_a_metric_trials_are_judged_by_what_the_stage_publishes_by(world):
    rouge = "sft.evaluation={metrics: [rouge], generate: {rows: 4}, metric: evaluation/rougeL}"
    setting = world.setting("sft.train.learning_rate=1e-3,1e-2", overrides=[rouge])
    assert setting.metric == Metric("evaluation/rougeL", "sft", "max")
    assert "no metric was given: trials are judged by evaluation/rougeL, which sft.evaluation.metric chooses the published state by (more is better)" in setting.notes
    early = world.setting("sft.train.learning_rate=1e-3,1e-2", overrides=["sft.evaluation.early_stopping={patience: 2}"])
    assert early.metric == Metric("evaluation/loss", "sft", "min")
    assert any("which sft.evaluation.early_stopping chooses" in note for note in early.notes)
    trial = early.trial_chain([("sft.train.learning_rate", 1e-3)], 1).sft
    assert (trial.evaluation.early_stopping.patience, trial.keep_resume) == (2, False), "nobody goes on from a trial's last state"
    assert world.setting("sft.train.learning_rate=1e-3,1e-2", overrides=[rouge], metric="evaluation/loss").metric.name == "evaluation/loss"
    assert world.setting("ppo.kl_coef=0.01,0.1", overrides=["ppo.evaluation.metric=-evaluation/length"]).metric == Metric("evaluation/length", "ppo", "min")
    assert any("the validation loss of dpo (less is better)" in note for note in world.setting("dpo.beta=0.1,0.2").notes)


def test_where_a_metric_is_read(tmp_path):
    lines = [{"step": 5, "sft/loss": 3.0}, {"step": 5, "sft/eval_loss": 2.0}, {"step": 9, "sft/eval_loss": 1.0}]
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10, "sft/ev')
    metric = Metric("evaluation/loss", "sft", "min")
    assert metric.series(tmp_path) == [(5, 2.0), (9, 1.0)]
    assert metric.value(tmp_path, {"loss": 0.5}) == 0.5, "what was published, which may be the best and not the last"
    assert metric.value(tmp_path, {}) == 1.0
    assert Metric("sft/loss", "sft", "min").value(tmp_path, {"loss": 0.5}) == 3.0
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps({"models": {"ppo": {"score": {"mean": 0.7, "se": 0.1}, "kl": {"k1": 2.0, "k3": 1.9}, "win_rate": 0.6}}}))
    found = [Metric(f"eval/ppo/{name}", "eval", "max").value(tmp_path, {}) for name in ("score", "gold", "kl", "kl/k3", "win_rate")]
    assert found == [0.7, 0.7, 2.0, 1.9, 0.6]
    with pytest.raises(LookupError, match=r"Did you mean 'eval/ppo/win_rate'"):
        Metric("eval/ppo/winrate", "eval", "max").value(tmp_path, {})


def test_trials_are_evaluated_often_enough_to_be_ended(world):
    setting = world.setting(overrides=["sft.train.eval_every=null", "sft.train.max_steps=100"])
    assert setting.extra([]) == [("sft.train.eval_every", 11), ("sft.train.save_every", 33)]
    assert world.setting(overrides=["sft.train.max_steps=100"]).extra([]) == [], "the config says it itself"
    rows = "".join(json.dumps({"prompt": f"p{number}", "completion": "b"}) + "\n" for number in range(400))
    (world.folder / "demos.jsonl").write_text(rows)
    setting = world.setting(overrides=["sft.train.eval_every=null", "sft.train.epochs=4", "sft.train.batch_size=8", "split.test=0"])
    (every, _) = evaluations.spread(setting.chain([]), setting.metric, setting.spec)
    assert every == ("sft.train.eval_every", 21)  # 380 or so of 400 rows are trained on: 4 x 380 / 8 = 190 steps, 9 evaluations


def test_a_journal_that_a_kill_cut_is_mended(tmp_path):
    file = study.journal(tmp_path)
    first = study.begin(tmp_path, "min", {"config": "x"})
    first.set_user_attr("shared", True)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code":2,"worker_id":"a", "user_a')
    (tmp_path / "study.jsonl.lock").touch()
    assert study.begin(tmp_path, "min", {"config": "x"}).user_attrs["shared"] is True
    assert not (tmp_path / "study.jsonl.lock").exists()
    assert all(json.loads(line) for line in file.read_text().splitlines())
    with pytest.raises(UserError, match="no sweep was begun here"):
        study.there(tmp_path / "other")


def test_draws_do_not_depend_on_when_the_sweep_was_stopped(world):
    setting = world.setting(f"{LR}=1e-5..1e-1:log", sampler="random", trials=6)
    whole = study.preview(setting.fields, None, False, setting.spec, 6)
    again = study.preview(setting.fields, None, False, setting.spec, 3)
    assert whole[:3] == again
    assert len({draw[LR] for draw in whole}) == 6
    other = setting.spec.model_copy(update={"seed": 1})
    assert study.preview(setting.fields, None, False, other, 3) != again


def test_gpus_and_threads_are_shared_out(world, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(slots.os, "sched_getaffinity", lambda pid: range(8))
    chain = world.setting().chain([])
    assert slots.places(chain, 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert slots.places(chain, 1) == [{}]
    monkeypatch.setattr(slots, "count_gpus", lambda: 4)
    monkeypatch.setattr("configs.machines.count_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert slots.places(chain, 2) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert slots.places(chain, 3) == [{"CUDA_VISIBLE_DEVICES": name} for name in "012"]
    with pytest.raises(UserError, match=r"there are 4 GPU\(s\), and every trial needs its own"):
        slots.places(chain, 5)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["[sft] error: broken", "error: sft ended with exit code 1; its log: x"], "broken"),
        (["Traceback (most recent call last):", "[sft] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "error: sft ended with exit code 1"], "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
        (["error: sft was killed by signal 9; its log: x"], "sft was killed by signal 9; its log: x"),
        ([], "it ended with exit code 1 and said nothing"),
    ],
)
def test_why_a_trial_failed_is_read_from_its_newest_run(tmp_path, lines, error):
    log = tmp_path / "log"
    log.write_text("--- then\nerror: an older one\n--- now\n" + "".join(f"{line}\n" for line in lines))
    assert jobs.error_in(log, 1) == error


def test_errors_are_alike_but_for_numbers_and_paths():
    assert jobs.alike(["loss is nan at step 12 in /a/b/c", "loss is nan at step 3 in /a/d"])
    assert not jobs.alike(["loss is nan at step 12", "out of memory"])


def test_a_trial_at_its_end_is_not_ended_early(tmp_path):
    log = tmp_path / "log"
    log.write_text("[sft] sft 30/40  loss 1.2\n")
    assert not jobs.at_its_end(log)
    log.write_text("[sft] sft 30/40  loss 1.2\n[sft] sft 40/40  eval_loss 1.0\n[sft] publishing\n")
    assert jobs.at_its_end(log)


def test_without_optuna_the_extra_is_named(world, monkeypatch, capsys):
    monkeypatch.setattr("configs.extras.find_spec", lambda package: None)
    assert main(["sweep", str(world.file)]) == 2
    assert "pip install 'align-stack[sweep]'" in capsys.readouterr().err
    with pytest.raises(MissingExtra):
        raise MissingExtra("x", "sweep")


def test_a_dry_run_prints_the_space_and_the_first_commands(world, capsys):
    assert main(["sweep", str(world.file), "--space", f"{LR}=1e-4..1e-1:log", "--trials", "4", "--dry-run", "sft.train.epochs=2"]) == 0
    out = capsys.readouterr().out
    assert "space: sft.train.learning_rate: 0.0001 to 0.1, log-uniform" in out
    assert "4 trials, 1 at once" in out
    assert f"as: align run {world.file} sft.train.epochs=2 sft.train.learning_rate=0.01" in out
    assert not world.out.exists()
    assert main(["sweep", "show", str(world.folder)]) == 2
    assert main(["sweep", str(world.file), "--json", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["own"] == ["sft"]
