"""`align sft --continue`: what is trained on, what is kept out, what got better and worse, and what is refused."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from launch import cli, continuing
from stages import sft
from stages.registry import Registry
from tests.stage.runs import run, settings, weights, workspace, write_rows
from tests.unit.registry_samples import publish

MORE = ["train.max_steps=2", "train.batch_size=4", "train.micro_batch_size=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """sft/whole and the adapter sft/lora, trained on sft.jsonl; new.jsonl says other things."""
    folder = workspace(tmp_path_factory.mktemp("continue"))
    run("sft", settings(folder, "sft", {"max_steps": 6}, name="whole"))
    run("sft", settings(folder, "sft", {"max_steps": 6, "learning_rate": 3e-3}, name="lora", lora={"rank": 4, "alpha": 8}))
    new = [{"prompt": f"tell me of {index}", "completion": f"it is {index % 3} now, friend"} for index in range(60)]
    write_rows(folder / "new.jsonl", new)
    (folder / "text.txt").write_text("once upon a time there was a small cat who liked pears\n" * 4)
    return folder


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    monkeypatch.chdir(place)


def asked(*words: str) -> argparse.Namespace:
    return cli.parse(["sft", "--registry", "registry", *words])


def train_on(*words: str):
    """The run that a command line asks for, in this process; what it publishes."""
    cfg = continuing.resolve(asked(*words))
    sft.main(cfg)
    return Registry("registry").resolve(f"sft/{cfg.name}"), cfg


def forward_losses(checkpoint, rows: str, part: str) -> float:
    """Loss per completion token over one part of a file, by plain transformers and peft, row by row."""
    from configs.schema.common import Source, Split
    from stages import data, models
    from stages.tokens import load_tokens

    origin = models.find(checkpoint.ref, Path("registry"))
    tokens, model = load_tokens(origin), models.load_policy(origin)
    held = getattr(data.Splitter(Split(validation=0.1, test=0.1)).split(data.read_demonstrations([Source(path=rows)]).rows), part)
    loss = count = 0.0
    for row in held:
        encoded = tokens.formatter.demonstration(row)
        with torch.no_grad():
            logprobs = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1].double().log_softmax(-1)
        for position, (token, counts) in enumerate(zip(encoded["input_ids"][1:], encoded["completion_mask"][1:], strict=True)):
            loss, count = loss - logprobs[position, token].item() * counts, count + counts
    return loss / count


def test_whole_weights_are_trained_on_as_a_new_version_and_compared(place, capsys, monkeypatch):
    from stages import models
    from stages.evaluation import likelihood
    from stages.tokens import load_tokens

    monkeypatch.setattr(likelihood, "WINDOW", 128)  # the rows of the run
    before = Registry("registry").resolve("sft/whole@1")
    made, cfg = train_on("--continue", "sft/whole", "--data", "new.jsonl", "--plain-text", "text.txt", *MORE, "train.learning_rate=3e-3", "train.max_steps=4")
    assert (made.ref, made.manifest["parents"][0]["ref"]) == ("sft/whole@2", "sft/whole@1")
    assert cfg.max_length == 128, "the parent's config"
    assert str(cfg.output).startswith("runs/sft-whole-continued-")
    record = made.info("continued")
    sets = {found["name"]: found for found in record["sets"]}
    assert list(sets) == ["new data", "data of sft/whole@1", "plain text"]
    for name, file in (("new data", "new.jsonl"), ("data of sft/whole@1", str(place / "sft.jsonl"))):
        for when, checkpoint in (("before", before), ("after", made)):
            assert sets[name]["loss"][when] == pytest.approx(forward_losses(checkpoint, file, "validation"), rel=1e-4), (name, when)
    for when, ref in (("before", "sft/whole@1"), ("after", "sft/whole@2")):
        origin = models.find(ref, Path("registry"))
        perplexity = likelihood.text_perplexity(models.load_policy(origin), load_tokens(origin).tokenizer, Path("text.txt"), pad_id=256)
        assert sets["plain text"]["perplexity"][when] == pytest.approx(perplexity, rel=1e-4)
    assert sets["new data"]["verdict"] == "better"
    assert sets["new data"]["loss"]["after"] == pytest.approx(made.info("metrics")["loss"], rel=1e-5)
    assert sets["data of sft/whole@1"]["loss"]["before"] == pytest.approx(before.info("metrics")["loss"], rel=1e-5)
    assert "note" not in sets["data of sft/whole@1"]
    capsys.readouterr()
    assert cli.main(["registry", "show", "sft/whole@2", "--registry", "registry"]) == 0
    shown = capsys.readouterr().out
    assert "trained on from sft/whole@1" in shown
    assert re.search(r"new data \(n=\d+\) .* better", shown)
    assert "apple" not in json.dumps(record), "no text in a manifest"


def test_the_config_s_metrics_are_compared_on_the_rows_that_the_run_s_evaluations_complete(place, capsys):
    """ROUGE, chrF, exact match, labels and a function of one's own, before and after, on new and old rows; what new rows come to is what the run itself evaluates."""
    own = '{kind: python, function: "tests.stage.test_continue:shortness"}'
    evaluation = f"evaluation={{metrics: [exact_match, rouge, chrf, bleu, accuracy, {own}], labels: [apple please, it is 0 now, 'it is 1 now, friend'], generate: {{rows: 3, max_new_tokens: 8}}}}"
    write_rows(place / "few.jsonl", [{"prompt": f"tell me of {index}", "completion": ["it is 0 now", "it is 1 now, friend", "apple please"][index % 3]} for index in range(60)])
    made, _ = train_on("--continue", "sft/whole@1", "--data", "few.jsonl", "--as", "compared", *MORE, evaluation)
    sets = {found["name"]: found["metrics"] for found in made.info("continued")["sets"]}
    names = {"exact_match", "rouge1", "rouge2", "rougeL", "chrf", "bleu", "accuracy", "macro_f1", "shortness"}
    assert set(sets["new data"]) == names
    assert set(sets["data of sft/whole@1"]) == names, "some of its completions are among the labels"
    published = made.info("metrics")
    for name in names:
        assert sets["new data"][name]["after"] == pytest.approx(published[f"evaluation/{name}"], abs=1e-9), name
    rouge = sets["data of sft/whole@1"]["rougeL"]
    assert (rouge["rows"], rouge["low"] <= rouge["difference"] <= rouge["high"]) == (3, True)
    assert sets["new data"]["shortness"]["low"] is None, "a function is called on all rows at once"
    shown = capsys.readouterr().out
    assert re.search(r"new data \(n=3\) +rougeL +[\d.e-]+ +[\d.e-]+ +[+-][\d.e-]+ \[", shown)


