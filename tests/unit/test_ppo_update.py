"""The update: one gradient for any cut into micro-batches, one optimizer step per minibatch, clipping, warm-up, bad steps."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs.errors import UserError
from stages import models
from stages.ppo import maths, report
from stages.ppo.collect import Clock
from stages.ppo.modules import POLICY, VALUE, AdapterSwitch, PolicyAndValue, is_of
from stages.ppo.rollout import Experience, Rollout
from stages.ppo.update import SamplerDiffersError, micro_batches, minibatches, update_policy
from stages.tuning.adapters import lora_config
from tests.unit.ppo_samples import config, model_of, ragged_ids, tokens_of


@pytest.fixture(scope="module")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def module_of(*, kind="copy", zero=False):
    policy = model_of(spread=0.2)
    if kind == "lora":
        return adapters_on(policy)
    trunk = model_of(spread=0.2, seed=1).base_model if kind == "copy" else None
    return PolicyAndValue(policy, trunk, models.scalar_head(16, seed=0, zero=zero), temperature=1.0)


def adapters_on(policy):
    """Policy and value adapter on one backbone, both away from zero."""
    from peft import get_peft_model

    from configs.schema import Lora

    torch.manual_seed(0)
    peft_model = get_peft_model(policy, lora_config(Lora(rank=4, alpha=8), "CAUSAL_LM"), adapter_name=POLICY)
    peft_model.add_adapter(VALUE, lora_config(Lora(rank=4, alpha=8), "CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(is_of(name, POLICY) or is_of(name, VALUE))
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    return PolicyAndValue(policy, None, models.scalar_head(16, seed=0), temperature=1.0, switch=AdapterSwitch(policy, [POLICY, VALUE])).eval()


def experience_of(module, rows=8, *, drift=0.3, seed=0):
    """A rollout of ragged rows whose old log-probs lie a little off the policy's, so that some tokens are clipped."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens_of(*ragged_ids(rows, seed=seed, completion=(1, 12)))
    with torch.no_grad():
        now = module(tokens)
    noise = lambda like: torch.randn(like.shape, generator=generator)  # noqa: E731
    value_mask = torch.cat([tokens.mask, torch.zeros_like(tokens.mask[:, :1])], dim=1)
    return Experience(tokens, now.logprobs + drift * noise(now.logprobs), noise(now.logprobs), now.values + drift * noise(now.values), noise(now.values), value_mask)


def run(module, experience, accelerator, *, iteration=0, optimizer=None, vf_coef=0.1, **train):
    """Update in place with SGD, whose step is the gradient itself; returns the metrics."""
    settings = dict(iterations=5, rollout_batch_size=len(experience.tokens.mask), num_ppo_epochs=1, num_minibatches=1, max_grad_norm=None) | train
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.5)
    return update_policy(module, optimizer, accelerator, experience, config(train=settings, vf_coef=vf_coef), iteration)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("kind", ["copy", "head", "lora"])
def test_row_14_trap_9_the_same_new_weights_for_every_micro_batch_size(accelerator, kind):
    """8, 4, 2 and 1 rows at once: 1, 2, 4 and 8 backward passes are added up before each optimizer step."""
    start = module_of(kind=kind)
    experience = experience_of(start)
    results, metrics = {}, {}
    for size in (8, 4, 2, 1):
        module = copy.deepcopy(start)
        metrics[size] = run(module, experience, accelerator, micro_batch_size=size, num_ppo_epochs=2)
        results[size] = weights(module)
    assert largest_difference(results[8], weights(start)) > 1e-3
    for size in (4, 2, 1):
        assert largest_difference(results[size], results[8]) < 1e-6
        assert metrics[size] == pytest.approx(metrics[8], abs=1e-5)


