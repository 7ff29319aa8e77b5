"""Evaluation of models on disk and in the registry, from prompts to recorded results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import EvalConfig
from rewards.model import RewardModelScorer
from stages import models
from stages.evaluation.evaluate import evaluate
from stages.evaluation.likelihood import completion_logprobs, same_vocabulary, text_perplexity
from stages.evaluation.prompts import choose_prompts, eval_set
from stages.evaluation.table import HEADINGS, rows
from stages.registry import Registry
from stages.tokens import load_tokens
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

PAD, EOS = 256, 258


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text, "size": len(text)}) + "\n" for text in texts))
    return path


def config(tmp_path: Path, checkpoints: dict[str, str], **changes) -> EvalConfig:
    prompts = write_prompts(tmp_path / "prompts.jsonl", [f"question {i}" for i in range(6)])
    values = {
        "checkpoints": checkpoints, "prompts": [{"path": str(prompts)}], "subset": "all", "template": "raw", "registry": str(tmp_path / "registry"),
        "scorers": [{"kind": "length", "target": 4}, {"kind": "regex", "pattern": "[a-m]", "weight": 0.5}],
        "sampling": {"max_new_tokens": 12}, "samples_per_prompt": 2,
    }  # fmt: skip
    return EvalConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Two random models of one tokenizer, wide enough in their weights to differ."""
    root = tmp_path_factory.mktemp("models")
    return {name: str(tiny_model(root / name, seed=i, initializer_range=0.3)) for i, name in enumerate(("one", "two"))}


def publish(registry: Registry, stage: str, folder: str, model, **stage_info):
    """Publish a model with the facts that a stage records."""
    tokens = load_tokens(models.find(folder, registry.root), "raw")
    info = {
        "tokenizer": tokens.facts, "stage_info": stage_info,
        "data": {"split": {"seed": 0, "validation": 0.05, "test": 0.1, "test_prompts": 0}},
    }  # fmt: skip
    return registry.publish(stage, "tiny", lambda to: models.save_model(model, tokens.tokenizer, to, eos_ids=tokens.eos_ids), info=info)


def test_figures_of_two_models(tmp_path, folders):
    result = evaluate(config(tmp_path, folders, output=str(tmp_path / "out")))
    one, two = result["models"]["one"], result["models"]["two"]
    assert (result["against"], result["reference"]) == ("one", "one")
    assert one["kl"] == {"k1": 0.0, "k1_se": 0.0, "k3": 0.0, "k3_se": 0.0}
    assert (one["win_rate"], one["n"], one["prompts"]) == (0.5, 12, 6)
    assert two["kl"]["k3"] > 1
    assert two["win_rate_ci"][0] <= two["win_rate"] <= two["win_rate_ci"][1]
    for figures in (one, two):
        parts = figures["parts"]
        assert figures["score"]["mean"] == pytest.approx(parts["length:4"]["mean"] + 0.5 * parts["regex:[a-m]"]["mean"])
        assert 0 < figures["length"] <= 12
    on_disk = json.loads((tmp_path / "out" / "results.json").read_text())
    assert on_disk == json.loads(json.dumps(result))
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 12
    mine = [line["score"] for line in lines if line["model"] == "two"]
    texts = [line["completion"] for line in lines if line["model"] == "two"]
    assert all(first != second for first, second in zip(texts[::2], texts[1::2], strict=True)), "samples of one prompt are drawn anew"
    assert np.mean(mine) == pytest.approx(two["score"]["mean"])
    assert [len(row) for row in rows(result)] == [len(HEADINGS)] * 2
    assert rows(result)[1][2].endswith("] n=6")


def test_the_table_is_shown_once(tmp_path, folders, monkeypatch, capsys):
    """By the evaluation where it is started by itself, by the chain at its end where it is a step of one."""
    from stages.evaluation.__main__ import main

    cfg = config(tmp_path, {"one": folders["one"]})
    main(cfg)
    assert capsys.readouterr().out.count("win rate") >= 1
    monkeypatch.setenv("ALIGN_INPUTS_KEY", "k")
    main(cfg)
    shown = capsys.readouterr().out
    assert "win rate" not in shown
    assert "eval 1/1" in shown