def test_rows_without_what_metrics_need_are_named_and_the_rest_is_compared(place):
    """The old rows say none of the labels, and a function of one's own fails on them: the run goes on without these figures."""
    own = '{kind: python, function: "tests.stage.test_continue:wants_friends"}'
    evaluation = f"evaluation={{metrics: [rouge, accuracy, {own}], generate: {{rows: 3, max_new_tokens: 8}}}}"
    made, _ = train_on("--continue", "sft/whole@1", "--data", "new.jsonl", "--as", "partly", *MORE, evaluation)
    record = made.info("continued")
    sets = {found["name"]: found["metrics"] for found in record["sets"]}
    assert set(sets["new data"]) == {"accuracy", "macro_f1", "rouge1", "rouge2", "rougeL", "wants_friends"}
    assert "wants_friends" not in sets["data of sft/whole@1"]
    assert "rougeL" in sets["data of sft/whole@1"]
    assert any("data of sft/whole@1: not measured by functions of yours: " in note for note in record["notes"])


def shortness(prompts, completions, references):
    return -sum(map(len, completions)) / len(completions)


def wants_friends(prompts, completions, references):
    assert all("friend" in reference for reference in references)
    return 1.0


def test_an_adapter_is_trained_on_as_the_same_adapter_over_the_same_base(place):
    first = Registry("registry").resolve("sft/lora@1")
    everything = ["train.batch_size=51", "train.micro_batch_size=17", "train.log_every=1"]  # all training rows in each step
    made, cfg = train_on("--continue", "sft/lora", "--data", "new.jsonl", *MORE, *everything)
    assert (cfg.continued.adapter, made.info("data")["rows"]["train"]) == ("same", 51)
    logged = [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]
    assert next(row["sft/loss"] for row in logged if "sft/loss" in row) == pytest.approx(forward_losses(first, "new.jsonl", "train"), rel=1e-4), "it begins where its parent stood"
    assert made.info("stage_info")["adapter"] == first.info("stage_info")["adapter"]
    assert made.manifest["parents"][0]["ref"] == "sft/lora@1"
    one, two = weights(first), weights(made)
    assert one.keys() == two.keys()
    assert 0 < max(float((one[name] - two[name]).abs().max()) for name in one) < 0.05, "steps from where it stood, no new draw"
    sets = {found["name"]: found for found in made.info("continued")["sets"]}
    assert sets["new data"]["loss"]["before"] == pytest.approx(forward_losses(first, "new.jsonl", "validation"), rel=1e-4)
    assert sets["new data"]["loss"]["after"] == pytest.approx(forward_losses(made, "new.jsonl", "validation"), rel=1e-4)
    assert sets["data of sft/lora@1"]["loss"]["before"] == pytest.approx(first.info("metrics")["loss"], rel=1e-4)


