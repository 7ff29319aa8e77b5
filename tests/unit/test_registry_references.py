"""What a reference means: versions, latest, best, aliases, ids; and what the errors say."""

import re

import pytest

from configs.errors import UserError
from stages.registry import Parent, Registry, gc, ledger
from stages.registry.best import lower_is_better, metric_value
from tests.unit.registry_samples import publish, run_together


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_every_form_of_a_reference(registry):
    first, second, other = publish(registry), publish(registry), publish(registry, "sft/other")
    registry.set_alias("sft/demo", "production", "sft/demo@1")
    registry.add_evaluation(first, {"eval_set": "e", "metrics": {"score": 2.0}})
    registry.add_evaluation(second, {"eval_set": "e", "metrics": {"score": 1.0}})
    meant = {
        "sft/demo": second, "sft/demo@latest": second, "sft/demo@1": first, "sft/demo@01": first, "sft/demo@2": second,
        "sft/demo@best:score": first, "sft/demo@best score": first, "sft/demo@production": first, first.id: first, "sft/other": other,
    }  # fmt: skip
    assert {ref: registry.resolve(ref).id for ref in meant} == {ref: item.id for ref, item in meant.items()}


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("sft/dmo", "no checkpoint sft/dmo in .*holds reward/demo, sft/demo.* Did you mean sft/demo?"),
        ("demo", "'demo' is not a reference.*sft/demo@3.*Did you mean (reward|sft)/demo"),
        ("sft/demo@7", "sft/demo has no version 7 in .*; it has version 1"),
        ("sft/demo@prodution", "no alias 'prodution'.*aliases production; version 1. Did you mean production?"),
        ("sft/demo@best", "does not say by which metric.*sft/demo@best:score"),
        ("sft/demo@best:score", "no version of sft/demo was evaluated for score.*align eval sft/demo@1"),
        ("sft/demo@", "alias '' is not a usable name"),
        ("../../etc/passwd", "not a usable name"),
        ("sft/demo@../x", "not a usable name"),
        ("20260101t000000-0123456789ab", "no checkpoint 20260101t000000-0123456789ab"),
        ("", "not a reference"),
    ],
)
def test_errors_say_what_was_asked_what_there_is_and_what_to_do(registry, ref, message):
    publish(registry)
    publish(registry, "reward/demo")
    registry.set_alias("sft/demo", "production", "sft/demo")
    with pytest.raises(UserError, match=message):
        registry.resolve(ref)


def test_an_empty_registry_says_so(registry):
    with pytest.raises(UserError, match="It is empty"):
        registry.resolve("sft/demo")


def test_a_checkpoint_of_another_stage_is_refused_by_the_name_of_its_stage(registry):
    checkpoint = publish(registry, "reward/demo")
    assert registry.resolve("reward/demo", stage=("sft", "reward")).id == checkpoint.id
    for ref in ("reward/demo", checkpoint.id):
        with pytest.raises(UserError, match=r"reward/demo@1 is a checkpoint of stage 'reward', expected 'sft'"):
            registry.resolve(ref, stage="sft")


def test_the_direction_of_best_comes_from_the_metrics_name(registry):
    for value in (3.0, 1.0, 2.0):
        checkpoint = publish(registry, value=value)
        metrics = {"sft/loss": value, "objective/kl": value, "perplexity": value, "score": {"mean": value, "se": 0.1}}
        registry.add_evaluation(checkpoint, {"eval_set": "e", "metrics": metrics})
    found = {metric: registry.resolve(f"sft/demo@best:{metric}").version for metric in metrics}
    assert found == {"sft/loss": 2, "objective/kl": 2, "perplexity": 2, "score": 1}
    assert [lower_is_better(name) for name in ("loss", "eval_loss", "lossless", "accuracy")] == [True, True, False, False]


def test_best_refuses_numbers_from_different_evaluation_sets_until_they_are_measured_again(registry):
    first, second = publish(registry), publish(registry)
    registry.add_evaluation(first, {"eval_set": "aaa", "score": 5.0})
    registry.add_evaluation(second, {"eval_set": "bbb", "score": 9.0})
    with pytest.raises(UserError, match=r"different evaluation sets.*@1 on aaa \(5\), @2 on bbb \(9\)"):
        registry.resolve("sft/demo@best:score")
    registry.add_evaluation(second, {"eval_set": "aaa", "score": 4.0})
    assert registry.resolve("sft/demo@best:score").version == 1
    assert [item["eval_set"] for item in registry.evaluations(second)] == ["bbb", "aaa"]


def test_best_takes_the_newest_of_equals_and_never_a_number_that_is_not_finite(registry):
    for value in (1.0, 1.0, float("nan"), float("inf")):
        registry.add_evaluation(publish(registry), {"eval_set": "e", "metrics": {"score": value}})
    assert registry.resolve("sft/demo@best:score").version == 2
    assert metric_value({"metrics": {"a": {"b": 3}}}, "a.b") == 3.0
    assert metric_value({"metrics": {"a": True}}, "a") is None


def test_nothing_is_chosen_by_the_test_part(registry):
    for value in (1.0, 2.0):
        registry.add_evaluation(publish(registry), {"eval_set": "e", "metrics": {"test/loss": value, "test/rougeL": value, "evaluation/loss": value}})
    for metric, instead in (("test/loss", "evaluation/loss"), ("test/rougeL", "evaluation/rougeL"), ("metrics.test/loss", "evaluation/loss")):
        with pytest.raises(UserError, match=rf"{metric} is of the test part, .*Choose by the validation part, {instead}$"):
            registry.resolve(f"sft/demo@best:{metric}")
        with pytest.raises(UserError, match="is of the test part"):
            gc.Rules(best=(metric,))
    assert registry.resolve("sft/demo@best:evaluation/loss").version == 1
    with pytest.raises(UserError, match=r"Known metrics: evaluation/loss\."):
        registry.resolve("sft/demo@best:bleu")


