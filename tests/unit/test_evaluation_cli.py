"""`align eval` on the command line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from configs.errors import UserError
from launch.cli import main
from launch.eval_cli import add_parser, config_of
from tests.tiny import tiny_model


def parsed(*words: str):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return config_of(parser.parse_args(["eval", *words]))


def test_flags_become_a_config():
    cfg = parsed(
        "sft/demo@1", "mine=ppo/demo", "--prompts", "a.jsonl", "--prompts", "b.jsonl", "--scorer", "length:40", "--scorer", "reward/demo@1",
        "--against", "mine", "--reference", "base=models/base", "--registry", "r", "--subset", "all", "--samples-per-prompt", "3",
        "--max-prompts", "7", "--max-new-tokens", "9", "--temperature", "0.5", "--plain-text", "t.txt", "--seed", "5", "--set", "split.seed=3",
    )  # fmt: skip
    assert cfg.checkpoints == {"sft/demo@1": "sft/demo@1", "mine": "ppo/demo", "base": "models/base"}
    assert (cfg.against, cfg.reference, str(cfg.registry), cfg.subset) == ("mine", "base", "r", "all")
    assert [source.path for source in cfg.prompts] == ["a.jsonl", "b.jsonl"]
    assert [spec.kind for spec in cfg.scorers] == ["length", "model"]
    assert (cfg.samples_per_prompt, cfg.max_prompts, cfg.seed, cfg.split.seed, str(cfg.plain_text)) == (3, 7, 5, 3, "t.txt")
    assert (cfg.sampling.max_new_tokens, cfg.sampling.temperature) == (9, 0.5)


def test_flags_win_over_a_config_file(tmp_path):
    file = tmp_path / "eval.yaml"
    file.write_text("prompts: p.jsonl\nscorers: [{kind: length, target: 4}]\ncheckpoints: {a: x/y}\nseed: 3\nsampling: {temperature: 0.7}\n")
    cfg = parsed("--config", str(file), "--seed", "8", "--max-new-tokens", "5", "--set", "split.test=0.2")
    assert (cfg.seed, cfg.sampling.temperature, cfg.sampling.max_new_tokens, cfg.split.test) == (8, 0.7, 5, 0.2)
    assert parsed("b", "--config", str(file)).checkpoints == {"b": "b"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a model, --prompts, --scorer"),
        (["m", "--prompts", "p"], "needs --scorer"),
        (["m", "m", "--prompts", "p", "--scorer", "length:4"], "two models are called 'm'"),
        (["m", "--prompts", "p", "--scorer", "length:x"], "'x' is not a whole number"),
        (["m", "--prompts", "p", "--scorer", "length:4", "--temperature", "0"], r"sampling\.temperature"),
        (["m", "--prompts", "p", "--scorer", "length:4", "--set", "sed=1"], "seed"),
    ],
)
def test_a_command_line_that_cannot_be_run(words, said):
    with pytest.raises(UserError, match=said):
        parsed(*words)


def test_align_eval_end_to_end(tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "[bold]one"}\n{"prompt": "two"}\n')
    words = ["eval", f"m={model}", "--prompts", str(prompts), "--scorer", "length:3", "--subset", "all", "--max-new-tokens", "5", "--template", "raw"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["models"]["m"]["n"] == 2
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "win rate" in shown
    assert "[bold]one" not in shown, "prompts are printed where that is asked for"
    assert main([*words, "--set", "show_samples=2"]) == 0
    shown = capsys.readouterr().out
    assert "[bold]one" in shown, "a prompt is text, not markup"


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "none"), "--prompts", str(tmp_path / "p.jsonl"), "--scorer", "length:3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_the_verb_imports_nothing_heavy():
    code = (
        "import sys, argparse, launch.eval_cli as e; e.add_parser(argparse.ArgumentParser().add_subparsers());"
        "print([m for m in ('torch', 'transformers', 'rich', 'pydantic', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