def test_another_technique_starts_from_the_merged_parent(place, capsys):
    made, cfg = train_on("--continue", "sft/lora@1", "--data", "new.jsonl", "--as", "merged", *MORE, "lora.rank=2")
    assert (cfg.continued.adapter, made.info("stage_info")["adapter"]["base"]) == ("merged", "sft/lora@1")
    sets = {found["name"]: found for found in made.info("continued")["sets"]}
    assert sets["new data"]["loss"]["before"] == pytest.approx(forward_losses(Registry("registry").resolve("sft/lora@1"), "new.jsonl", "validation"), rel=1e-4)
    assert "lora asks for another technique than that of sft/lora@1, so its adapter is merged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "adapter"),
    [(["--merge"], "merged"), (["lora=null"], "merged"), (["tune=ia3"], "merged"), (["lora.learning_rate_ratio=16"], "same"), (["lora.rank=4"], "same"), (["lora.dropout=0.1"], "merged")],
)
def test_what_becomes_of_an_adapter(place, words, adapter):
    cfg = continuing.resolve(asked("--continue", "sft/lora@1", "--data", "new.jsonl", *words))
    assert cfg.continued.adapter == adapter
    assert (cfg.tune is None) == (words != ["tune=ia3"])


def test_an_adapter_that_began_in_its_base_is_trained_on_as_the_plain_one_that_it_was_published_as(place):
    """PiSSA of rank 2 is published as rank 4; begun anew from the base, or subtracted from once more, it would be another."""
    first = run("sft", settings(place, "sft", {"max_steps": 1}, name="pissa", tune={"method": "lora", "rank": 2, "alpha": 4, "init": "pissa"}))
    made, cfg = train_on("--continue", "sft/pissa", "--data", "new.jsonl", *MORE, "train.learning_rate=1e-9")
    assert (cfg.technique.rank, cfg.technique.alpha, cfg.technique.init) == (4, 8.0, "default")
    one, two = weights(first), weights(made)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert continuing.resolve(asked("--continue", "sft/pissa", "--data", "new.jsonl")).continued.adapter == "same"


def test_rows_that_were_held_out_stay_held_out_and_are_counted(place, capsys):
    rows = [json.loads(line) for line in (place / "sft.jsonl").read_text().splitlines()]
    write_rows(place / "mixed.jsonl", [*({"prompt": row["prompt"], "completion": "other"} for row in rows), *(json.loads(line) for line in (place / "new.jsonl").read_text().splitlines())])
    test, validation = (Registry("registry").resolve("sft/whole@1").info("data")["rows"][part] for part in ("test", "validation"))
    assert test > 1
    made, _ = train_on("--continue", "sft/whole@1", "--data", "mixed.jsonl", "--as", "mixed", *MORE)
    assert made.info("continued")["repeated"] == {"test": test, "validation": validation}
    assert f"warning: {test} of 120 new rows repeat prompts that sft/whole@1 held out for test" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"sft/whole@1 was trained under another split"):
        train_on("--continue", "sft/whole@1", "--data", "mixed.jsonl", "--as", "split", *MORE, "split.seed=5")


