"""Supervised fine-tuning: what it learns from, what it publishes, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from configs.errors import UserError
from stages.registry import Registry
from tests.stage.runs import TRAIN, metrics, run, settings, weights, workspace, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def published(place):
    return run("sft", settings(place, "sft"))


def encoded(place, part: str):
    """Our ids and masks of one part, straight from the formatter."""
    from configs.schema import SFTStage
    from stages import data, models
    from stages.tokens import load_tokens

    cfg = SFTStage.model_validate(settings(place, "sft"))
    tokens = load_tokens(models.find(cfg.init_from, cfg.registry))
    rows = getattr(data.Splitter(cfg.split).split(data.read_demonstrations(cfg.data).rows), part)
    return [tokens.formatter.demonstration(row) for row in rows]


def by_hand(model, rows):
    """Mean loss per completion token and the share that greedy decoding gets right, row by row."""
    loss, right, count = 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
        for position, (token, counts) in enumerate(zip(row["input_ids"][1:], row["completion_mask"][1:], strict=True)):
            if counts:
                loss -= logprobs[position, token].item()
                right += int(logprobs[position].argmax() == token)
                count += 1
    return loss / count, right / count


def test_published_model_loads_plainly_and_its_metrics_weigh_every_token_alike(place, published):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(published.model_dir)
    loss, accuracy = by_hand(model, encoded(place, "validation"))
    assert published.info("metrics")["loss"] == pytest.approx(loss, rel=1e-5)
    assert published.info("metrics")["token_accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_first_loss_is_the_base_models_loss_on_completions_only(place, published):
    from transformers import AutoModelForCausalLM

    from stages.training.plan import Plan, row_order

    rows = encoded(place, "train")
    first = row_order(Plan(len(rows), 8, 2, 1, 1, 1, 0), 0)
    loss, _ = by_hand(AutoModelForCausalLM.from_pretrained(place / "base"), [rows[index] for index in first])
    assert metrics(place, "sft", "loss")[0] == pytest.approx(loss, rel=1e-5)


def test_generation_stops_at_eos_and_restricts_nothing(published):
    from transformers import AutoTokenizer, GenerationConfig

    config = GenerationConfig.from_pretrained(published.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(published.model_dir)
    assert config.eos_token_id in (258, [258])
    assert config.pad_token_id == 256 != tokenizer.eos_token_id
    assert config.top_k in (None, 0)
    assert config.top_p in (None, 1.0)
    assert tokenizer.chat_template


def test_manifest_says_what_the_run_was(place, published):
    info = published.manifest["info"]
    assert info["data"]["rows"]["train"] + info["data"]["rows"]["validation"] + info["data"]["rows"]["test"] == 60
    assert info["seed"] == 0
    assert info["config"]["train"]["batch_size"] == 8
    assert {"digest", "template_digest", "eos_ids", "pad_id"} <= set(info["tokenizer"])
    assert published.manifest["parents"][0]["role"] == "init_from"
    results = Registry(place / "registry").evaluations(published)
    assert results[0]["eval_set"] == info["data"]["parts"]["validation"]


def test_resumable_saves_are_gone_after_publishing(place, published):
    assert not (place / "out-sft" / "resume").exists()


def test_cutting_the_batch_differently_changes_nothing(place):
    """1 x 8, 2 x 4 and 8 x 1 micro-batches give one trajectory, with completions of different lengths."""
    losses = []
    for size in (8, 4, 1):
        run("sft", settings(place, "sft", {"micro_batch_size": size, "max_steps": 4}, name=f"cut{size}", output=str(place / "out-sft")))
        losses.append(metrics(place, "sft", "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_adapter_loads_with_peft_on_its_base(place):
    from peft import AutoPeftModelForCausalLM

    checkpoint = run("sft", settings(place, "sft", {"max_steps": 3}, name="lora", lora={"rank": 4, "alpha": 8}))
    assert checkpoint.info("stage_info")["adapter"]["base"] == str(place / "base")
    model = AutoPeftModelForCausalLM.from_pretrained(checkpoint.model_dir)
    loss, _ = by_hand(model.eval(), encoded(place, "validation"))
    assert checkpoint.info("metrics")["loss"] == pytest.approx(loss, rel=1e-4)
    assert all("lora" in name for name in weights(checkpoint))


def test_merging_keeps_what_an_adapter_adds_however_small(place):
    """In bf16 a weight of 0.02 changes in steps of 1e-4: what one step of training adds would be rounded away."""
    from stages import models

    run("sft", settings(place, "sft", {"max_steps": 1, "learning_rate": 1e-5}, name="small", lora={"rank": 4, "alpha": 8}))
    origin = models.find("sft/small", place / "registry")
    whole, asked = models.load_policy(origin), models.load_policy(origin, dtype=torch.bfloat16)
    base = models.load_policy(models.find(str(place / "base"), place / "registry"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(asked(ids).logits, whole(ids).logits)
        assert not torch.equal(asked(ids).logits, base(ids).logits)


def test_a_full_checkpoint_trained_on_an_adapter(place):
    """The adapter is merged into its base and trained on; the result is whole."""
    run("sft", settings(place, "sft", {"max_steps": 3}, name="lora", lora={"rank": 4, "alpha": 8}))
    checkpoint = run("sft", settings(place, "sft", {"max_steps": 1}, name="on-lora", init_from="sft/lora"))
    assert (checkpoint.model_dir / "config.json").exists()
    assert not (checkpoint.model_dir / "adapter_config.json").exists()


def test_best_state_is_published_after_early_stopping(place):
    """With a learning rate that wrecks the model, the best evaluation is the first; training stops two later."""
    train = {"learning_rate": 0.5, "eval_every": 1, "max_steps": 20, "early_stopping_patience": 2}
    checkpoint = run("sft", settings(place, "sft", train, name="stop"))
    evaluations = metrics(place, "sft", "eval_loss")
    best = min(range(len(evaluations)), key=evaluations.__getitem__)
    assert len(evaluations) == best + 3 < 20
    assert checkpoint.info("metrics")["loss"] == pytest.approx(evaluations[best], rel=1e-5)


def test_weights_that_break_in_training_stop_the_run_when_skipping_does_not_help(place):
    """A learning rate of 1e30 breaks the weights in step 1, so every loss from step 2 on is NaN; no save but that of step 1 is made."""
    train = {"learning_rate": 1e30, "eval_every": 50, "save_every": 1, "log_every": 50}
    values = settings(place, "sft", train, name="nan", output=str(place / "out-nan"))
    with pytest.raises(UserError, match=r"5 optimizer steps in a row were skipped.*not finite at step 6.*checkpoint-1\. .*learning_rate"):
        run("sft", values)
    assert not Registry(place / "registry").list("sft", "nan")
    assert [path.name for path in (place / "out-nan" / "resume").glob("checkpoint-*")] == ["checkpoint-1"]


def test_broken_weights_are_never_in_a_save_that_a_resume_would_take(place):
    """A learning rate beyond float32: loss and gradient of step 1 are finite, the weights after it are not."""
    values = settings(place, "sft", {"learning_rate": 1e39, "save_every": 1, "eval_every": 50}, name="nan", output=str(place / "out-inf"))
    with pytest.raises(UserError, match=r"a trained weight is not finite at step 1; there is no healthy save yet.*learning_rate"):
        run("sft", values)
    assert not list((place / "out-inf" / "resume").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TRAIN | {"batch_size": 6, "micro_batch_size": 4}}, "train.batch_size 6 is not a multiple of 4"),
        ({"train": TRAIN | {"batch_size": 512}}, "training rows, fewer than one batch"),
        ({"trainer": {"max_length": 5}}, r"trainer\.max_length: the stage sets this itself; set `max_length` instead"),
        ({"trainer": {"no_such": 5}}, "no_such"),
        ({"trainer": {"pad_token": "<eos>"}}, r"trainer\.pad_token: the stage sets this itself; the end-of-text and padding tokens"),
        ({"train": TRAIN | {"early_stopping_patience": 2}, "split": {"validation": 0}}, "early_stopping_patience needs validation rows"),
        ({"train": TRAIN | {"early_stopping_patience": 2, "save_every": 2}}, "must be equal"),
        ({"max_length": 4}, "longer than max_length"),
    ],
)
def test_refusals_say_what_to_do_and_publish_nothing(place, changes, message):
    with pytest.raises(UserError, match=message):
        run("sft", settings(place, "sft", name="refused", output=str(place / "out-refused"), **changes))
    assert not Registry(place / "registry").list("sft", "refused")


def test_a_tokenizer_that_training_has_changed_is_not_published(place):
    from configs.schema import SFTStage
    from stages import models
    from stages.tokens import load_tokens
    from stages.training.publish import publish

    cfg = SFTStage.model_validate(settings(place, "sft", name="changed"))
    origin = models.find(cfg.init_from, cfg.registry)
    tokens = load_tokens(origin)
    tokens.tokenizer.pad_token = "<eos>"
    with pytest.raises(UserError, match="padding token from id 256 to 258"):
        publish(None, cfg, "sft", tokens, origin=origin, parents=[], info={}, eval_set=None)


def test_a_parent_of_another_split_is_refused(place, published):
    """Its training rows may be validation rows here; who knows better says so."""
    values = settings(place, "sft", {"max_steps": 1}, name="on", init_from="sft/tiny", split={"seed": 1}, output=str(place / "out-on"))
    with pytest.raises(UserError, match=r"sft/tiny@1 was trained under another split: split\.seed is 1 here and 0 there"):
        run("sft", values)
    assert run("sft", values | {"allow_changed": ["split"]}).name == "on"


def test_rows_over_the_length_are_counted(place):
    file = write_rows(place / "long.jsonl", [json.loads(line) for line in (place / "sft.jsonl").read_text().splitlines()])
    with file.open("a") as stream:
        stream.write(json.dumps({"prompt": "a long one", "completion": "x" * 200}) + "\n")
    values = settings(place, "sft", {"max_steps": 1}, name="long", data=str(file), split={"validation": 0.0, "test": 0.0})
    assert run("sft", values).info("data")["dropped"]["overlong"] == {"train": 1, "validation": 0}
    with pytest.raises(UserError, match="more than max_length"):
        run("sft", values | {"overlong": "error"})


def test_a_validation_part_of_overlong_rows_only_is_dropped_like_any_row(place):
    from configs.schema.common import Source, Split
    from stages.data import Splitter, read_demonstrations

    split = Split(validation=0.1, test=0.1)
    rows = [json.loads(line) for line in (place / "sft.jsonl").read_text().splitlines()]
    parts = [Splitter(split).of(row) for row in read_demonstrations([Source(path=str(place / "sft.jsonl"))]).rows]
    long = [row | ({"completion": "x" * 200} if part == "validation" else {}) for row, part in zip(rows, parts, strict=True)]
    checkpoint = run("sft", settings(place, "sft", {"max_steps": 1}, name="short", data=str(write_rows(place / "no-validation.jsonl", long))))
    assert checkpoint.info("data")["rows"]["validation"] == 0
    assert checkpoint.info("data")["dropped"]["overlong"]["validation"] == parts.count("validation") > 0
    assert checkpoint.info("metrics") == {}
