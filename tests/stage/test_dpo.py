"""DPO: its loss, the ids it trains on, the reference it is tied to."""

from __future__ import annotations

import json
import math

import pytest
import torch

from configs.errors import UserError
from stages.registry import Registry
from tests.stage.runs import metrics, run, settings, weights, workspace, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("dpo"))
    run("sft", settings(folder, "sft", {"max_steps": 4, "learning_rate": 1e-2}, name="one"))
    return folder


@pytest.fixture(scope="module")
def published(place):
    return run("dpo", settings(place, "dpo", {"learning_rate": 5e-3}, init_from="sft/one"))


def encoded(place, part: str):
    """Our ids of one part's pairs, straight from the formatter."""
    from configs.schema import DPOStage
    from stages import data, models
    from stages.tokens import load_tokens

    cfg = DPOStage.model_validate(settings(place, "dpo", init_from="sft/one"))
    tokens = load_tokens(models.find(cfg.init_from, cfg.registry))
    rows = getattr(data.Splitter(cfg.split).split(data.read_pairs(cfg.data).rows), part)
    return [tokens.formatter.pair(row) for row in rows]


def logprob(model, prompt: list[int], completion: list[int]) -> float:
    """Log-probability of a completion after its prompt, nats, one row alone."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


def margin_by_hand(policy, reference, pair, beta: float = 0.1) -> float:
    """beta · (log-ratio of chosen - log-ratio of rejected), eq. 7 of arXiv:2305.18290."""
    ratio = [logprob(policy, pair["prompt_ids"], pair[k]) - logprob(reference, pair["prompt_ids"], pair[k]) for k in ("chosen_ids", "rejected_ids")]
    return beta * (ratio[0] - ratio[1])


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_loss_at_policy_equal_to_reference_is_ln_2(place, published):
    assert metrics(place, "dpo", "loss")[0] == pytest.approx(math.log(2), abs=1e-7)


def test_loss_of_a_later_step_is_that_of_our_ids(place):
    """Policy = sft/one, reference = the base: the first batch's loss worked out from the formatter's ids, row by row."""
    from stages.training.plan import Plan, row_order

    run("dpo", settings(place, "dpo", {"max_steps": 1}, name="other", init_from="sft/one", reference=str(place / "base")))
    pairs = encoded(place, "train")
    policy, reference = load(Registry(place / "registry").resolve("sft/one").model_dir), load(place / "base")
    first = [pairs[index] for index in row_order(Plan(len(pairs), 8, 2, 1, 1, 1, 0), 0)]
    expected = sum(math.log1p(math.exp(-margin_by_hand(policy, reference, pair))) for pair in first) / 8
    assert abs(expected - math.log(2)) > 1e-4
    assert metrics(place, "dpo", "loss")[0] == pytest.approx(expected, rel=1e-5)


def test_published_model_loads_plainly_and_its_metrics_are_per_pair(place, published):
    policy, reference = load(published.model_dir), load(Registry(place / "registry").resolve("sft/one").model_dir)
    found = [margin_by_hand(policy, reference, pair) for pair in encoded(place, "validation")]
    recorded = published.info("metrics")
    assert recorded["accuracy"] == pytest.approx(sum(m > 0 for m in found) / len(found))
    assert recorded["margin"] == pytest.approx(sum(found) / len(found), rel=1e-3, abs=1e-5)
    assert recorded["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in found) / len(found), rel=1e-4)


def test_parents_are_policy_and_reference(published):
    assert [parent["role"] for parent in published.manifest["parents"]] == ["init_from", "reference"]


def test_reference_does_not_move(place):
    """Its weights are those of the checkpoint, bit for bit, so the log-ratios are taken against sft/one throughout."""
    from unittest import mock

    import stages.dpo as dpo

    kept = []
    original = dpo.load_reference
    with mock.patch.object(dpo, "load_reference", lambda *a, **k: kept.append(original(*a, **k)) or kept[-1]):
        run("dpo", settings(place, "dpo", {"max_steps": 3, "learning_rate": 1e-2}, name="still", init_from="sft/one"))
    before = weights(Registry(place / "registry").resolve("sft/one"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept[0].state_dict().items() if name in before)


def test_adapter_uses_its_own_base_as_the_reference(place):
    checkpoint = run("dpo", settings(place, "dpo", {"learning_rate": 1e-2, "max_steps": 4}, name="lora", init_from="sft/one", lora={"rank": 4, "alpha": 8}))
    assert metrics(place, "dpo", "loss")[0] == pytest.approx(math.log(2), abs=1e-7)
    from stages import models

    policy = models.load_policy(models.find("dpo/lora", place / "registry"))
    reference = load(Registry(place / "registry").resolve("sft/one").model_dir)
    found = [margin_by_hand(policy, reference, pair) for pair in encoded(place, "validation")]
    assert checkpoint.info("metrics")["margin"] == pytest.approx(sum(found) / len(found), rel=1e-3, abs=1e-5)
    assert {path.name for path in checkpoint.model_dir.iterdir() if path.is_dir()} == set()


@pytest.mark.parametrize("loss_type", ["ipo", "hinge", "robust"])
def test_other_losses_run_and_are_evaluated(place, loss_type):
    values = settings(place, "dpo", {"max_steps": 2}, name=loss_type.replace("_", "-"), init_from="sft/one", loss_type=loss_type)
    checkpoint = run("dpo", values)
    policy, reference = load(checkpoint.model_dir), load(Registry(place / "registry").resolve("sft/one").model_dir)
    found = [margin_by_hand(policy, reference, pair) for pair in encoded(place, "validation")]
    if loss_type == "hinge":
        assert checkpoint.info("metrics")["loss"] == pytest.approx(sum(max(0.0, 1 - m) for m in found) / len(found), rel=1e-4)
    if loss_type == "robust":
        assert checkpoint.info("metrics")["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in found) / len(found), rel=1e-4)


def test_smoothing_that_no_code_would_read_is_refused(place):
    with pytest.raises(UserError, match=r"label_smoothing 0\.1 is not used by loss_type sigmoid"):
        run("dpo", settings(place, "dpo", name="refused", init_from="sft/one", label_smoothing=0.1))


def test_a_reference_with_another_tokenizer_is_refused(place, tmp_path):
    import shutil

    from transformers import PreTrainedTokenizerFast

    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match="another tokenizer"):
        run("dpo", settings(place, "dpo", name="refused", init_from="sft/one", reference=str(base)))
    assert not Registry(place / "registry").list("dpo", "refused")


def test_a_reward_model_is_no_policy(place):
    run("reward", settings(place, "reward", {"max_steps": 1}, name="rm"))
    with pytest.raises(UserError, match="stage 'reward', expected"):
        run("dpo", settings(place, "dpo", name="refused", init_from="reward/rm"))


def test_the_fused_head_agrees_with_plain_logits(place):
    """Fails when TRL changes the keyword, the shift or the masking that stages.compat relies on."""
    from trl import SFTConfig, SFTTrainer

    from stages.compat import token_statistics
    from stages.training.build import as_dataset
    from tests.tiny import tiny_tokenizer

    model = load(place / "base")
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, {"input_ids": [9, 10, 11], "labels": [-100, -100, 11]}]
    args = SFTConfig(
        output_dir=str(place / "fused"), bf16=False, use_cpu=True, report_to="none", max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=as_dataset(rows), processing_class=tiny_tokenizer())
    batch = trainer.data_collator(rows)
    plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    found = token_statistics(model, batch, batch["labels"])
    assert found.counted.tolist() == [[True, True, True], [False, True, False]]
    wanted = plain.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None]).squeeze(-1) * found.counted
    assert torch.allclose(found.logprobs, wanted, atol=1e-5)
    assert torch.equal(found.correct, (plain.argmax(-1) == batch["labels"][:, 1:]) & found.counted)


def test_pairs_over_the_length_are_counted(place):
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    write_rows(place / "some.jsonl", [*rows, {"prompt": "long", "chosen": "x" * 300, "rejected": "y"}])
    values = settings(place, "dpo", {"max_steps": 1}, name="some", init_from="sft/one", data=str(place / "some.jsonl"), split={"validation": 0, "test": 0}, allow_changed=["split"])
    assert run("dpo", values).info("data")["dropped"]["overlong"] == {"train": 1, "validation": 0}