def test_data_that_has_changed_or_gone_is_said(place, capsys):
    source = place / "passing.jsonl"
    source.write_text((place / "sft.jsonl").read_text())
    run("sft", settings(place, "sft", {"max_steps": 1}, name="passing", data=str(source)))
    with source.open("a") as file:
        file.write("".join(json.dumps({"prompt": f"late {index}", "completion": "yes"}) + "\n" for index in range(30)))
    made, _ = train_on("--continue", "sft/passing", "--data", "new.jsonl", *MORE)
    (old,) = (found for found in made.info("continued")["sets"] if found["name"] == "data of sft/passing@1")
    assert old["note"] == "these files have changed since it was trained"
    source.unlink()
    made, _ = train_on("--continue", "sft/passing", "--data", "new.jsonl", *MORE)
    assert made.ref == "sft/passing@3"
    assert [found["name"] for found in made.info("continued")["sets"]] == ["new data", "data of sft/passing@2"]
    assert any("data of sft/passing@1 can't be read any more, so what was forgotten of it is not measured" in note for note in made.info("continued")["notes"])


class Interrupted(Exception):
    """Stands for a crash."""


def test_an_interrupted_run_goes_on_from_the_version_it_began_with(place, monkeypatch, capsys):
    from stages.training import guarding

    longer = [*MORE, "train.max_steps=4", "train.eval_every=2", "train.save_every=2"]
    words = ["--continue", "sft/lora", "--data", "new.jsonl", "--as", "torn", *longer]
    whole, _ = train_on(*words[:4], "--as", "untorn", *longer)
    check = guarding.SkipSteps.on_pre_optimizer_step

    def crash(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Interrupted
        return check(self, args, state, control, **kwargs)

    cfg = continuing.resolve(asked(*words))
    from configs.load import save

    save(cfg, cfg.output / "config.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(guarding.SkipSteps, "on_pre_optimizer_step", crash)
        with pytest.raises(Interrupted):
            sft.main(cfg)
    began = cfg.init_from
    publish(Registry("registry"), "sft/lora")  # another job publishes a newer version meanwhile
    capsys.readouterr()
    made, again = train_on(*words)
    assert again.init_from == began
    shown = capsys.readouterr()
    assert f"holds an unfinished run, which began with {began}" in shown.err
    assert "continuing from checkpoint-2" in shown.out
    one, two = weights(whole), weights(made)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert made.info("continued")["sets"] == whole.info("continued")["sets"]
    assert not (again.output / "resume").exists()


def test_two_jobs_at_once_work_in_folders_of_their_own_and_give_two_versions(place):
    """Both begin with the same parent; neither sees the other."""
    first, second = (continuing.resolve(asked("--continue", "sft/whole@1", "--data", "new.jsonl", "--as", "twice", *MORE, f"seed={seed}")) for seed in (1, 2))
    assert first.output != second.output
    for cfg in (first, second):
        sft.main(cfg)
    found = Registry("registry").list("sft", "twice")
    assert [item.version for item in found] == [1, 2]
    assert {item.manifest["parents"][0]["ref"] for item in found} == {"sft/whole@1"}


def test_old_data_is_rehearsed_without_what_was_held_out(place):
    made, cfg = train_on("--continue", "sft/whole@1", "--data", "new.jsonl", "--as", "rehearsed", "--rehearse", "0.25", *MORE)
    assert ([source.path for source in cfg.train.rehearsal.data], cfg.train.rehearsal.share, cfg.train.rehearsal.weight) == ([str(place / "sft.jsonl")], 0.25, 0.3)
    rows = Registry("registry").resolve("sft/whole@1").info("data")["rows"]
    assert made.info("data")["rehearsal"]["rows"] == rows["train"] < 60
    assert made.info("data")["rows"]["train"] == 51


def test_the_weight_of_what_is_rehearsed_is_that_of_the_file_or_the_command_line(place):
    (place / "weight.yaml").write_text("train: {rehearsal: {data: other.txt, weight: 0.6}}\n")
    words = ("--continue", "sft/whole@1", "--data", "new.jsonl", "--rehearse", "0.25", "--config", "weight.yaml")
    for more, weight in (((), 0.6), (("train.rehearsal.weight=0.9",), 0.9)):
        found = continuing.resolve(asked(*words, *more)).train.rehearsal
        assert ([source.path for source in found.data], found.share, found.weight) == ([str(place / "sft.jsonl")], 0.25, weight)


def test_keys_of_a_file_and_of_the_command_line_win(place):
    (place / "more.yaml").write_text("train: {learning_rate: 5e-4, epochs: 2}\nmax_length: 64\ndata: new.jsonl\n")
    cfg = continuing.resolve(asked("--continue", "sft/whole@1", "--config", "more.yaml", "max_length=99"))
    assert (cfg.train.learning_rate, cfg.train.epochs, cfg.train.batch_size, cfg.max_length) == (5e-4, 2, 8, 99)
    assert [source.path for source in cfg.data] == ["new.jsonl"]
    assert [old.of for old in cfg.continued.old] == ["sft/whole@1"]
    (place / "bad.yaml").write_text("train:\n  learning_rat: 3\ndata: new.jsonl\n")
    with pytest.raises(UserError, match=r"bad\.yaml:2: train\.learning_rat"):
        continuing.resolve(asked("--continue", "sft/whole@1", "--config", "bad.yaml"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--continue", "sft/whole@1"], "--continue needs the new data: --data FILE"),
        (["--continue", "sft/whol", "--data", "new.jsonl"], r"no checkpoint sft/whol in .*Did you mean sft/whole\?"),
        (["--continue", "reward/whole", "--data", "new.jsonl"], "--continue reward/whole: expected an SFT checkpoint"),
        (["--continue", "sft/whole@1", "--data", "new.jsonl", "--merge"], "--merge: sft/whole@1 holds whole weights, no adapter"),
        (["--continue", "sft/outside", "--data", "new.jsonl"], "sft/outside@1 is a model from outside and has no training config .*--config FILE"),
    ],
)
def test_what_cannot_be_trained_on(place, words, said):
    registry = Registry("registry")
    if not registry.list("sft", "outside"):
        from stages.registry.importing import import_model

        import_model(registry, str(place / "base"), "sft/outside")
    with pytest.raises(UserError, match=said):
        continuing.resolve(asked(*words))


def test_options_that_go_together(place, capsys):
    assert cli.main(["sft", "--data", "new.jsonl", "--config", "x.yaml"]) == 2
    assert "--data: goes with --continue NAME" in capsys.readouterr().err
    assert cli.main(["sft"]) == 2
    assert "align sft needs --config FILE, or --continue NAME --data NEW" in capsys.readouterr().err


def test_the_command_prints_what_it_would_start(place, capsys):
    assert cli.main(["sft", "--continue", "sft/lora@1", "--data", "new.jsonl", "--registry", "registry", "--dry-run", "--json", *MORE]) == 0
    record = json.loads(capsys.readouterr().out)
    from configs.load import load

    cfg = load(record["config"], "sft")
    assert (cfg.init_from, cfg.continued.adapter, cfg.lora.rank) == ("sft/lora@1", "same", 4)


@pytest.mark.parametrize("tune", [{"method": "p_tuning", "encoder_hidden_size": 8}, {"method": "prefix_tuning"}])
def test_a_soft_prompt_is_trained_on_from_its_vectors(place, capsys, tune):
    """It begins where its parent ended (its loss on the new rows, by hand), learns, keeps its lineage, and can be trained on again."""
    name = tune["method"].replace("_", "-")
    parent = run("sft", settings(place, "sft", {"max_steps": 2, "learning_rate": 0.05}, name=name, output=str(place / name), tune={"virtual_tokens": 4, **tune}))
    capsys.readouterr()
    made, cfg = train_on("--continue", parent.ref, "--data", "new.jsonl", *MORE, "train.learning_rate=0.1")
    assert ("holds the vectors that a network made (p_tuning)" in capsys.readouterr().err) == (name == "p-tuning")
    assert (cfg.technique.method, cfg.continued.adapter) == ("prompt_tuning" if name == "p-tuning" else "prefix_tuning", "same")
    assert (made.ref, made.manifest["parents"][0]["ref"]) == (f"sft/{name}@2", parent.ref)
    new, old = made.info("continued")["sets"]
    assert new["loss"]["before"] == pytest.approx(forward_losses(parent, "new.jsonl", "validation"), abs=1e-5)
    assert new["loss"]["after"] == pytest.approx(forward_losses(made, "new.jsonl", "validation"), abs=1e-5)
    assert new["loss"]["after"] != new["loss"]["before"]
    assert old["name"] == f"data of {parent.ref}"
    assert made.info("stage_info")["adapter"]["base"] == parent.info("stage_info")["adapter"]["base"]
    again = continuing.resolve(asked("--continue", made.ref, "--data", "new.jsonl", *MORE))
    assert again.technique.method == cfg.technique.method