def test_row_14_the_step_is_the_gradient_of_one_mean_over_all_completion_tokens(accelerator):
    """Against a loss that is written out here; a mean of micro-batch means would weigh short completions more."""
    module = module_of()
    experience = experience_of(module)
    expected, mask = copy.deepcopy(module), experience.tokens.mask
    out = expected(experience.tokens)
    ratio = (out.logprobs - experience.old_logprobs)[mask].exp()
    advantages = experience.advantages[mask]
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
    values, old, returns = (x[:, :-1][mask] for x in (out.values, experience.old_values, experience.returns))
    clipped = old + (values - old).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()
    (policy + 0.1 * value).backward()
    with torch.no_grad():
        for p in expected.parameters():
            p -= 0.5 * p.grad
    metrics = run(module, experience, accelerator, micro_batch_size=3)
    assert largest_difference(weights(module), weights(expected)) < 1e-6
    assert metrics["policy/loss"] == pytest.approx(policy.item(), abs=1e-5)
    assert metrics["value/loss"] == pytest.approx(value.item(), abs=1e-5)
    assert metrics["policy/clip_fraction"] == pytest.approx(((ratio.clamp(0.8, 1.2) - ratio) * advantages < 0).float().mean().item(), abs=1e-6)
    assert metrics["policy/approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), abs=1e-5)
    assert metrics["policy/max_ratio"] == pytest.approx(ratio.max().item(), rel=1e-5)


class Counting(torch.optim.SGD):
    """Counts its steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


@pytest.mark.parametrize(("epochs", "parts", "micro"), [(1, 1, 2), (2, 4, 2), (3, 2, 1), (1, 8, 8)])
def test_row_15_trap_12_every_minibatch_is_an_optimizer_step_of_its_own(accelerator, epochs, parts, micro):
    module = module_of()
    optimizer = Counting(module.parameters(), lr=0.01)
    run(module, experience_of(module), accelerator, optimizer=optimizer, num_ppo_epochs=epochs, num_minibatches=parts, micro_batch_size=micro)
    assert optimizer.steps == epochs * parts


def test_row_15_a_pass_visits_each_row_once_in_an_order_of_its_own():
    passes = [minibatches(12, 3, seed=1, iteration=i, epoch=e) for i in range(2) for e in range(2)]
    assert all([len(part) for part in p] == [4, 4, 4] for p in passes)
    orders = [torch.cat(p).tolist() for p in passes]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert torch.cat(minibatches(12, 3, seed=1, iteration=0, epoch=0)).tolist() == orders[0]


def test_row_14_every_process_has_as_many_micro_batches_and_together_they_have_every_row():
    experience = experience_of(module_of())
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shares = [micro_batches(experience, rows, rank=rank, world=2, size=3) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 2
    assert sorted(torch.cat(shares[0] + shares[1]).tolist()) == list(range(8))
    lengths = [experience.lengths()[torch.cat(s)] for s in shares]
    assert (lengths[0] - lengths[1]).abs().max() <= experience.lengths().sort().values.diff().max(), "lengths are shared out evenly"
    assert len(experience.lengths().unique()) > 1
    assert all(torch.equal(each, each.sort(descending=True).values) for each in lengths), "the longest come first"


def test_row_16_trap_15_the_gradient_norm_is_clipped_without_deepspeed(accelerator):
    start = module_of()
    experience = experience_of(start)
    free, bound = copy.deepcopy(start), copy.deepcopy(start)
    measured = run(free, experience, accelerator, vf_coef=5.0)
    clipped = run(bound, experience, accelerator, vf_coef=5.0, max_grad_norm=0.01)
    assert clipped["policy/grad_norm"] == pytest.approx(measured["policy/grad_norm"])
    assert measured["policy/grad_norm"] > 0.05
    moved = {part: sum((p - q).square().sum().item() for (n, p), (_, q) in zip(bound.named_parameters(), start.named_parameters(), strict=True)
                       if n.startswith("value") == (part == "value")) ** 0.5 for part in ("policy", "value")}  # fmt: skip
    assert moved["policy"] == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert moved["value"] == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_trap_11_the_first_step_has_ratio_one_and_no_kl(accelerator):
    module = module_of()
    experience = experience_of(module, drift=0.0)
    metrics = run(module, experience, accelerator, micro_batch_size=3, num_ppo_epochs=3)
    assert metrics["policy/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/first_approx_kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["policy/first_clip_fraction"] == 0
    assert metrics["policy/approx_kl"] > 1e-4, "later steps must move, or the zeros above prove nothing"


def test_row_8_old_log_probs_beyond_the_bound_stop_the_update_before_it_has_changed_anything(accelerator):
    module = module_of()
    experience, before = experience_of(module, drift=0.0), weights(module)
    within, off = (replace(experience, old_logprobs=experience.old_logprobs + by) for by in (0.9e-3, 1.1e-3))
    optimizer, cfg = torch.optim.SGD(module.parameters(), lr=0.5), config(train={"rollout_batch_size": 8})
    with pytest.raises(SamplerDiffersError):
        update_policy(module, optimizer, accelerator, off, cfg, 0, max_gap=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in weights(module).items())
    assert all(p.grad is None for p in module.parameters())
    metrics = update_policy(module, optimizer, accelerator, within, cfg, 0, max_gap=1e-3)
    assert metrics["policy/first_gap"] == pytest.approx(0.9e-3, abs=1e-5)
    assert metrics["policy/first_gap_mean"] == pytest.approx(0.9e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["copy", "lora"])
def test_in_the_warm_up_nothing_is_computed_for_a_gradient_of_the_policy(accelerator, kind, monkeypatch):
    module, graphs = module_of(kind=kind), []
    inner = type(module).logprobs
    monkeypatch.setattr(type(module), "logprobs", lambda *a, **k: (out := inner(*a, **k), graphs.append(out.logprobs.requires_grad))[0])
    experience = experience_of(module)
    for iteration in (0, 1):
        run(module, experience, accelerator, value_warmup_iterations=1, iteration=iteration)
    assert graphs[-2:] == [False, True] or graphs[1:] == [False, True]


@pytest.mark.parametrize("kind", ["copy", "head"])
def test_row_17_warm_up_trains_the_value_function_alone(accelerator, kind):
    """A fresh head on the policy's trunk sends gradients into the trunk: during warm-up they must not move the policy."""
    module = module_of(kind=kind)
    experience, before = experience_of(module), weights(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    run(module, experience, accelerator, optimizer=optimizer, value_warmup_iterations=1, num_ppo_epochs=3)
    after = weights(module)
    assert not torch.equal(after["value_head.weight"], before["value_head.weight"])
    moved = [n for n in before if n.startswith("policy.") and not torch.equal(before[n], after[n])]
    assert not moved
    run(module, experience, accelerator, optimizer=optimizer, value_warmup_iterations=1, iteration=1)
    assert largest_difference(weights(module), after) > 0
    first = optimizer.state[module.policy.lm_head.weight]["step"]
    assert int(first) == 1, "the policy's Adam starts when the policy does: steps of zeros would enlarge its first real ones"


def test_gradients_that_are_not_finite_move_nothing_and_are_counted(accelerator):
    module = module_of()
    experience, before = experience_of(module), weights(module)
    experience.returns[0, 0] = float("inf")
    metrics = run(module, experience, accelerator, num_minibatches=2)
    assert metrics["policy/skipped_steps"] == 1
    after = weights(module)
    assert all(torch.isfinite(p).all() for p in after.values())
    assert largest_difference(before, after) > 0, "the other minibatch is sound and counts"


def test_an_iteration_without_a_sound_step_ends_the_run(accelerator):
    module = module_of()
    experience = experience_of(module)
    experience.returns[:, 0] = float("inf")
    with pytest.raises(UserError, match="no optimizer step of iteration 1 had gradients that are finite"):
        run(module, experience, accelerator, num_minibatches=2)


def test_row_20_padding_full_of_nan_changes_no_weight(accelerator):
    start = module_of()
    clean = experience_of(start)
    nan = lambda x, mask: torch.where(mask, x, float("nan"))  # noqa: E731
    mask, wide = clean.tokens.mask, clean.value_mask
    dirty = Experience(
        clean.tokens, nan(clean.old_logprobs, mask), nan(clean.advantages, mask), nan(clean.old_values, wide), nan(clean.returns, wide), wide
    )
    results = []
    for experience in (clean, dirty):
        module = copy.deepcopy(start)
        metrics = run(module, experience, accelerator, micro_batch_size=3)
        results.append((weights(module), metrics))
    assert largest_difference(results[0][0], results[1][0]) == 0
    assert results[0][1] == results[1][1]


def test_trap_5_metrics_leave_padding_out():
    """Entropy, KL and lengths of rows of 3 and 1 tokens, by hand; what padding holds is left out."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    tokens = tokens_of([[5], [6]], [[7, 8, 9], [7]])
    logprobs, ref = torch.tensor([[-1.0, -1, -1], [-2, 99, 99]]), torch.tensor([[-2.0, -1, -1], [-1, -99, -99]])
    values = torch.tensor([[0.0, 1, 2, 9], [3, 9, 9, 9]])
    rollout = Rollout(tokens, torch.tensor([True, False]), logprobs, ref, values, torch.tensor([1.0, 2]), torch.tensor([[1.0, 2, 3], [2, 0, 0]]), torch.tensor([[3.0, -99, -99], [5, 7, -99]]), torch.tensor([[True, False, False], [True, True, False]]), logprobs)
    wide = torch.cat([mask, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    experience = Experience(tokens, logprobs, logprobs, values, torch.where(wide, values, -50.0), wide)
    rewards = torch.tensor([[0.0, 0, 1, 77], [2, 77, 77, 77]])
    m = report.metrics_of(rollout, experience, rewards, config(), kl_coef=0.05, clock=Clock(1, 1, 1), scorers=["a", "b", "c"])
    assert m["policy/entropy"] == pytest.approx(8 / 4)
    assert m["objective/kl"] == pytest.approx((1 - 1) / 2)  # per completion: (-1 + 2) = 1 and (-2 + 1) = -1
    assert m["objective/kl_k3"] == pytest.approx(maths.k3(logprobs, ref, mask).sum().item() / 2)
    assert m["objective/reward"] == pytest.approx(1.5)
    assert m["objective/score"] == pytest.approx(1.5)
    assert m["objective/score_se"] == pytest.approx(0.5)  # std .7071 over root 2
    assert {k: v for k, v in m.items() if k.startswith("objective/score/")} == {"objective/score/a": 4.0, "objective/score/b": 7.0}  # over those that apply
    assert m["rollout/length"] == 2
    assert m["rollout/eos_rate"] == 0.5
    assert m["rollout/short_completions"] == 0.5
    assert m["value/explained_variance"] == pytest.approx(1.0)


def test_speeds_of_the_parts_of_an_iteration_add_up():
    """8 completions of 40 tokens in 2 + 1 + 5 s: 20, 40 and 8 tokens/s; 1/20 + 1/40 + 1/8 = 8/40."""
    found = report.speeds(8, 40.0, Clock(2.0, 1.0, 5.0))
    assert {part: found[f"{part}/tokens_per_second"] for part in ("rollout", "scoring", "update")} == {"rollout": 20, "scoring": 40, "update": 8}
    assert {part: found[f"{part}/completions_per_second"] for part in ("rollout", "scoring", "update")} == {"rollout": 4, "scoring": 8, "update": 1.6}


def test_trap_14_a_kill_while_old_lines_are_dropped_loses_no_metrics(tmp_path, monkeypatch):
    """A resumed run drops the lines it will do again; until the shorter file is whole, the longer one stays."""
    from pathlib import Path

    path = tmp_path / "metrics.jsonl"
    lines = "".join(f'{{"iteration": {i}, "x": {i}}}\n' for i in (1, 2, 3))
    path.write_text(lines + '{"iteration": 4, "x"')

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(Path, name, killed)
        with pytest.raises(KeyboardInterrupt):
            report.Lines(path, 2)
    assert path.read_text().startswith(lines)
    report.Lines(path, 2).add({"iteration": 3, "x": 9})
    assert [line["x"] for line in map(json.loads, path.read_text().splitlines())] == [1, 2, 9]


def test_row_17_the_policys_and_the_value_functions_parameters_are_told_apart():
    for kind, extra in (("copy", True), ("head", False)):
        module = module_of(kind=kind)
        value = {id(p) for p in module.value_parameters()}
        assert value.isdisjoint(id(p) for p in module.policy_parameters())
        assert ({id(p) for p in module.value_trunk.parameters()} <= value) if extra else value == {id(p) for p in module.value_head.parameters()}


def test_a_layer_of_the_policy_that_is_called_value_belongs_to_the_policy():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleDict({"value": nn.Linear(2, 2)})

    module = PolicyAndValue(Odd(), None, models.scalar_head(2, seed=0), temperature=1.0)
    assert len(module.policy_parameters()) == 2
    assert [is_of(f"layer.value.{rest}", "value") for rest in ("weight", "base_layer.weight", "lora_A.default.weight", "lora_A.value.weight")] == [False, False, False, True]


def live_graph(module, experience, accelerator, monkeypatch):
    """Tensors that the policy's graph keeps, when the policy's forward is done and when the value function's begins."""
    import weakref

    kept, counts = weakref.WeakSet(), {"after policy": [], "before value": []}

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    logprobs, values = module.logprobs, module.values

    def policy_pass(tokens, *rest):
        out = logprobs(tokens, *rest)
        counts["after policy"].append(len(kept))
        return out

    def value_pass(tokens):
        counts["before value"].append(len(kept))
        return values(tokens)

    monkeypatch.setattr(module, "logprobs", policy_pass)
    monkeypatch.setattr(module, "values", value_pass)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run(module, experience, accelerator, micro_batch_size=3)
    return counts


def test_one_graph_at_a_time_nothing_of_the_policys_is_alive_when_the_value_function_runs(accelerator, monkeypatch):
    module = module_of()
    counts = live_graph(module, experience_of(module), accelerator, monkeypatch)
    assert len(counts["before value"]) == 3
    assert min(counts["after policy"]) > 20, "hooks that see nothing prove nothing"
    assert counts["before value"] == [0, 0, 0]


@pytest.mark.parametrize("bucket", [1, 7, 10**6])
def test_gradients_are_summed_over_processes_whatever_the_bucket(monkeypatch, bucket):
    """All-reduce stood in for by one that doubles, as if another process had the same gradients."""
    from stages.ppo import gradients

    monkeypatch.setattr(gradients, "BUCKET", bucket)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(2))
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    shapes = [(2, 3), (4,), (), (3, 2)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes] + [nn.Parameter(torch.zeros(2), requires_grad=False), nn.Parameter(torch.zeros(2))]
    for i, parameter in enumerate(parameters[:4]):
        parameter.grad = torch.full(shapes[i], float(i + 1))
    parameters[3].grad = torch.full((2, 3), 4.0).t()  # not contiguous
    gradients.sum_gradients(parameters, accelerator)
    assert [p.grad.unique().tolist() for p in parameters[:4]] == [[2.0], [4.0], [6.0], [8.0]]
    assert [p.grad for p in parameters[4:]] == [None, None]


def test_a_parameter_that_only_another_process_has_a_gradient_for_gets_it(monkeypatch):
    from stages.ppo import gradients

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(1))  # the other process: a gradient of ones everywhere
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad = torch.tensor([3.0, 4.0])
    gradients.sum_gradients(parameters, SimpleNamespace(num_processes=2, device=torch.device("cpu")))
    assert [p.grad.tolist() for p in parameters] == [[4.0, 5.0], [1.0, 1.0]]


def test_a_micro_batch_without_a_single_token_is_left_out_of_the_gradient(accelerator):
    """Its completions are all empty: no log-prob, no graph, nothing to go back through."""
    start = module_of()
    experience = experience_of(start)
    empty = experience.tokens.mask.clone()
    empty[experience.lengths().argsort()[:2]] = False
    ragged = replace(experience, tokens=replace(experience.tokens, mask=empty), value_mask=experience.value_mask & torch.cat([empty, empty[:, :1]], 1))
    results = []
    for size in (8, 1):
        module = copy.deepcopy(start)
        run(module, ragged, accelerator, micro_batch_size=size)
        results.append(weights(module))
    assert largest_difference(*results) < 1e-6