def test_a_result_must_name_its_evaluation_set(registry):
    checkpoint = publish(registry)
    with pytest.raises(UserError, match="carries no eval_set"):
        registry.add_evaluation(checkpoint, {"metrics": {"score": 1.0}})
    assert registry.evaluations(checkpoint) == []


def test_an_alias_moves_and_keeps_its_history(registry):
    for _ in range(3):
        publish(registry)
    registry.set_alias("sft/demo", "production", "sft/demo@1", expect="")
    registry.set_alias("sft/demo", "production", "sft/demo@3", expect="sft/demo@1")
    registry.set_alias("sft/demo", "production", "sft/demo@1")
    assert [(item["number"], item["ref"]) for item in registry.alias_history("sft/demo", "production")] == [
        (1, "sft/demo@1"), (2, "sft/demo@3"), (3, "sft/demo@1"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"was not moved: it points at sft/demo@1, expected sft/demo@3"):
        registry.set_alias("sft/demo", "production", "sft/demo@2", expect="sft/demo@3")
    with pytest.raises(UserError, match="points at sft/demo@1, expected no alias yet"):
        registry.set_alias("sft/demo", "production", "sft/demo@2", expect="")
    assert registry.resolve("sft/demo@production").version == 1
    assert registry.aliases("sft/demo") == {"production": registry.resolve("sft/demo@1").id}


@pytest.mark.parametrize("alias", ["latest", "best", "3"])
def test_an_alias_that_reads_as_something_else_is_refused(registry, alias):
    publish(registry)
    with pytest.raises(UserError, match="would read as"):
        registry.set_alias("sft/demo", alias, "sft/demo")


def test_an_alias_points_only_at_its_own_name(registry):
    publish(registry)
    publish(registry, "sft/other")
    with pytest.raises(UserError, match="can only point at a version of sft/demo; sft/other is sft/other@1"):
        registry.set_alias("sft/demo", "production", "sft/other")


def test_an_alias_moved_between_reading_and_writing_is_noticed(registry, monkeypatch):
    for _ in range(3):
        publish(registry)
    registry.set_alias("sft/demo", "production", "sft/demo@1")
    real = ledger.link_new

    def other_writer_comes_first(path, content):
        monkeypatch.setattr(ledger, "link_new", real)
        registry.set_alias("sft/demo", "production", "sft/demo@2")
        return real(path, content)

    monkeypatch.setattr(ledger, "link_new", other_writer_comes_first)
    with pytest.raises(UserError, match="points at sft/demo@2, expected sft/demo@1"):
        registry.set_alias("sft/demo", "production", "sft/demo@3", expect="sft/demo@1")
    assert [item["ref"] for item in registry.alias_history("sft/demo", "production")] == ["sft/demo@1", "sft/demo@2"]


def test_of_many_that_move_an_alias_at_once_from_one_place_one_succeeds(tmp_path):
    registry = Registry(tmp_path / "registry")
    for _ in range(7):
        publish(registry)
    registry.set_alias("sft/demo", "production", "sft/demo@1")
    script = f"""
from configs.errors import UserError
from stages.registry import Registry
try:
    target = f"sft/demo@{{int(sys.argv[1]) + 2}}"
    print(Registry({str(registry.root)!r}).set_alias("sft/demo", "production", target, expect="sft/demo@1").ref)
except UserError as error:
    assert "was not moved" in str(error), error
"""
    moved = [out.strip() for out in run_together(script, 6, tmp_path) if out.strip()]
    assert len(moved) == 1
    assert [item["ref"] for item in registry.alias_history("sft/demo", "production")] == ["sft/demo@1", *moved]


def test_lineage_reads_as_a_tree_and_marks_what_is_missing(registry, tmp_path):
    elsewhere = publish(Registry(tmp_path / "elsewhere"), "sft/lost")
    sft = publish(registry, parents=[Parent.external("org/model", "init_from")])
    reward = publish(registry, "reward/demo", parents=[Parent.of(sft, "init_from"), Parent.of(elsewhere, "base")])
    publish(registry, "ppo/demo", parents=[Parent.of(sft, "init_from"), Parent.of(reward, "scorer")])
    tree = registry.lineage("ppo/demo")
    assert re.sub(r"\d{8}t\d{6}-[0-9a-f]{12}", "ID", tree.render()) == "\n".join(
        [
            "ppo/demo@1  ID",
            "├─ init_from: sft/demo@1  ID",
            "│  └─ init_from: org/model [external]",
            "└─ scorer: reward/demo@1  ID",
            "   ├─ init_from: sft/demo@1  ID  (see above)",
            "   └─ base: sft/lost@1 [missing]  ID  (not in this registry)",
        ]
    )
    top = tree.to_json()
    assert [parent["role"] for parent in top["parents"]] == ["init_from", "scorer"]
    assert top["parents"][1]["parents"][1]["kind"] == "missing"
    assert top["parents"][0]["digest"] == sft.manifest_hash
    (sft.path / "manifest.json").write_text("{}")
    damaged = registry.lineage("ppo/demo").to_json()["parents"][0]
    assert (damaged["kind"], "manifest.json" in damaged["note"]) == ("damaged", True)
