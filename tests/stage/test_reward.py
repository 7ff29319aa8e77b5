"""The reward model: its loss, where it reads the score, what it counts, what it publishes."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from configs.errors import UserError
from stages.registry import Registry
from tests.stage.runs import metrics, run, settings, weights, workspace, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def published(place):
    return run("reward", settings(place, "reward", {"learning_rate": 5e-3, "epochs": 2}))


def encoded(place, part: str, file: str = "pairs.jsonl"):
    """Our ids of one part's pairs, straight from the formatter."""
    from configs.schema import RewardStage
    from stages import data, models
    from stages.tokens import load_tokens

    cfg = RewardStage.model_validate(settings(place, "reward", data=str(place / file)))
    tokens = load_tokens(models.find(cfg.init_from, cfg.registry))
    rows = getattr(data.Splitter(cfg.split).split(data.read_pairs(cfg.data).rows), part)
    return [tokens.formatter.pair(row) for row in rows]


def score(model, ids: list[int]) -> float:
    """The score of one row alone, without any padding: the head at the last position."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, -1]).item()


def margins(model, pairs):
    """Score of chosen less score of rejected, pair by pair."""
    return [score(model, p["prompt_ids"] + p["chosen_ids"]) - score(model, p["prompt_ids"] + p["rejected_ids"]) for p in pairs]


def test_bradley_terry_by_hand():
    """Equal scores: ln 2. Scores 1 and 0 with margin 0.5: ln(1 + e^-0.5) = 0.474077."""
    from stages.training.measures import bradley_terry_loss

    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    assert bradley_terry_loss(one, one).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(one, zero, torch.tensor([0.5])).item() == pytest.approx(0.4740770)


def published_zero_head(place):
    """A reward model whose head is zero: every score is equal."""
    from safetensors.torch import load_file, save_file

    from stages.registry import Parent

    first = run("reward", settings(place, "reward", {"max_steps": 1}, name="start"))

    def write(folder):
        for file in first.model_dir.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors["score.weight"].zero_()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return Registry(place / "registry").publish("reward", "zero", write, parents=[Parent.of(first, "init_from")], info=first.manifest["info"])


def test_first_loss_at_equal_scores_is_ln_2_with_centring(place):
    published_zero_head(place)
    run("reward", settings(place, "reward", {"max_steps": 1}, name="from-zero", init_from="reward/zero", center_coefficient=0.5))
    assert metrics(place, "reward", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_margins_are_subtracted_inside_the_loss(place):
    """At equal scores a margin of 1 gives ln(1 + e) = 1.313262."""
    published_zero_head(place)
    rows = [json.loads(line) | {"margin": 1.0} for line in (place / "pairs.jsonl").read_text().splitlines()]
    write_rows(place / "margins.jsonl", rows)
    values = settings(place, "reward", {"max_steps": 1}, name="margin", init_from="reward/zero", data=str(place / "margins.jsonl"), center_coefficient=0.0)
    run("reward", values)
    assert metrics(place, "reward", "loss")[0] == pytest.approx(1.3132617, abs=1e-6)
    run("reward", values | {"use_margin": False})
    assert metrics(place, "reward", "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_centring_by_hand(place):
    """loss = BT + c · mean((chosen + rejected)²), on the first batch."""
    from transformers import AutoModelForSequenceClassification

    from stages.training.plan import Plan, row_order

    start = run("reward", settings(place, "reward", {"max_steps": 1}, name="centre-start"))
    run("reward", settings(place, "reward", {"max_steps": 1}, name="centre", init_from=f"reward/centre-start@{start.version}", center_coefficient=0.5))
    pairs = encoded(place, "train")
    model = AutoModelForSequenceClassification.from_pretrained(start.model_dir)
    first = [pairs[index] for index in row_order(Plan(len(pairs), 8, 2, 1, 1, 1, 0), 0)]
    both = [(score(model, p["prompt_ids"] + p["chosen_ids"]), score(model, p["prompt_ids"] + p["rejected_ids"])) for p in first]
    expected = sum(math.log1p(math.exp(r - c)) + 0.5 * (c + r) ** 2 for c, r in both) / 8
    assert metrics(place, "reward", "loss")[0] == pytest.approx(expected, rel=1e-5)


def test_published_model_scores_at_the_last_token_for_any_padding(place, published):
    """transformers' own pooling, ours, and a row alone without padding agree to 1e-4."""
    from transformers import AutoModelForSequenceClassification

    from rewards.model import last_token_scores

    model = AutoModelForSequenceClassification.from_pretrained(published.model_dir)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == 256
    rows = [p["prompt_ids"] + p["chosen_ids"] for p in encoded(place, "train")[:8]]
    alone = torch.tensor([score(model, row) for row in rows])
    width = max(map(len, rows)) + 7
    ids = torch.tensor([row + [256] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        assert torch.allclose(model(ids, attention_mask=mask).logits.squeeze(-1), alone, atol=1e-4)
        assert torch.allclose(last_token_scores(model, ids, mask), alone, atol=1e-4)


def test_metrics_count_every_held_out_pair_once(place, published):
    from transformers import AutoModelForSequenceClassification

    from rewards.preference import bradley_terry

    pairs = encoded(place, "test")
    found = margins(AutoModelForSequenceClassification.from_pretrained(published.model_dir), pairs)
    recorded = published.info("metrics")
    assert published.info("stage_info")["held_out"] == "test"
    assert recorded["pairs"] == len(pairs)
    assert recorded["accuracy"] == sum(m > 0 for m in found) / len(found)
    assert recorded["loss"] == pytest.approx(bradley_terry(found).loss, rel=1e-4)
    assert recorded["ece"] == pytest.approx(bradley_terry(found).ece, abs=1e-4)
    assert 0.5 <= recorded["best_shortcut"] <= 1
    assert recorded["shortcut_name"]


def test_evaluation_weighs_pairs_alike_where_batches_differ(place):
    """8 pairs in batches of 3: the last batch holds two, each of which counts 1/8 and not 1/6."""
    from transformers import AutoModelForSequenceClassification

    draw = random.Random(3)
    rows = [{"prompt": f"q{i}", "chosen": f"c{draw.random()}", "rejected": f"r{draw.random()}"} for i in range(120)]
    write_rows(place / "noise.jsonl", rows)
    values = settings(place, "reward", {"max_steps": 1, "eval_every": 1, "batch_size": 6, "micro_batch_size": 3}, name="weigh", data=str(place / "noise.jsonl"))
    checkpoint = run("reward", values)
    found = margins(AutoModelForSequenceClassification.from_pretrained(checkpoint.model_dir), encoded(place, "validation", "noise.jsonl"))
    assert len(found) % 3
    assert metrics(place, "reward", "eval_accuracy")[-1] == pytest.approx(sum(m > 0 for m in found) / len(found))
    assert metrics(place, "reward", "eval_margin")[-1] == pytest.approx(sum(found) / len(found), abs=1e-5)


def test_scale_of_scores_on_demonstrations(place, published):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(published.model_dir)
    found = torch.tensor([score(model, p["prompt_ids"] + p["chosen_ids"]) for p in encoded(place, "train")], dtype=torch.float64)
    recorded = published.info("stage_info")
    assert recorded["n"] == len(found)
    assert recorded["score_position"] == "last_token"
    assert recorded["mean"] == pytest.approx(found.mean().item(), abs=1e-4)
    assert recorded["std"] == pytest.approx(found.std(unbiased=False).item(), abs=1e-4)


def test_demonstrations_of_their_own(place):
    checkpoint = run("reward", settings(place, "reward", {"max_steps": 1}, name="own", demonstrations=str(place / "sft.jsonl")))
    from configs.schema import RewardStage
    from stages import data

    cfg = RewardStage.model_validate(settings(place, "reward", demonstrations=str(place / "sft.jsonl")))
    assert cfg.demonstrations is not None
    train = data.Splitter(cfg.split).split(data.read_demonstrations(cfg.demonstrations).rows).train
    assert checkpoint.info("stage_info")["n"] == len(train)


def test_no_pair_is_dropped_silently(place):
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    rows += [{"prompt": "long", "chosen": "x" * 300, "rejected": "y"}, {"prompt": "same", "chosen": "z", "rejected": "z"}]
    write_rows(place / "some.jsonl", rows)
    values = settings(place, "reward", {"max_steps": 1}, name="some", data=str(place / "some.jsonl"), split={"validation": 0.0, "test": 0.0})
    info = run("reward", values).info("data")
    assert info["rows"] == {"train": 60, "validation": 0, "test": 0}
    assert info["dropped"] == {"overlong": {"train": 1, "validation": 0, "test": 0}, "equal_pairs": 1}
    with pytest.raises(UserError, match="more than max_length"):
        run("reward", values | {"overlong": "error"})


def test_accuracy_and_shortcuts_count_the_same_pairs(place):
    """Overlong pairs are left out of both: here they are those in which the longer completion wins."""
    from configs.schema import RewardStage
    from rewards.preference import best_shortcut, shortcut_baselines
    from stages import data

    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    file = write_rows(place / "long-wins.jsonl", rows + [{"prompt": f"q{i}", "chosen": "x " * 100, "rejected": "y"} for i in range(120)])
    values = settings(place, "reward", {"max_steps": 1}, name="long", data=str(file), split={"validation": 0, "test": 0.3})
    cfg = RewardStage.model_validate(values)
    splits = data.Splitter(cfg.split).split(data.read_pairs(cfg.data).rows)
    kept = [[row for row in part if len(row.chosen) < 100] for part in (splits.train, splits.test)]
    assert len(kept[1]) < len(splits.test)
    metrics = run("reward", values).info("metrics")
    assert metrics["pairs"] == len(kept[1])
    assert (metrics["shortcut_name"], metrics["best_shortcut"]) == best_shortcut(shortcut_baselines(*kept))


def test_adapter_holds_the_head_and_scores_as_when_it_was_trained(place):
    from stages import models

    values = settings(place, "reward", {"learning_rate": 5e-3}, name="lora", lora={"rank": 4, "alpha": 8})
    checkpoint = run("reward", values)
    assert any("score" in name for name in weights(checkpoint))
    model = models.load_scorer(models.find(checkpoint.ref, place / "registry"))
    found = margins(model, encoded(place, "test"))
    assert checkpoint.info("metrics")["margin"] == pytest.approx(sum(found) / len(found), abs=1e-4)


def test_pad_equal_to_eos_is_mended_so_that_eos_is_seen(place, tmp_path):
    """A base whose pad is its EOS: the published model has another pad, and its score still changes with EOS."""
    import shutil

    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    checkpoint = run("reward", settings(place, "reward", {"max_steps": 1}, name="padeos", init_from=str(base)))
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint.model_dir)
    assert model.config.pad_token_id != 258
    ids = encoded(place, "train")[0]
    row = ids["prompt_ids"] + ids["chosen_ids"]
    with torch.no_grad():
        with_eos, without = (model(torch.tensor([r]), attention_mask=torch.ones(1, len(r))).logits.item() for r in (row, row[:-1]))
    assert with_eos == pytest.approx(score(model, row), abs=1e-5)
    assert with_eos != without


def test_a_parent_of_another_template_is_refused(place):
    run("sft", settings(place, "sft", {"max_steps": 1}, name="plain"))
    with pytest.raises(UserError, match="template"):
        run("reward", settings(place, "reward", name="refused", init_from="sft/plain", template="chatml"))
    assert not Registry(place / "registry").list("reward", "refused")
