"""The mathematics of PPO: numbers worked out by hand, slow implementations in plain Python, and padding full of NaN.

Which row of the specification and which known defect each test stands for: see test_ppo_table.py.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from stages.ppo import maths

NAN = float("nan")


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def ragged(seed, rows=7, width=9, count=6):
    """`count` random [B, T] float64 tensors and a mask with rows of every length, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [0, width, 1, *torch.randint(1, width + 1, (rows - 3,), generator=generator).tolist()]
    return [torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(count)], mask_of(lengths, width)


def real_positions(mask):
    return [(b, t) for b, row in enumerate(mask) for t, real in enumerate(row) if real]


def poisoned(x, mask):
    """The same numbers with NaN wherever the mask is False."""
    return torch.where(mask, x, NAN)


# -- generalised advantage estimation


def test_row_9_gae_by_hand():
    # gamma 1, lambda 0.5. deltas: 0 + .6 - .5 = .1; 0 + .8 - .6 = .2; 1 + 0 - .8 = .2
    # advantages backwards: .2; .2 + .5 * .2 = .3; .1 + .5 * .3 = .25. Returns: advantage + value.
    out = maths.gae(tensor([0, 0, 1]), tensor([0.5, 0.6, 0.8]), mask_of([3], 3), torch.zeros(1).double(), gamma=1.0, gae_lambda=0.5)
    torch.testing.assert_close(out.advantages, tensor([0.25, 0.30, 0.20]))
    torch.testing.assert_close(out.returns, tensor([0.75, 0.90, 1.00]))


def test_row_9_gae_of_a_completion_that_was_cut_off_by_hand():
    # As above, but the completion goes on at value .4: last delta 1 + .4 - .8 = .6; then .2 + .3 = .5; .1 + .25 = .35.
    out = maths.gae(tensor([0, 0, 1]), tensor([0.5, 0.6, 0.8]), mask_of([3], 3), tensor(0.4), gamma=1.0, gae_lambda=0.5)
    torch.testing.assert_close(out.advantages, tensor([0.35, 0.50, 0.60]))
    torch.testing.assert_close(out.returns, tensor([0.85, 1.10, 1.40]))


def test_row_9_gae_with_a_discount_by_hand():
    # gamma .9, lambda .5, so each step back multiplies by .45. deltas: .54 - .5 = .04; .72 - .6 = .12; 1 + .9 * .4 - .8 = .56.
    # .56; .12 + .45 * .56 = .372; .04 + .45 * .372 = .2074.
    out = maths.gae(tensor([0, 0, 1]), tensor([0.5, 0.6, 0.8]), mask_of([3], 3), tensor(0.4), gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(out.advantages, tensor([0.2074, 0.372, 0.56]))


def test_row_9_the_bootstrap_follows_the_last_real_token_and_not_the_last_column():
    short = maths.gae(tensor([0, 1]), tensor([0.5, 0.8]), mask_of([2], 2), tensor(0.4), gamma=0.9, gae_lambda=0.5)
    padded = maths.gae(tensor([0, 1, 7, 7]), tensor([0.5, 0.8, 9, 9]), mask_of([2], 4), tensor(0.4), gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(padded.advantages[:, :2], short.advantages)
    assert padded.advantages[:, 2:].eq(0).all()
    assert padded.returns[:, 2:].eq(0).all()


def slow_gae(rewards, values, bootstrap, gamma, gae_lambda):
    """One row without padding: the double sum of eq. 16, no recursion."""
    count = len(rewards)
    after = [*values[1:], bootstrap]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(count)]
    return [sum((gamma * gae_lambda) ** (u - t) * deltas[u] for u in range(t, count)) for t in range(count)]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.97, 1.0), (1.0, 0.0)])
def test_row_9_gae_equals_the_double_sum_on_ragged_rows(gamma, gae_lambda):
    (rewards, values, *_), mask = ragged(0)
    bootstrap = torch.randn(len(mask), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = maths.gae(poisoned(rewards, mask), poisoned(values, mask), mask, bootstrap, gamma=gamma, gae_lambda=gae_lambda)
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = slow_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), float(bootstrap[row]), gamma, gae_lambda)
        assert out.advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert out.returns[row, :length].tolist() == pytest.approx([a + float(v) for a, v in zip(expected, values[row], strict=False)], abs=1e-12)
        assert out.advantages[row, length:].eq(0).all()