def test_one_model_under_two_labels_is_the_same_and_differs_from_nothing(tmp_path, folders):
    """Same weights, same seeds: the same completions, no KL, every comparison even."""
    result = evaluate(config(tmp_path, {"a": folders["one"], "b": folders["one"]}))
    a, b = result["models"]["a"], result["models"]["b"]
    assert a["score"] == b["score"]
    assert b["kl"]["k1"] == pytest.approx(0, abs=1e-5)
    assert b["win_rate"] == pytest.approx(0.5)
    assert all(s["completions"]["a"] == s["completions"]["b"] for s in result["samples"])


def test_an_evaluation_repeats_and_does_not_depend_on_the_batch(tmp_path, folders):
    first = evaluate(config(tmp_path, folders))
    again = evaluate(config(tmp_path, folders, sampling={"max_new_tokens": 12, "generate_batch_size": 5}))
    assert first["eval_set"] == again["eval_set"]
    assert [s["completions"] for s in first["samples"]] == [s["completions"] for s in again["samples"]]
    assert first["models"]["two"]["score"] == again["models"]["two"]["score"]
    assert first["models"]["two"]["kl"]["k1"] == pytest.approx(again["models"]["two"]["kl"]["k1"], abs=1e-4)
    other = evaluate(config(tmp_path, folders, seed=1))
    assert other["models"]["two"]["score"] != first["models"]["two"]["score"]


def test_logprobs_are_those_of_a_plain_forward_whatever_the_padding(folders):
    model = models.load_policy(models.find(folders["two"], Path("nowhere")))
    prompts, completions = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, EOS], []]
    found, mask = completion_logprobs(model, prompts, completions, temperature=0.7, pad_id=PAD, batch_size=3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [False] * 4]
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0] / 0.7
        for t, token in enumerate(completion):
            expected = torch.log_softmax(logits[len(prompt) - 1 + t], -1)[token].item()
            assert found[row, t] == pytest.approx(expected, abs=1e-4)


def test_perplexity_of_a_text_is_that_of_the_models_own_loss(tmp_path, folders):
    model, tokenizer = models.load_policy(models.find(folders["one"], tmp_path)), tiny_tokenizer()
    file = tmp_path / "text.txt"
    file.write_text("a story of a cat<|endoftext|>\nand another, of a dog\n")
    nll = count = 0.0
    for document in ("a story of a cat", "and another, of a dog"):
        ids = torch.tensor([[257, *tokenizer(document)["input_ids"]]])  # BOS begins each document
        with torch.no_grad():
            nll += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert text_perplexity(model, tokenizer, file, pad_id=PAD) == pytest.approx(math.exp(nll / count), rel=1e-4)


def test_a_long_text_is_read_in_windows_and_cut(tmp_path, folders):
    model, tokenizer = models.load_policy(models.find(folders["one"], tmp_path)), tiny_tokenizer()
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh" * 200)
    whole = text_perplexity(model, tokenizer, file, pad_id=PAD, max_tokens=1500)
    file.write_text("abcdefgh" * 200 + "Z" * 999)
    assert text_perplexity(model, tokenizer, file, pad_id=PAD, max_tokens=1500) == whole


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), (b"\xff\xfe\xfa", "cannot be read as UTF-8"), (b" \n", "is blank")])
def test_a_plain_text_that_cannot_be_used(tmp_path, folders, monkeypatch, content, said):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr("stages.evaluation.evaluate._measure_all", None)  # it is found out before anything is sampled
    with pytest.raises(UserError, match=said):
        evaluate(config(tmp_path, {"one": folders["one"]}, plain_text=str(file)))


