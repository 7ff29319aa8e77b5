"""The guard: which steps are not taken, that a step which is not taken changes nothing, and what a save remembers of it."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from configs.schema import Guard as GuardConfig
from stages.guard.skip import reads_flag, skip_if
from stages.guard.verdict import JUDGED_AFTER, WINDOW, GoneBadError, Guard, verdict
from stages.ppo.guarding import Undo


def guard_of(**changes):
    return Guard(GuardConfig(**changes), ("loss", "gradient"), "cpu")


def fed(guard, values, first=1):
    """Judge pairs of loss and norm; whether each step was skipped."""
    return [bool(guard.judge(step, torch.tensor(pair))) for step, pair in enumerate(values, first)]


STEADY = [(2.0, 1.0)] * JUDGED_AFTER


def test_a_verdict_by_hand():
    """ln of 1, 1, e, e^2, e^2: median 1, absolute deviations 1, 1, 0, 1, 1, so one robust deviation is 1.4826 and ten lie at e^(1 + 14.826)."""
    history = torch.full((1, WINDOW), math.nan)
    history[0, :5] = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0])
    seen = torch.tensor([JUDGED_AFTER])
    judged = [verdict(torch.tensor([math.exp(x)]), history, seen, 10.0) for x in (15.8, 15.85)]
    assert [bool(v.skip) for v in judged] == [False, True]
    assert judged[1].times.item() == pytest.approx(math.exp(14.85), rel=1e-4)
    assert not verdict(torch.tensor([math.exp(15.85)]), history, seen - 1, 10.0).skip, "too few steps to judge by"
    assert not verdict(torch.tensor([math.exp(15.85)]), history, seen, None).skip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad):
    guard = guard_of(spike_deviations=None)
    assert fed(guard, [(bad, 1.0), (1.0, bad), (1.0, 1.0)]) == [True, True, False]
    first, second = guard.read()
    assert (first.step, first.not_finite, second.step, second.not_finite) == (1, ("loss",), 2, ("gradient",))
    assert str(first) == "the loss is not finite"


def test_a_spike_is_skipped_named_and_not_remembered():
    """Steps that are all alike: the least spread holds, so the limit is e^1.5 = 4.48 times the median."""
    guard = guard_of()
    assert not any(fed(guard, STEADY))
    assert fed(guard, [(2.0, 4.4), (2.0, 4.6), (9.1, 1.0), (2.0, 1.0)]) == [False, True, True, False]
    assert [str(skipped) for skipped in guard.read()] == ["the gradient is 4.6 times its median", "the loss is 4.55 times its median"]
    assert guard.seen.tolist() == [JUDGED_AFTER + 2] * 2
    assert (guard.skipped, guard.streak) == (2, 0)


def test_norms_spread_over_orders_of_magnitude_are_no_spikes():
    """A model that has nearly learned its rows: norms of 1e-4 to 1e1, and a hard row of 1e3."""
    draw = torch.Generator().manual_seed(0)
    norms = (10 ** (torch.rand(200, generator=draw) * 5 - 4)).tolist()
    guard = guard_of()
    assert not any(fed(guard, [(abs(math.sin(i)) * n + 1e-5, n) for i, n in enumerate([*norms, 1e3])]))


def test_a_norm_of_zero_is_neither_judged_nor_remembered():
    guard = guard_of()
    assert not any(fed(guard, [(2.0, 0.0)] * 40 + [(2.0, 1e6)]))
    assert guard.seen.tolist() == [41, 1]


def test_steps_skipped_in_a_row_are_counted_also_where_they_are_over_when_they_are_read():
    guard = guard_of()
    fed(guard, [(math.nan, 1.0)] * 3 + [(1.0, 1.0)] + [(math.nan, 1.0)] * 2)
    assert len(guard.read()) == 5
    assert (guard.streak, guard.longest, guard.longest_end, guard.skipped) == (2, 3, 3, 5)
    fed(guard, [(math.nan, 1.0)] * 2 + [(1.0, 1.0)], first=7)
    guard.read()
    assert (guard.streak, guard.longest, guard.longest_end, guard.skipped) == (0, 4, 8, 7), "two of them stood in the reading before"
    fed(guard, [(1.0, 1.0)], first=10)
    guard.read()
    assert guard.longest == 0
    fed(guard, [(math.nan, 1.0)] * 2, first=11)
    guard.read()
    guard.forget_streak()
    assert guard.longest == 0
    fed(guard, [(math.nan, 1.0)], first=13)
    guard.read()
    assert (guard.streak, guard.longest, guard.skipped) == (1, 1, 10)


def test_ppo_goes_back_for_steps_skipped_in_a_row_that_a_later_step_of_the_iteration_has_ended():
    undo = Undo(SimpleNamespace(guard=GuardConfig(max_skipped_in_row=2)), "cpu", None, None, None)
    fed(undo.guard, [(math.nan, 1.0), (1.0, 1.0), (math.nan, 1.0)])
    undo.check(0, saved_next=False)
    fed(undo.guard, [(math.nan, 1.0), (1.0, 1.0)], first=4)
    with pytest.raises(GoneBadError, match="2 optimizer steps in a row were skipped"):
        undo.check(1, saved_next=False)


def test_a_save_remembers_all_of_it_to_the_bit():
    """Interrupted anywhere, a guard decides as one that was not."""
    draw = torch.Generator().manual_seed(1)
    values = torch.rand(150, 2, generator=draw).tolist()
    values[40] = values[41] = [math.nan, 1.0]
    values[100] = [1e9, 1.0]
    whole = guard_of()
    expected = fed(whole, values)
    assert sum(expected) == 3
    for cut in (0, 33, 41, 120):
        first, second = guard_of(), guard_of()
        start = fed(first, values[:cut])
        first.read()
        second.load(json.loads(json.dumps(first.state())))
        assert start + fed(second, values[cut:], cut + 1) == expected
        second.read(), whole.read()
        assert second.state() == whole.state()


def test_nothing_is_read_while_steps_are_judged(monkeypatch):
    """No verdict may wait for the device: any way of getting a number out of a tensor is closed."""
    guard = guard_of()

    def closed(*_):
        raise AssertionError("a step waited for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, closed)
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter], fused=True)
        parameter.grad = torch.ones(3)
        skip_if(guard.judge(1, torch.tensor([1.0, math.nan])), optimizer)
    assert [skipped.step for skipped in guard.read()] == [1]


# -- a step that is not taken


def model_and(optimizer_class, **arguments):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, optimizer_class(model.parameters(), lr=0.1, **arguments)


OPTIMIZERS = [
    (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}), (torch.optim.Adam, {"fused": True}), (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "fused": True}), (torch.optim.SGD, {}), (torch.optim.Adafactor, {}),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer_class", "arguments"), OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_a_skipped_step_leaves_weights_moments_and_counts_and_the_next_is_as_if_it_had_not_been(optimizer_class, arguments, before):
    """Skipped as the very first step, and later; gradients of NaN, and weight decay that would act without any."""
    found = []
    for skips in (False, True):
        model, optimizer = model_and(optimizer_class, **arguments)
        for step in range(before + 3):
            draw = torch.Generator().manual_seed(step)
            if skips and step == before:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, math.nan)
                kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
                skip_if(torch.tensor(1.0), optimizer)
                optimizer.step()
                assert all(torch.equal(value, kept[0][name]) for name, value in model.state_dict().items())
                if before:
                    assert same(optimizer.state_dict()["state"], kept[1])
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            skip_if(torch.tensor(0.0), optimizer)
            optimizer.step()
        found.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert same(found[0][1], found[1][1])


def same(one, other):
    """Whether two optimizer states are equal to the bit."""
    return one.keys() == other.keys() and all(
        one[i].keys() == other[i].keys() and all(torch.equal(torch.as_tensor(v), torch.as_tensor(other[i][k])) if v is not None else other[i][k] is None for k, v in one[i].items())
        for i in one
    )  # fmt: skip


@pytest.mark.parametrize(("optimizer_class", "arguments"), OPTIMIZERS[:4])
def test_watching_a_step_that_is_taken_changes_no_bit(optimizer_class, arguments):
    found = []
    for watched in (False, True):
        model, optimizer = model_and(optimizer_class, **arguments)
        for step in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            if watched:
                skip_if(torch.tensor(0.0), optimizer)
            optimizer.step()
        found.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert same(found[0][1], found[1][1])


def test_the_optimizer_that_every_stage_takes_by_itself_reads_the_flag():
    """TRL's default and PPO's: a step of theirs costs no waiting."""
    from transformers import TrainingArguments

    assert TrainingArguments(output_dir="unused", report_to="none").optim == "adamw_torch_fused"
    assert reads_flag(model_and(torch.optim.AdamW, fused=True)[1])
    assert not reads_flag(model_and(torch.optim.SGD, fused=True)[1])


def test_a_guard_that_is_off_sees_no_spikes():
    """PPO judges every step for its metrics: a spike ended a run whose guard was off."""
    guard = guard_of(enabled=False)
    fed(guard, STEADY)
    assert fed(guard, [(2.0, 100.0), (math.nan, 1.0)]) == [False, True]


def test_the_flag_lies_where_the_optimizer_steps():
    """With weights in main memory torch copies it from the GPU without waiting, and would read what was there before."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, device="meta"))])
    optimizer.param_groups[0]["fused"] = True
    skip_if(torch.ones(()), optimizer)
    assert optimizer.found_inf.device.type == "meta"


def test_groups_that_are_filled_one_at_a_time_are_skipped_like_others():
    """DeepSpeed's ZeRO-3 leaves all groups empty but the one whose part it steps."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(1))]}, {"params": [parameter]}], fused=True)
    optimizer.param_groups[0]["params"] = []
    parameter.grad = torch.ones(3)
    skip_if(torch.tensor(1.0), optimizer)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    optimizer.param_groups[1]["params"] = []
    skip_if(torch.tensor(0.0), optimizer)