# -- whitening


def test_row_10_whitening_by_hand():
    # Real: 1, 2, 3, mean 2, biased variance 2/3, so 1 -> -1 / sqrt(2/3) = -1.224745 (unbiased would give -1).
    x, mask = tensor([1, 2, 50], [3, -50, NAN]), torch.tensor([[True, True, False], [True, False, False]])
    white = maths.whiten(x, mask)
    torch.testing.assert_close(white, tensor([-1.2247449, 0, 0], [1.2247449, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(maths.whiten(x, mask, shift_mean=False)[mask], white[mask] + 2)


def slow_whiten(x, mask, shift_mean):
    real = [x[b][t] for b in range(len(x)) for t in range(len(x[b])) if mask[b][t]]
    mean = sum(real) / len(real)
    variance = sum((v - mean) ** 2 for v in real) / len(real)
    return [
        [(x[b][t] - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean) if mask[b][t] else 0.0 for t in range(len(x[b]))] for b in range(len(x))
    ]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_trap_4_whitening_is_over_the_real_tokens_of_all_rows(shift_mean):
    (x, *_), mask = ragged(2)
    white = maths.whiten(poisoned(x, mask), mask, shift_mean=shift_mean)
    torch.testing.assert_close(white, torch.tensor(slow_whiten(x.tolist(), mask.tolist(), shift_mean), dtype=torch.float64))
    apart = torch.cat([maths.whiten(part, m, shift_mean=shift_mean) for part, m in zip(x.split(4), mask.split(4), strict=True)])
    assert (white - apart).abs().max() > 0.01, "statistics of a part of the rows must not pass for those of all"


def test_row_10_whitening_of_nothing_and_of_equal_numbers_is_finite():
    assert maths.whiten(tensor([NAN, NAN]), mask_of([0], 2)).tolist() == [[0, 0]]
    assert maths.whiten(tensor([3, 3]), mask_of([2], 2)).tolist() == [[0, 0]]


# -- policy loss


def test_row_13_policy_loss_by_hand():
    # Ratio 1.5, advantage 2, clip .2: max(-3, -2 * 1.2) = -2.4, and the clipped term was the larger.
    one = mask_of([1], 1)
    out = maths.policy_loss(tensor([math.log(1.5)]), tensor([0]), tensor([2]), one, clip_range=0.2)
    assert out.loss.item() == pytest.approx(-2.4)
    assert out.clipped.item() == 1
    assert out.max_ratio.item() == pytest.approx(1.5)
    assert out.approx_kl.item() == pytest.approx(0.5 - math.log(1.5))  # ratio - 1 - log ratio
    # Ratio .5, advantage -2: max(1, 2 * .8) = 1.6. Ratio 1.5, advantage -2: max(3, 2.4) = 3, not clipped.
    assert maths.policy_loss(tensor([math.log(0.5)]), tensor([0]), tensor([-2]), one, clip_range=0.2).loss.item() == pytest.approx(1.6)
    free = maths.policy_loss(tensor([math.log(1.5)]), tensor([0]), tensor([-2]), one, clip_range=0.2)
    assert (free.loss.item(), free.clipped.item()) == (pytest.approx(3.0), 0)


def test_row_13_asymmetric_clip_by_hand():
    # Upper clip .4: ratio 1.5, advantage 2 gives -2.8; the lower side still clips at .8.
    one = mask_of([1], 1)
    high = maths.policy_loss(tensor([math.log(1.5)]), tensor([0]), tensor([2]), one, clip_range=0.2, clip_range_high=0.4)
    low = maths.policy_loss(tensor([math.log(0.5)]), tensor([0]), tensor([-2]), one, clip_range=0.2, clip_range_high=0.4)
    assert high.loss.item() == pytest.approx(-2.8)
    assert low.loss.item() == pytest.approx(1.6)


def test_row_13_dual_clip_by_hand():
    # Ratio 5, advantage -2: 10 without; bounded at 3 * 2 = 6. A positive advantage is left alone: -2.4.
    one = mask_of([1], 1)
    five = maths.policy_loss(tensor([math.log(5)]), tensor([0]), tensor([-2]), one, clip_range=0.2)
    assert five.loss.item() == pytest.approx(10.0)
    assert maths.policy_loss(tensor([math.log(5)]), tensor([0]), tensor([-2]), one, clip_range=0.2, dual_clip=3.0).loss.item() == pytest.approx(6.0)
    assert maths.policy_loss(tensor([math.log(5)]), tensor([0]), tensor([2]), one, clip_range=0.2, dual_clip=3.0).loss.item() == pytest.approx(-2.4)


def test_row_13_a_huge_log_ratio_is_bounded_before_the_exponential():
    out = maths.policy_loss(tensor([1000, -1000]), tensor([0, 0]), tensor([-1, 1]), mask_of([2], 2), clip_range=0.2)
    assert out.max_ratio.item() == pytest.approx(math.exp(20))
    assert math.isfinite(out.loss.item())


def slow_policy_loss(logprobs, old, advantages, mask, low, high, dual):
    total, clipped, kl = 0.0, 0, 0.0
    for b, t in real_positions(mask):
        ratio, advantage = math.exp(logprobs[b][t] - old[b][t]), advantages[b][t]
        plain, limited = -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)
        loss = max(plain, limited)
        if dual is not None and advantage < 0:
            loss = min(loss, -dual * advantage)
        total, clipped, kl = total + loss, clipped + (limited > plain), kl + ratio - 1 - math.log(ratio)
    return total, clipped, kl


@pytest.mark.parametrize(("high", "dual"), [(None, None), (0.5, None), (None, 1.5)])
def test_row_13_policy_loss_equals_a_plain_loop_on_ragged_rows(high, dual):
    (logprobs, old, advantages, *_), mask = ragged(3)
    out = maths.policy_loss(*(poisoned(x, mask) for x in (logprobs, old, advantages)), mask, clip_range=0.2, clip_range_high=high, dual_clip=dual)
    expected = slow_policy_loss(logprobs.tolist(), old.tolist(), advantages.tolist(), mask.tolist(), 0.2, high or 0.2, dual)
    assert (out.loss.item(), out.clipped.item(), out.approx_kl.item()) == pytest.approx(expected, abs=1e-10)


# -- value loss


def test_row_12_value_loss_by_hand():
    # Old value 0, clip .2. v 1, R 1: plain 0, clipped (.2 - 1)^2 = .64 -> .32, clipped. v -1, R 1: plain 4 -> 2, not clipped.
    out = maths.value_loss(tensor([1, -1, 7]), tensor([0, 0, 7]), tensor([1, 1, 7]), mask_of([2], 3), clip_range=0.2)
    assert out.loss.item() == pytest.approx(0.32 + 2.0)
    assert out.clipped.item() == 1
    inside = maths.value_loss(tensor([0.1]), tensor([0]), tensor([1]), mask_of([1], 1), clip_range=0.2)
    assert (inside.loss.item(), inside.clipped.item()) == (pytest.approx(0.5 * 0.81), 0)


def slow_value_loss(values, old, returns, mask, clip):
    total = 0.0
    for b, t in real_positions(mask):
        limited = min(max(values[b][t], old[b][t] - clip), old[b][t] + clip)
        total += 0.5 * max((values[b][t] - returns[b][t]) ** 2, (limited - returns[b][t]) ** 2)
    return total


def test_row_12_value_loss_equals_a_plain_loop_on_ragged_rows():
    (values, old, returns, *_), mask = ragged(4)
    out = maths.value_loss(*(poisoned(x, mask) for x in (values, old, returns)), mask, clip_range=0.2)
    assert out.loss.item() == pytest.approx(slow_value_loss(values.tolist(), old.tolist(), returns.tolist(), mask.tolist(), 0.2), abs=1e-10)


# -- KL


def test_row_1_k1_and_k3_by_hand():
    # Log-probs -1 and -2 under the policy, -1.5 and -1 under the reference: k1 = .5, -1.
    # k3 with d = ref - lp = -.5: e^-.5 - 1 + .5 = .106531; d = 1: e - 2 = .718282.
    mask = mask_of([2], 3)
    logprobs, ref = tensor([-1, -2, NAN]), tensor([-1.5, -1, NAN])
    assert maths.k1(logprobs, ref, mask).tolist() == [[0.5, -1.0, 0.0]]
    torch.testing.assert_close(maths.k3(logprobs, ref, mask), tensor([0.10653066, 0.71828183, 0]))


def test_trap_3_kl_has_the_sign_of_the_divergence():
    # Sampled from p = (.9, .1) against the reference (.5, .5): KL = .9 ln 1.8 + .1 ln .2 = .368 > 0; k3 estimates the same.
    p, q = torch.tensor([0.9, 0.1]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    weights, mask = p.exp(), torch.ones(1, 2, dtype=torch.bool)
    exact = (weights * (p - q)).sum().item()
    assert exact == pytest.approx(0.368064, abs=1e-6)
    for estimate in (maths.k1, maths.k3):
        assert (weights * estimate(p.unsqueeze(0), q.unsqueeze(0), mask)[0]).sum().item() == pytest.approx(exact)


def test_row_3_the_kl_controller_by_hand():
    # Target 6, horizon 10,000, 128 samples. KL 6.6: error .1 -> .05 * (1 + .1 * .0128) = .050064. Errors stop at .2 either way.
    step = dict(target=6.0, horizon=10_000, samples=128)
    assert maths.adapt_kl_coef(0.05, 6.6, **step) == pytest.approx(0.050064)
    assert maths.adapt_kl_coef(0.05, 6.0, **step) == 0.05
    assert maths.adapt_kl_coef(0.05, 600.0, **step) == pytest.approx(0.05 * (1 + 0.2 * 0.0128))
    assert maths.adapt_kl_coef(0.05, -600.0, **step) == pytest.approx(0.05 * (1 - 0.2 * 0.0128))


# -- what is measured


def test_explained_variance_by_hand():
    # Returns 1, 2, 3 (variance 2/3); errors 0, 0, 1 (variance 2/9): 1 - 1/3. A constant offset explains everything.
    mask = mask_of([3], 4)
    returns = tensor([1, 2, 3, NAN])
    assert maths.explained_variance(tensor([1, 2, 2, NAN]), returns, mask) == pytest.approx(2 / 3)
    assert maths.explained_variance(returns + 5, returns, mask) == pytest.approx(1.0)
    assert maths.explained_variance(tensor([0, 0, 0, NAN]), returns, mask) == pytest.approx(0.0)
    assert maths.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)  # variance of 2R is 4 times that of R
    assert maths.explained_variance(returns, tensor([2, 2, 2, NAN]), mask) == 0.0


def test_padding_full_of_nan_changes_no_gradient():
    """NaN times zero is NaN: a mask applied after the arithmetic would poison the gradients of real tokens."""
    (logprobs, old, advantages, values, old_values, returns), mask = ragged(5)
    gradients = []
    for prepare in (lambda x: x.clone(), lambda x: poisoned(x, mask)):
        now, v = prepare(logprobs).requires_grad_(), prepare(values).requires_grad_()
        loss = maths.policy_loss(now, prepare(old), prepare(advantages), mask, clip_range=0.2).loss
        loss = loss + maths.value_loss(v, prepare(old_values), prepare(returns), mask, clip_range=0.2).loss
        loss.backward()
        gradients.append((loss.detach(), now.grad, v.grad))
    for clean, dirty in zip(*gradients, strict=True):
        assert torch.equal(clean, dirty)
    assert gradients[0][1][mask].abs().sum() > 0


def test_row_14_a_sum_over_micro_batches_is_the_sum_over_the_batch():
    """Losses are sums, so that dividing once by all tokens gives the same number however the batch is cut."""
    (logprobs, old, advantages, values, old_values, returns), mask = ragged(6)
    order = list(range(len(mask)))
    random.Random(0).shuffle(order)
    whole = maths.policy_loss(logprobs, old, advantages, mask, clip_range=0.2).loss
    whole_value = maths.value_loss(values, old_values, returns, mask, clip_range=0.2).loss
    for size in (1, 2, 3):
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        cut = sum(maths.policy_loss(logprobs[p], old[p], advantages[p], mask[p], clip_range=0.2).loss for p in parts)
        cut_value = sum(maths.value_loss(values[p], old_values[p], returns[p], mask[p], clip_range=0.2).loss for p in parts)
        torch.testing.assert_close(cut, whole)
        torch.testing.assert_close(cut_value, whole_value)
