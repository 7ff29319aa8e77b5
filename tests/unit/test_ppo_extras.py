"""Row 25: the PTX mix against a gradient computed otherwise, the average of the policy and its way back to the start by hand."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

from stages.ppo.order import stream
from stages.ppo.ptx import Mix
from stages.ppo.published import PolicyAverage, Published, start_of
from stages.ppo.update import update_policy
from tests.unit.ppo_samples import PAD, config
from tests.unit.test_ppo_update import accelerator, experience_of, largest_difference, module_of, run, weights  # noqa: F401  (a fixture)

# Rows of different lengths, in which a prompt, one completion or two are covered by the loss; one ends with the padding id itself.
ROWS = [
    {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
    {"input_ids": [9, 4, 3, 11, 12, 13, 2], "completion_mask": [0, 1, 1, 0, 0, 1, 1]},
    {"input_ids": [10, 2], "completion_mask": [0, 1]},
    {"input_ids": [14, 15, 16, PAD], "completion_mask": [0, 0, 0, 1]},
]
MIX = Mix(ROWS, coef=2.5, ratio=0.5, pad_id=PAD)


def expected_gradients(module, numbers, coef):
    """The gradient by transformers' own loss, a row at a time without padding: cross entropy at labels, weighted into one mean."""
    module = copy.deepcopy(module)
    module.zero_grad(set_to_none=True)
    count, total = 0, 0.0
    for n in numbers:
        ids, mask = (torch.tensor([ROWS[n][key]]) for key in ("input_ids", "completion_mask"))
        labels = torch.where(mask.bool(), ids, -100)
        total = total + module.policy(input_ids=ids, labels=labels, use_cache=False).loss * int(mask.sum())
        count += int(mask.sum())
    (coef * total / count).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, (total / count).item()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_row_25_the_mix_adds_the_gradient_of_one_mean_over_completion_tokens(accelerator, size):  # noqa: F811
    module = module_of()
    numbers = [3, 1, 0, 2, 1]
    loss = MIX.add_gradients(module, accelerator, numbers, size)
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    expected, mean = expected_gradients(module, numbers, 2.5)
    assert loss == pytest.approx(mean, rel=1e-5)
    assert found.keys() == expected.keys()
    assert all(name.startswith("policy.") for name in found), "the value function has nothing to learn from demonstrations"
    assert max((found[name] - expected[name]).abs().max().item() for name in found) < 1e-5
    assert max(g.abs().max().item() for g in expected.values()) > 0.01


def test_row_25_the_shares_of_two_processes_add_up(accelerator):  # noqa: F811
    module, numbers = module_of(), [3, 1, 0, 2, 1]
    MIX.add_gradients(module, accelerator, numbers, 2)
    whole = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    for rank in (0, 1):
        other = SimpleNamespace(process_index=rank, num_processes=2, device=accelerator.device, autocast=accelerator.autocast, reduce=lambda x, reduction: x)
        MIX.add_gradients(module, other, numbers, 2)
    assert max((module.get_parameter(name).grad - whole[name]).abs().max().item() for name in whole) < 1e-6


def test_row_25_an_optimizer_step_is_that_of_ppo_plus_the_mix(accelerator):  # noqa: F811
    """With SGD the step is the gradient: PPO's alone, and the mix's at the same weights, add up."""
    start = module_of()
    experience = experience_of(start)
    plain, both = copy.deepcopy(start), copy.deepcopy(start)
    run(plain, experience, accelerator)
    settings = config(train={"iterations": 5, "rollout_batch_size": 8, "num_ppo_epochs": 1, "num_minibatches": 1, "max_grad_norm": None}, seed=3)
    metrics = update_policy(both, torch.optim.SGD(both.parameters(), lr=0.5), accelerator, experience, settings, 0, MIX)
    numbers = MIX.chosen(0, 8, 3)
    assert len(numbers) == 4
    gradients, loss = expected_gradients(start, numbers, 2.5)
    assert metrics["ptx/loss"] == pytest.approx(loss, rel=1e-5)
    for name, before in start.named_parameters():
        expected = plain.get_parameter(name) - 0.5 * gradients.get(name, torch.zeros_like(before))
        torch.testing.assert_close(both.get_parameter(name), expected, atol=1e-6, rtol=0)


def test_row_25_nothing_is_mixed_in_while_the_value_function_warms_up(accelerator):  # noqa: F811
    module = module_of()
    experience, before = experience_of(module), weights(module)
    settings = config(train={"iterations": 5, "rollout_batch_size": 8, "num_ppo_epochs": 1, "value_warmup_iterations": 1})
    metrics = update_policy(module, torch.optim.SGD(module.parameters(), lr=0.5), accelerator, experience, settings, 0, MIX)
    assert "ptx/loss" not in metrics
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters() if n.startswith("policy."))


