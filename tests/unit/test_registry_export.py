"""Exports: what is written, where, the model card, and what goes to the hub."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from configs.errors import UserError
from launch.cli import main
from stages.registry import Parent, Registry
from stages.registry.card import card, figures, public, wilson
from stages.registry.exporting import Options, export
from tests.unit.registry_samples import flip_bit, publish

RESULT = {
    "eval_set": "abc", "score": {"mean": 0.9, "se": 0.01}, "win_rate": 0.75, "win_rate_ci": [0.7, 0.8], "kl": {"k1": 5.0, "k1_se": 0.5, "k3": 4.0, "k3_se": None},
    "parts": {"rule": {"mean": 1.0, "se": 0.1, "n": 4}}, "eos_rate": 1.0, "n": 400, "prompts": 400, "against": "sft/demo@1", "eval_set_detail": {"seed": 3},
}  # fmt: skip


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.registry.provenance._git", lambda *args: None)
    registry = Registry(tmp_path / "registry")
    folder = tmp_path / "people" / "anna" / "base-model"
    folder.mkdir(parents=True)
    sft = publish(registry, parents=[Parent.external("org/base", "init_from"), Parent.external(folder, "reference")])
    ppo = publish(
        registry, "ppo/demo", parents=[Parent.of(sft, "init_from")], config={"data": str(folder / "rows.jsonl"), "kl_coef": 0.05, "nothing": None},
        metrics={"accuracy": 0.5, "pairs": 10, "loss": 0.25}, data={"rows": {"train": 1234, "test": 8}, "dropped": {"overlong": {"train": 2}}, "fingerprint": "f00"},
    )  # fmt: skip
    registry.add_evaluation(ppo, RESULT)
    return registry


def align(capsys, registry, *words):
    code = main(["registry", words[0], "--registry", str(registry.root), *words[1:]])
    out, err = capsys.readouterr()
    return code, out, err


def test_an_export_holds_the_model_a_card_and_sums_that_sha256sum_checks(registry, tmp_path, capsys):
    target = tmp_path / "out" / "model"
    code, out, _ = align(capsys, registry, "export", "ppo/demo", str(target), "--json")
    facts = json.loads(out)
    assert (code, facts["ref"], facts["licence"]) == (0, "ppo/demo@1", None)
    assert sorted(facts["files"]) == ["README.md", "SHA256SUMS", "config.json", "extra/notes.txt", "model.safetensors"]
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=target, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count(": OK")) == (0, 4)
    assert os.access(target / "config.json", os.W_OK)  # an export is the user's own
    assert os.listdir(tmp_path / "out") == ["model"]
    assert os.listdir(registry.root / "leases") == []


def test_the_card_tells_lineage_data_metrics_with_intervals_and_no_path_of_a_machine(registry, tmp_path):
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"model": "ppo", "prompt": "say ```x```", "completion": "fig | ok", "score": 0.5}) + "\n")
    done = export(registry, "ppo/demo", tmp_path / "out", Options(samples=samples))
    text = (done.folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["license"], head["license_name"], head["base_model"], head["pipeline_tag"]) == ("other", "to-be-filled-in", "org/base", "text-generation")
    assert {entry["type"]: entry["value"] for entry in head["model-index"][0]["results"][0]["metrics"]}["score"] == 0.9
    assert huggingface_hub.ModelCard(text).data.library_name == "transformers"
    for told in (
        "└─ init_from: sft/demo@1", "org/base [external]", "reference: base-model [external]", "| train | 1,234 |", "| accuracy | 0.5 | [0.2366, 0.7634] |",
        "| score | 0.9 | [0.8804, 0.9196] |", "| win_rate | 0.75 | [0.7, 0.8] |", "| kl.k1 | 5 | [4.02, 5.98] |", "| kl.k3 | 4 | – |", "| parts.rule | 1 |",
        "400 prompts, compared with sft/demo@1", "````text\nsay ```x```\n````", "score 0.5", "data: rows.jsonl", "kl_coef: 0.05", "**Not stated.**", "torch ",
    ):  # fmt: skip
        assert told in text, told
    assert str(tmp_path) not in text
    assert "anna" not in text
    assert "nothing:" not in text
    licensed = card_of(registry, tmp_path / "again", licence="apache-2.0")
    assert "license: apache-2.0\n" in licensed
    assert "license_name" not in licensed
    assert "## Samples" not in licensed


def card_of(registry, target, **options):
    return (export(registry, "ppo/demo", target, Options(**options)).folder / "README.md").read_text()


def test_intervals_are_those_of_the_textbook():
    low, high = wilson(0.5, 10)  # Newcombe 1998, table I's method 3: 0.2366, 0.7634
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    assert wilson(1.0, 4)[1] == pytest.approx(1.0)
    assert figures({"metrics": {"x": True, "y": float("nan"), "z": "nan", "a": 1}}) == {"a": (1, None, None)}


@pytest.mark.parametrize(("text", "shown"), [
    ("/data/people/x/model", "model"), ("see /a/b/c.txt, and https://hub.co/org/model", "see c.txt, and https://hub.co/org/model"), ("org/model", "org/model"),
    ("~/x/y", "y"), ("1/2 and a/b/c", "1/2 and a/b/c"),
])  # fmt: skip
def test_paths_are_shortened_and_names_left(text, shown):
    assert public(text) == shown


def test_a_place_that_is_taken_a_wrong_option_and_damage_are_refused_and_leave_nothing(registry, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="taken is not empty"):
        export(registry, "ppo/demo", taken)
    with pytest.raises(UserError, match="is a file or a link"):
        export(registry, "ppo/demo", taken / "thesis.txt")
    with pytest.raises(UserError, match="--merge: ppo/demo@1 is no adapter"):
        export(registry, "ppo/demo", tmp_path / "out", Options(merge=True))
    with pytest.raises(UserError, match="--dtype bfloat16 is of merged weights"):
        export(registry, "ppo/demo", tmp_path / "out", Options(dtype="bfloat16"))
    with pytest.raises(UserError, match=r"--samples .*cannot be read"):
        export(registry, "ppo/demo", tmp_path / "out", Options(samples=tmp_path / "none"))
    assert align(capsys, registry, "export", "ppo/none", str(tmp_path / "out"))[0] == 2
    flip_bit(registry.resolve("ppo/demo").model_dir / "model.safetensors", 90)
    with pytest.raises(UserError, match=r"ppo/demo@1 is damaged: model/model\.safetensors is not what was published"):
        export(registry, "ppo/demo", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["people", "registry", "taken"]
    (tmp_path / "out").mkdir()
    assert export(registry, "sft/demo", tmp_path / "out").folder == tmp_path / "out"  # an empty folder will do


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub that keeps what it is sent; the token it was given."""
    sent = {}

    class Api:
        def __init__(self, token):
            sent["token"] = token

        def create_repo(self, repo, private, exist_ok):
            sent["repo"] = (repo, private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["files"] = {str(path.relative_to(folder_path)): path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file()}
            if "fail" in sent:
                raise OSError(f"401 for Bearer {sent['token']}\nmore")
            return f"https://hub.invalid/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    return sent


def test_a_push_shows_what_it_would_send_and_sends_it_when_told(registry, hub, capsys):
    code, out, _ = align(capsys, registry, "push", "ppo/demo", "org/model")
    assert (code, hub) == (0, {})
    for told in ("would send ppo/demo@1 to org/model (private)", "model.safetensors", "README.md", "licence not stated", "nothing was sent; to send it add --yes"):
        assert told in out
    code, _, err = align(capsys, registry, "push", "ppo/demo", "org/model", "--yes")
    assert (code, hub, "say under which one it is published: --licence" in err) == (2, {}, True)
    code, out, _ = align(capsys, registry, "push", "ppo/demo", "org/model", "--yes", "--licence", "mit", "--public", "--json")
    facts = json.loads(out)
    assert (code, facts["sent"], facts["url"], hub["repo"]) == (0, True, "https://hub.invalid/org/model", ("org/model", False))
    assert hub["files"].keys() == facts["files"].keys() == {"README.md", "SHA256SUMS", "config.json", "extra/notes.txt", "model.safetensors"}
    assert b"# org/model" in hub["files"]["README.md"]


def test_a_push_that_cannot_be_says_why_and_never_shows_the_token(registry, hub, capsys, monkeypatch):
    hub["fail"] = True
    code, out, err = align(capsys, registry, "push", "ppo/demo", "org/model", "--yes", "--licence", "mit")
    assert (code, "failed: 401 for Bearer …." in err, "canary" in out + err) == (2, True, False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "no token for the hub: log in with `hf auth login`" in align(capsys, registry, "push", "ppo/demo", "org/model", "--yes", "--licence", "mit")[2]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in align(capsys, registry, "push", "ppo/demo", "org/model", "--yes", "--licence", "mit")[2]
    for name in ("model", "org/../x", "org/a/b", "org/a--b"):
        assert align(capsys, registry, "push", "ppo/demo", name)[0] == 2


def test_a_card_of_what_was_imported_says_so(registry):
    from stages.registry.card import Facts

    item = publish(registry, "sft/outside", source={"kind": "hub", "name": "org/model", "revision": "abc"}, parents=[Parent("imported_from", source="org/model")])
    text = card(Facts(item, registry.lineage("sft/outside"), []))
    assert "imported from outside" in text
    assert "base_model: org/model" in text