def test_an_output_that_cannot_be_a_folder(tmp_path, folders, monkeypatch):
    monkeypatch.setattr("stages.evaluation.evaluate._measure_all", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output .*cannot be a folder"):
        evaluate(config(tmp_path, {"one": folders["one"]}, output=str(tmp_path / "file" / "out")))


def test_results_go_into_the_registry_and_can_be_compared(tmp_path, folders):
    registry = Registry(tmp_path / "registry")
    published = [publish(registry, "sft", folders[name], models.load_policy(models.find(folders[name], tmp_path))) for name in ("one", "two")]
    result = evaluate(config(tmp_path, {"base": folders["one"], "v1": "sft/tiny@1", "v2": "sft/tiny@2"}))
    kept = [registry.evaluations(checkpoint) for checkpoint in published]
    assert [len(k) for k in kept] == [1, 1]
    assert kept[1][0]["eval_set"] == result["eval_set"]
    assert kept[1][0]["score"] == pytest.approx(result["models"]["v2"]["score"])
    assert kept[1][0]["against"] == folders["one"]
    assert "question" not in json.dumps(kept), "prompt text stays out of the registry"
    best = max((1, 2), key=lambda v: result["models"][f"v{v}"]["score"]["mean"])
    assert registry.resolve("sft/tiny@best:score").version == best
    # The published copy of the model writes what the folder's model writes.
    assert result["models"]["v1"]["score"] == result["models"]["base"]["score"]


def test_a_reward_model_reads_the_sampled_ids(tmp_path, folders, monkeypatch):
    from transformers import LlamaForSequenceClassification

    registry = Registry(tmp_path / "registry")
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1, initializer_range=0.3))
    publish(registry, "reward", folders["one"], model, score_position="last_token", mean=0.25, std=2.0, n=10)
    calls = []
    original = RewardModelScorer.score_ids

    def spy(self, prompt_ids, completion_ids, finished):
        calls.append((list(prompt_ids), list(completion_ids)))
        return original(self, prompt_ids, completion_ids, finished)

    monkeypatch.setattr(RewardModelScorer, "score_ids", spy)
    monkeypatch.setattr(RewardModelScorer, "__call__", None)  # the text path must not be taken
    cfg = config(tmp_path, {"one": folders["one"]}, scorers=[{"kind": "model", "checkpoint": "reward/tiny"}], samples_per_prompt=1)
    result = evaluate(cfg)
    (prompt_ids, completion_ids) = calls[0]
    with torch.no_grad():
        expected = [model.eval()(torch.tensor([p + c])).logits[0, 0].item() for p, c in zip(prompt_ids, completion_ids, strict=True)]
    assert result["models"]["one"]["score"]["mean"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert result["eval_set_detail"]["scorers"][0]["id"] == registry.resolve("reward/tiny").id


def test_labels_that_name_no_checkpoint_are_refused(tmp_path, folders):
    with pytest.raises(UserError, match="reference: 'three' is not among the checkpoints; their labels are one, two"):
        evaluate(config(tmp_path, folders, reference="three"))
    with pytest.raises(UserError, match="against: 'x'"):
        evaluate(config(tmp_path, folders, against="x"))


def test_columns_of_the_prompts_reach_the_scorers(tmp_path, folders, monkeypatch):
    (tmp_path / "my_scorer.py").write_text("def f(prompts, completions, size):\n    return [float(s - len(p)) for s, p in zip(size, prompts)]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = evaluate(config(tmp_path, {"one": folders["one"]}, scorers=[{"kind": "python", "function": "my_scorer:f"}]))
    assert result["models"]["one"]["score"]["mean"] == 0.0


def test_an_empty_test_subset_is_refused(tmp_path, folders):
    cfg = config(tmp_path, folders, subset="test", split={"test": 0.0})
    with pytest.raises(UserError, match=r"none of 6 prompts is in the test subset.*others are for training"):
        evaluate(cfg)


def test_a_test_subset_holds_no_prompt_of_training(tmp_path, folders):
    from stages.data import Splitter, read_prompts

    cfg = config(tmp_path, folders, subset="test", split={"test": 0.5})
    write_prompts(tmp_path / "prompts.jsonl", [f"question {i}" for i in range(40)])
    chosen = choose_prompts(cfg)
    train = Splitter(cfg.split).split(read_prompts(cfg.prompts).rows).train
    assert 10 < len(chosen) < 30
    assert train
    assert not {row.prompt for row in chosen} & {row.prompt for row in train}


def test_a_checkpoint_of_another_split_is_refused(tmp_path, folders):
    registry = Registry(tmp_path / "registry")
    publish(registry, "sft", folders["one"], models.load_policy(models.find(folders["one"], tmp_path)))
    cfg = config(tmp_path, {"v1": "sft/tiny"}, subset="test", split={"seed": 4, "test": 0.5})
    with pytest.raises(UserError, match=r"trained under another split: split\.seed is 4 here and 0 there, split\.test is 0\.5 here and 0\.1 there"):
        evaluate(cfg)


def test_prompts_that_were_not_kept_out_of_training_are_refused(tmp_path, folders):
    """split.test_prompts makes them test prompts here; the checkpoint was trained without, on most of them."""
    registry = Registry(tmp_path / "registry")
    publish(registry, "sft", folders["one"], models.load_policy(models.find(folders["one"], tmp_path)))
    file = write_prompts(tmp_path / "kept-out.jsonl", [f"question {i}" for i in range(6)])
    cfg = config(tmp_path, {"v1": "sft/tiny"}, subset="test", split={"test_prompts": str(file)})
    with pytest.raises(UserError, match=r"sft/tiny@1 was trained under another split: split\.test_prompts"):
        evaluate(cfg)


def test_a_prompt_that_stands_twice_counts_once(tmp_path, folders):
    cfg = config(tmp_path, folders)
    write_prompts(tmp_path / "prompts.jsonl", ["a b", "c", "A  b", "d"])
    assert [row.prompt[0].content for row in choose_prompts(cfg)] == ["a b", "c", "d"]
    assert len(choose_prompts(cfg.model_copy(update={"max_prompts": 2}))) == 2


def test_prompts_too_long_for_a_model_are_left_out_for_all(tmp_path, folders):
    cfg = config(tmp_path, folders, max_prompts=3)
    write_prompts(tmp_path / "prompts.jsonl", ["short", "x" * 600, "also short"])
    result = evaluate(cfg)
    assert (result["too_long"], result["models"]["one"]["prompts"]) == (1, 2)
    write_prompts(tmp_path / "prompts.jsonl", ["x" * 600])
    with pytest.raises(UserError, match=r"none of 1 prompts leaves room.*one reads 512 tokens"):
        evaluate(cfg)


def test_the_fingerprint_follows_what_is_measured_and_nothing_else(tmp_path, folders):
    cfg = config(tmp_path, folders)

    def mark(**changes):
        changed = config(tmp_path, folders, **changes)
        return eval_set(changed, choose_prompts(changed), {})[0]

    same = eval_set(cfg, choose_prompts(cfg), {})[0]
    assert mark(against="two", show_samples=0, sampling={"max_new_tokens": 12, "generate_batch_size": 3}) == same
    changes = [
        {"seed": 1}, {"max_prompts": 2}, {"samples_per_prompt": 1}, {"sampling": {"max_new_tokens": 12, "temperature": 0.5}},
        {"scorers": [{"kind": "length", "target": 5}]}, {"scorers": [{"kind": "length", "target": 4, "weight": 2}]},
        {"precision": "bf16"},
    ]  # fmt: skip
    assert len({same, *(mark(**change) for change in changes)}) == len(changes) + 1


def test_the_fingerprint_follows_the_source_of_the_users_function(tmp_path, folders, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    marks = set()
    for name, body in (("scorer_a", "[1.0]"), ("scorer_b", "[2.0]")):
        (tmp_path / f"{name}.py").write_text(f"def f(prompts, completions, **columns):\n    return {body} * len(prompts)\n")
        cfg = config(tmp_path, folders, scorers=[{"kind": "python", "function": f"{name}:f"}])
        detail = eval_set(cfg, choose_prompts(cfg), {})[1]
        marks.add(detail["scorers"][0]["source"])
    assert len(marks) == 2


def test_vocabularies_that_differ_have_no_kl():
    base = {"a": 0, "b": 1}
    assert same_vocabulary(base, base)
    assert same_vocabulary(base, base | {"<pad>": 2})
    assert same_vocabulary(base | {"<pad>": 2}, base)
    assert not same_vocabulary(base, {"a": 1, "b": 0})
    assert not same_vocabulary(base, {"a": 0, "c": 1, "d": 2})


def test_every_model_of_an_evaluation_has_the_attention_kernel_that_was_asked_for(tmp_path, folders, monkeypatch):
    kernels, load = [], models.from_pretrained

    def remember(cls, folder, **arguments):
        loaded = load(cls, folder, **arguments)
        if cls.__name__.startswith("AutoModel"):
            kernels.append(loaded.config._attn_implementation)
        return loaded

    monkeypatch.setattr(models, "from_pretrained", remember)
    registry = Registry(tmp_path / "registry")
    scorer = models.scorer_from_policy(models.load_policy(models.find(folders["one"], registry.root)), pad_id=PAD, seed=0)
    publish(registry, "reward", folders["one"], scorer, score_position="last_token", mean=0.0, std=1.0)
    kernels.clear()
    evaluate(config(tmp_path, folders, attn_implementation="eager", scorers=[{"kind": "model", "checkpoint": "reward/tiny"}]))
    assert kernels == ["eager"] * 3