def test_row_25_every_step_takes_the_next_rows_and_every_pass_each_row_once():
    rows = [MIX.chosen(step, 4, seed=1) for step in range(8)]
    assert all(len(chosen) == 2 for chosen in rows)
    flat = [n for chosen in rows for n in chosen]
    assert all(sorted(flat[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 16, 4))
    assert len({tuple(flat[i : i + 4]) for i in range(0, 16, 4)}) > 1
    assert MIX.chosen(5, 4, seed=1) == rows[5], "a step's rows depend on nothing but its number"
    assert flat != [n for step in range(8) for n in MIX.chosen(step, 4, seed=2)]
    assert len(Mix(ROWS, 1.0, 8.0, PAD).chosen(0, 64, 0)) == 512
    assert len(Mix(ROWS, 1.0, 0.01, PAD).chosen(0, 8, 0)) == 1, "at least one"


def test_row_22_a_stream_continues_where_it_was():
    assert stream(5, 0, 13, 7) == stream(5, 0, 4, 7) + stream(5, 4, 9, 7)
    assert sorted(stream(5, 5, 5, 7)) == [0, 1, 2, 3, 4]
    assert stream(5, 0, 5, 7) != stream(5, 5, 5, 7)


def test_row_25_the_average_by_hand():
    """Decay 0.75 from weight 8: after steps to 4 and then 0, 0.75 * 8 + 0.25 * 4 = 7 and 0.75 * 7 + 0.25 * 0 = 5.25."""
    module = module_of()
    weight = module.policy.lm_head.weight
    with torch.no_grad():
        weight.fill_(8.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    average = PolicyAverage(module, 0.75, optimizer)
    name = next(n for n, p in module.named_parameters() if p is weight)
    for expected in (7.0, 5.25):
        weight.grad = torch.full_like(weight, 4.0)
        optimizer.step()
        assert torch.equal(average.tensors[name], torch.full_like(weight, expected))
    with Published(module, average).in_place():
        assert torch.equal(weight, torch.full_like(weight, 5.25))
    assert torch.equal(weight, torch.zeros_like(weight)), "training goes on from its own weights"
    with Published(module).in_place():
        assert torch.equal(weight, torch.zeros_like(weight))
    Published(module, average).put_in_place()
    assert torch.equal(weight, torch.full_like(weight, 5.25))


def test_row_25_the_way_back_by_hand():
    """From 8 to 2, a quarter of the way back is 0.75 * 2 + 0.25 * 8 = 3.5; from an average of 6 it is 0.75 * 6 + 0.25 * 8 = 6.5."""
    module = module_of()
    weight, value = module.policy.lm_head.weight, next(iter(module.value_parameters()))
    with torch.no_grad():
        weight.fill_(8.0)
        value.fill_(8.0)
    start = start_of(module)
    average = PolicyAverage(module, 0.9, torch.optim.SGD(module.parameters()))
    name = next(n for n, p in module.named_parameters() if p is weight)
    average.tensors[name].fill_(6.0)
    with torch.no_grad():
        weight.fill_(2.0)
        value.fill_(2.0)
    for made, expected in ((Published(module, None, start, 0.25), 3.5), (Published(module, average, start, 0.25), 6.5), (Published(module, None, start, 0.0), 2.0)):
        with made.in_place():
            assert torch.equal(weight, torch.full_like(weight, expected))
            assert torch.equal(value, torch.full_like(value, 2.0)), "the value function is not published"
        assert torch.equal(weight, torch.full_like(weight, 2.0))


@pytest.mark.parametrize(("zero", "other"), [("lora_B.default.weight", "lora_A.default.weight"), ("lora_embedding_A.default", "lora_embedding_B.default")])
def test_row_25_the_way_back_scales_what_an_adapter_adds(zero, other):
    """B A with both factors moved: 0.6 of the way is 0.6 of the product, which 0.6 of each factor's way is not. Of an embedding it is A that starts at 0."""
    a, b = torch.nn.Parameter(torch.randn(2, 5)), torch.nn.Parameter(torch.zeros(5, 2))
    named = {f"policy.q.{other}": a, f"policy.q.{zero}": b}
    module = SimpleNamespace(policy_parameters=lambda: list(named.values()), named_parameters=lambda: named.items())
    start = start_of(module)
    with torch.no_grad():
        a.add_(torch.randn(2, 5))
        b.add_(torch.randn(5, 2))
    trained = (b @ a).detach().clone()
    with Published(module, None, start, 0.4).in_place():
        torch.testing.assert_close(b @ a, 0.6 * trained)
    assert torch.equal(b @ a, trained)


def test_row_25_the_average_is_of_the_policy_alone_and_follows_every_step(accelerator):  # noqa: F811
    module = module_of()
    start = weights(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    average = PolicyAverage(module, 0.9, optimizer)
    assert set(average.tensors) == {n for n, _ in module.named_parameters() if n.startswith("policy.")}
    run(module, experience_of(module), accelerator, optimizer=optimizer)
    after = weights(module)
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor, 0.9 * start[name] + 0.1 * after[name], atol=1e-6, rtol=1e-5)
    assert largest_difference(average.tensors, after) > 1e-4


def test_row_25_a_skipped_step_leaves_the_average(accelerator):  # noqa: F811
    module = module_of()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    average = PolicyAverage(module, 0.9, optimizer)
    experience = experience_of(module)
    experience.returns[0, 0] = float("inf")
    states = [{n: t.clone() for n, t in average.tensors.items()}]
    optimizer.register_step_post_hook(lambda *_: states.append({n: t.clone() for n, t in average.tensors.items()}))
    run(module, experience, accelerator, optimizer=optimizer, num_minibatches=2)
    unchanged = [all(torch.equal(t, after[n]) for n, t in before.items()) for before, after in itertools.pairwise(states)]
    assert sorted(unchanged) == [False, True]
    assert all(torch.isfinite(t).all() for t in average.tensors.values())
