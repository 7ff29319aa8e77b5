"""`align registry …`: output, JSON and exit codes."""

import json
import os

import pytest

from launch.cli import main
from stages.registry import Parent, Registry
from tests.unit.registry_samples import flip_bit, publish


@pytest.fixture
def registry(tmp_path):
    registry = Registry(tmp_path / "registry")
    sft = publish(registry, parents=[Parent.external("org/model", "init_from")], config={"lr": 0.1}, metrics={"loss": 1.5})
    publish(registry, "ppo/demo", parents=[Parent.of(sft, "init_from")])
    return registry


def test_list_is_a_table_with_aligned_columns(align, registry):
    registry.set_alias("sft/demo", "production", "sft/demo")
    code, out, err = align("list")
    head, *rows, total = out.splitlines()
    assert (code, err, [row.split()[0] for row in rows]) == (0, "", ["ppo/demo@1", "sft/demo@1"])
    assert total.startswith("2 checkpoints: ")
    assert rows[1][head.index("ALIASES") :].startswith("production ")
    assert rows[0][head.index("MADE FROM") :].startswith("sft/demo@1 ")
    code, out, _ = align("list", "sft", "--json")
    (row,) = json.loads(out)["checkpoints"]
    assert (row["ref"], row["aliases"], row["metrics"]) == ("sft/demo@1", ["production"], {"loss": 1.5})
    assert align("list", "dpo")[1].startswith("no checkpoints of dpo")


def test_list_shows_what_each_checkpoint_adds_to_the_disk(align, registry):
    publish(registry, "sft/again")  # files of 120, 13 and 2 bytes, which the others hold too
    head, *rows, total = align("list")[1].splitlines()
    sizes = {row.split()[0]: [row[head.index(column) :].split("  ")[0] for column in ("SIZE", "ADDS")] for row in rows}
    listed = json.loads(align("list", "--json")[1])
    found = {row["ref"]: (row["size"], row["real_size"]) for row in listed["checkpoints"]}
    whole = found["ppo/demo@1"][0]
    assert found["sft/again@1"] == (whole, 0)
    assert sizes["sft/again@1"] == [f"{whole} B", "0 B"]
    assert listed["total"] == {"size": 3 * whole, "real_size": sum(real for _, real in found.values())}
    assert listed["total"]["real_size"] < 3 * whole
    assert total.endswith(f"of which {listed['total']['real_size']} B on the disk (identical files are stored once)")


def test_show_tells_what_is_recorded(align, registry):
    registry.add_evaluation(registry.resolve("sft/demo"), {"eval_set": "e", "score": 2.0})
    code, out, _ = align("show", "sft/demo")
    assert code == 0
    for text in ("sft/demo@1", "org/model", '{"loss": 1.5}', '{"lr": 0.1}', '"score": 2.0', "python 3."):
        assert text in out
    facts = json.loads(align("show", "sft/demo", "--json")[1])
    assert facts["evaluations"] == [{"eval_set": "e", "score": 2.0}]
    assert facts["info"]["config"] == {"lr": 0.1}


def test_verify_ends_with_1_when_there_are_problems(align, registry):
    checkpoint = registry.resolve("sft/demo")
    assert align("verify", "--deep")[0] == 0
    flip_bit(checkpoint.model_dir / "config.json", 0)
    assert align("verify", "sft/demo")[0] == 0
    code, out, _ = align("verify", "sft/demo", "--deep")
    assert (code, out.splitlines()) == (
        1, ["sft/demo: damaged (contents checked)", "  model/config.json: its content changed since it was published"],
    )  # fmt: skip
    code, out, _ = align("verify", "--deep", "--json")
    assert (code, json.loads(out)["sound"], json.loads(out)["checkpoints"]["ppo/demo@1"]) == (1, False, [])
    os.unlink(checkpoint.path / "manifest.json")
    code, out, _ = align("verify")
    assert code == 1
    assert f"{checkpoint.id}: damaged" in out
    assert f"warning: checkpoint {checkpoint.id} is damaged" in align("list")[2]


def test_lineage_as_tree_and_json(align):
    out = align("lineage", "ppo/demo")[1]
    assert "└─ init_from: sft/demo@1" in out
    assert json.loads(align("lineage", "ppo/demo", "--json")[1])["parents"][0]["parents"][0]["label"] == "org/model"


def test_aliases_are_set_listed_and_have_a_history(align, registry):
    assert align("alias", "sft/demo")[1].startswith("sft/demo has no aliases")
    assert align("alias", "sft/demo", "production", "sft/demo@1", "--expect", "")[1].startswith("sft/demo@production points at sft/demo@1")
    publish(registry)
    assert align("alias", "sft/demo", "production", "sft/demo", "--json")[0] == 0
    assert [entry["ref"] for entry in json.loads(align("alias", "sft/demo", "production", "--json")[1])] == ["sft/demo@1", "sft/demo@2"]
    assert align("alias", "sft/demo")[1].splitlines()[1].split()[:2] == ["sft/demo@production", "sft/demo@2"]
    code, _, err = align("alias", "sft/demo", "production", "sft/demo@1", "--expect", "sft/demo@1")
    assert (code, err) == (2, "error: sft/demo@production was not moved: it points at sft/demo@2, expected sft/demo@1\n")


@pytest.mark.parametrize(
    "words", [("show", "sft/nothing"), ("verify", "nothing"), ("lineage", "sft/demo@9"), ("alias", "demo"), ("alias", "sft/demo", "none")]
)
def test_a_users_error_is_one_line_and_exit_code_2(align, words):
    code, out, err = align(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_registry_that_is_not_there_is_not_made(tmp_path, capsys):
    assert main(["registry", "list", "--registry", str(tmp_path / "absent")]) == 2
    assert "no registry here" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()
