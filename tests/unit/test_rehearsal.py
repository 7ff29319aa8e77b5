"""Rehearsal: which rows an optimizer step has, what their loss weighs, how text becomes rows."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from configs.schema import SFTTrain, Source
from stages.training import rehearsal
from stages.training.plan import Plan, make_plan, row_order, rows_of
from tests.bench import rehearsal as bench

PLAN = Plan(rows=10, batch_size=4, accumulation=1, steps=6, eval_every=6, save_every=6, warmup_steps=0, general_rows=3, general=1)


def test_every_step_has_its_share_of_general_rows():
    order = row_order(PLAN, seed=0)
    assert len(order) == 24
    for step in range(6):
        rows = order[4 * step : 4 * step + 4]
        assert sum(row >= 10 for row in rows) == 1
        assert rows_of(PLAN, 0, step + 1) == sorted(rows)
    task, general = [row for row in order if row < 10], [row for row in order if row >= 10]
    assert sorted(task[:10]) == list(range(10)), "a pass is a permutation"
    assert sorted(general[:3]) == sorted(general[3:]) == [10, 11, 12]
    assert row_order(PLAN, seed=0) == order != row_order(PLAN, seed=1)


def test_the_task_rows_come_in_the_order_that_they_have_without_general_rows():
    alone = row_order(Plan(10, 3, 1, 6, 6, 6, 0), seed=5)
    assert [row for row in row_order(PLAN, seed=5) if row < 10] == alone


def test_plan_counts_epochs_of_the_task():
    # .1 of 32 rows is 3, so 29 of 100 task rows per step: 4 steps per epoch; evaluations come once an epoch.
    plan = make_plan(SFTTrain(epochs=2), 100, 1, general_rows=7, share=0.1)
    assert (plan.general, plan.steps, plan.eval_every) == (3, 7, 4)
    assert make_plan(SFTTrain(batch_size=8), 100, 1, general_rows=7, share=0.01).general == 1, "one at the least"
    with pytest.raises(UserError, match=r"train\.rehearsal\.share 0\.9 leaves no row of train\.batch_size 2"):
        make_plan(SFTTrain(batch_size=2, micro_batch_size=2), 100, 1, general_rows=7, share=0.9)


def test_the_default_weight_is_the_one_that_was_measured_to_meet_the_target():
    assert SFTTrain(rehearsal={"data": "general.txt"}).rehearsal.weight == 0.3


def test_weights_make_one_mean_into_two():
    """3 task tokens with losses 1, 2, 3 (mean 2) and 2 general ones with 5, 7 (mean 6), weight .5: 2 + 3 = 5 as a mean over all 5."""
    general = torch.tensor([[False, False, False, True, True]])
    losses = torch.tensor([[1.0, 2.0, 3.0, 5.0, 7.0]])
    weights = rehearsal.token_weights(general, torch.tensor([3, 2]), 0.5)
    assert weights[0].tolist() == pytest.approx([5 / 3] * 3 + [1.25] * 2)
    assert ((weights * losses).sum() / 5).item() == pytest.approx(2 + 0.5 * 6)


def test_documents_become_rows():
    assert rehearsal.cut(list(range(20)), 8) == [list(range(8)), list(range(8, 16))], "four tokens at the end are too few"
    assert rehearsal.cut(list(range(16 + 8)), 8)[-1] == list(range(16, 24))
    assert rehearsal.cut([1, 2, 3], 8) == [[1, 2, 3]], "all there is"
    assert rehearsal.cut([1], 8) == []


def test_plain_text_is_read_whole_and_split_at_its_separators(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n<|endoftext|>\nthree\n")
    assert rehearsal.documents(Source(path=str(tmp_path / "a.txt"))) == ["one\ntwo\n", "\nthree"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    source = Source(path=str(tmp_path / "b.jsonl"), format="text")
    assert rehearsal.is_text(source)
    assert rehearsal.documents(source) == ["one", "two"]
    assert not rehearsal.is_text(Source(path=str(tmp_path / "b.jsonl")))
    (tmp_path / "c.jsonl").write_text('{"txt": "one"}\n')
    with pytest.raises(UserError, match=r"c\.jsonl:1: has no text in a column `text`"):
        rehearsal.documents(Source(path=str(tmp_path / "c.jsonl"), format="text"))
    with pytest.raises(UserError, match="no `weight`"):
        rehearsal.documents(Source(path=str(tmp_path / "a.txt"), weight=2.0))


def test_marks_follow_the_tokens_padded_and_packed():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": [1, 2], "labels": [1, 2], "general": True}, {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "general": False}]
    padded = rehearsal.Marked(DataCollatorForLanguageModeling(pad_token_id=0))(rows)
    assert padded["general"].tolist() == [[True, True, False], [False, False, False]]
    packed = rehearsal.Marked(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))(rows)
    assert packed["general"].tolist() == [[True, True, False, False, False]]
    unmarked = [{"input_ids": [1, 2], "labels": [1, 2]}]
    assert "general" not in rehearsal.Marked(DataCollatorForLanguageModeling(pad_token_id=0))(unmarked)


def test_the_benchmarks_table_by_hand():
    """2.806 / 2.827 = 0.9926 and / 2.763 = 1.0156; 2.915 is 1.0311 and 1.0550 times them. Forgotten: 1.956 without, .526 and .356 with rehearsal, 73 % and 82 % less."""
    means = {"none, one epoch": (54, 2.827, 5.48), "none, as many steps": (62, 2.763, 5.48), "weight 0.3": (62, 2.806, 4.05), "weight 1": (62, 2.915, 3.88)}
    runs = [
        {"case": case, "steps": steps, "loss": loss + noise, "perplexity": perplexity - noise, "start": 3.524}
        for case, (steps, loss, perplexity) in means.items() for noise in (-0.01, 0.01)
    ]  # fmt: skip
    assert bench.rows(runs) == [
        ["none, one epoch", "2", "54", "2.827", "", "", "5.48", "+1.96", ""], ["none, as many steps", "2", "62", "2.763", "", "", "5.48", "+1.96", ""],
        ["weight 0.3", "2", "62", "2.806", "-0.7%", "+1.6%", "4.05", "+0.53", "73%"], ["weight 1", "2", "62", "2.915", "+3.1%", "+5.5%", "3.88", "+0.36", "82%"],
    ]  # fmt: skip
