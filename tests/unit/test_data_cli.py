"""`align data check` and `align data show`."""

from __future__ import annotations

import argparse
import json

import pytest

from configs.errors import UserError
from launch import data_cli
from tests.tiny import tiny_tokenizer


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    data_cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *arguments])
    return args.func(args)


@pytest.fixture
def files(tmp_path):
    rows = [{"prompt": "Where is it?", "completion": f"Here {'x ' * i}"} for i in range(4)]
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    pairs = [{"prompt": "Hi", "chosen": "Hello there", "rejected": "No"}, {"prompt": "Hi", "chosen": "a", "rejected": "a"}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "prompts.csv").write_text("text,category\nWhere is my card?,arrival\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "", "completion": "x"}\n{broken\n')
    (tmp_path / "logs.json").write_text('[{"convo_id": 1}]')
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_check_reports_counts_as_json(files, capsys):
    assert run("check", "--json", *(str(files / name) for name in ("sft.jsonl", "pairs.json", "prompts.csv"))) == 0
    sft, pairs, prompts = json.loads(capsys.readouterr().out)["files"]
    assert (sft["kind"], sft["format"], sft["rows"], sft["prompt_groups"], sft["duplicates"]) == ("demonstrations", "prompt_completion", 5, 1, 1)
    # Words of the completions: 1, 2, 3, 4 and 1 again.
    assert sft["words"]["completion"] == {"min": 1, "median": 2, "p95": 4, "max": 4}
    assert (pairs["kind"], pairs["rows"], pairs["equal_pairs"]) == ("pairs", 1, 1)
    assert pairs["words"]["chosen"]["max"] == 2
    assert (prompts["kind"], prompts["format"], prompts["rows"]) == ("prompts", "text", 1)


def test_check_goes_on_after_a_bad_file_and_exits_2(files, capsys):
    assert run("check", str(files / "bad.jsonl"), str(files / "logs.json"), str(files / "none.jsonl"), str(files / "sft.jsonl")) == 2
    out, err = capsys.readouterr()
    assert "5 demonstrations" in out
    assert "bad.jsonl:1: field 'prompt' is empty" in err
    assert "bad.jsonl:2: broken JSON" in err
    assert "columns convo_id" in err
    assert "no such file" in err


def test_check_reads_as_told(files, capsys):
    assert run("check", "--as", "prompts", "--json", str(files / "sft.jsonl")) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["kind"] == "prompts"


def test_p95_is_the_nearest_rank():
    assert data_cli.summary(range(1, 101)) == {"min": 1, "median": 50.5, "p95": 95, "max": 100}


def test_show_brackets_what_the_loss_covers(files, capsys):
    assert run("show", str(files / "sft.jsonl"), "--tokenizer", str(files / "tokenizer"), "-n", "1") == 0
    out = capsys.readouterr().out
    assert "User: Where is it?\nAssistant:[[ Here <eos>]]" in out
    assert out.count("[[") == 1
    assert run("show", str(files / "pairs.json"), "--tokenizer", str(files / "tokenizer"), "--template", "raw") == 0
    out = capsys.readouterr().out
    assert "Hi[[Hello there<eos>]]" in out
    assert "Hi[[No<eos>]]" in out
    assert run("show", str(files / "prompts.csv"), "--tokenizer", str(files / "tokenizer")) == 0
    assert "[[" not in capsys.readouterr().out


def test_show_without_a_tokenizer_is_a_clear_error(files):
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        run("show", str(files / "sft.jsonl"), "--tokenizer", str(files / "nowhere"))
