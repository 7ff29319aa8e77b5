"""Every engine gives the policy's own distribution and its log-probs, and nothing of what it computed on the way stays alive."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from configs.errors import MissingExtra, UserError
from configs.schema import RolloutEngine
from stages.ppo.engines import continuous
from stages.ppo.engines.build import check_engine, prove_engine
from stages.ppo.engines.continuous import ContinuousEngine
from stages.ppo.engines.generate import GenerateEngine
from stages.ppo.engines.native import NativeEngine
from stages.ppo.engines.protocol import Policy, checked, share_seed
from stages.ppo.forward import hidden_states, token_outputs
from stages.ppo.sampling import Sample
from tests.unit.ppo_samples import PAD, config, model_of, ragged_ids, sampling, tokens_of

ENGINES = {
    "native": NativeEngine,
    "generate": GenerateEngine,
    "static": lambda policy: GenerateEngine(policy, static_cache=True),
    "continuous": ContinuousEngine,
}
every_engine = pytest.mark.parametrize("engine", list(ENGINES))


def policy_of(model=None, *, eos=(2, 3, 4), seed=0, autocast=nullcontext, **settings):
    return Policy(model or model_of(spread=0.15), sampling(**settings), eos, PAD, seed, autocast)


def draw(engine, policy, prompts, *, iteration=0, first=0):
    return ENGINES[engine](policy).sample(prompts, iteration=iteration, indices=range(first, first + len(prompts)))


def in_bf16():
    return torch.autocast("cpu", torch.bfloat16)


def forward_logprobs(policy, prompts, samples):
    tokens = tokens_of(prompts, [s.completion_ids for s in samples])
    with torch.no_grad(), policy.autocast():
        out = token_outputs(policy.model, hidden_states(policy.model.base_model, tokens), tokens, temperature=policy.sampling.temperature)
    return [out.logprobs[i, : len(s.completion_ids)].tolist() for i, s in enumerate(samples)]


def largest_gap(policy, prompts, samples):
    return max(abs(a - b) for row, s in zip(forward_logprobs(policy, prompts, samples), samples, strict=True) for a, b in zip(row, s.logprobs, strict=True))


@every_engine
def test_trap_17_samples_follow_the_softmax_at_the_temperature(engine):
    """Chi-square of 1,500 first tokens against softmax(logits / .7), and of 1,500 second tokens after the commonest first one."""
    model, prompt, count = model_of(spread=0.25), [5, 9, 11], 1500
    policy = policy_of(model, eos=(), temperature=0.7, max_new_tokens=2, stop_at_eos=False, generate_batch_size=250)
    rows = [s.completion_ids for s in draw(engine, policy, [prompt] * count)]
    first = max(set(row[0] for row in rows), key=[row[0] for row in rows].count)
    for prefix, seen in ((prompt, [row[0] for row in rows]), ([*prompt, first], [row[1] for row in rows if row[0] == first])):
        logits = model(torch.tensor([prefix])).logits[0, -1].double()
        chi, degrees = chi_square(seen, torch.softmax(logits / 0.7, dim=-1).tolist())
        assert degrees >= 4
        assert chi < degrees + 4 * math.sqrt(2 * degrees)
    chi, degrees = chi_square([row[0] for row in rows], torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), dim=-1).tolist())
    assert chi > degrees + 6 * math.sqrt(2 * degrees), "the test would see a temperature that is not applied"


def chi_square(seen, expected):
    """Statistic and degrees of freedom; cells that expect fewer than 5 are pooled."""
    cells = [(seen.count(token), len(seen) * p) for token, p in enumerate(expected) if len(seen) * p >= 5]
    rest = (len(seen) - sum(s for s, _ in cells), len(seen) - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 5 else []
    return sum((s - e) ** 2 / e for s, e in cells), len(cells) - 1


@every_engine
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_row_8_log_probs_are_those_of_a_training_forward(engine, kind):
    """Ragged prompts and completions in several batches; in bf16 they are as near as rounding lets them be."""
    model, (prompts, _) = model_of(kind, spread=0.15), ragged_ids(30)
    exact = policy_of(model, temperature=0.7, generate_batch_size=8)
    assert largest_gap(exact, prompts, draw(engine, exact, prompts)) < 1e-5
    rounded = policy_of(model, temperature=0.7, generate_batch_size=8, autocast=in_bf16)
    assert 1e-4 < largest_gap(rounded, prompts, draw(engine, rounded, prompts)) < 0.1


@every_engine
def test_row_5_a_completion_ends_with_the_first_of_any_eos_id(engine):
    policy, (prompts, _) = policy_of(eos=(2, 9, 30), max_new_tokens=20), ragged_ids(60)
    rows = draw(engine, policy, prompts)
    for row in rows:
        assert not {2, 9, 30} & set(row.completion_ids[:-1])
        assert row.finished == (row.completion_ids[-1] in {2, 9, 30})
        assert row.finished or len(row.completion_ids) == 20
    assert {r.completion_ids[-1] for r in rows if r.finished} == {2, 9, 30}, "every EOS id must have ended some row"
    assert not all(r.finished for r in rows)


@every_engine
def test_row_5_fixed_length_treats_an_eos_like_any_other_token(engine):
    policy, (prompts, _) = policy_of(stop_at_eos=False), ragged_ids(30)
    rows = draw(engine, policy, prompts)
    assert {len(r.completion_ids) for r in rows} == {12}
    assert all(r.finished for r in rows)
    assert any(t in (2, 3, 4) for r in rows for t in r.completion_ids[:-1])


@every_engine
def test_row_22_a_repeated_iteration_repeats_its_samples_and_another_one_does_not(engine):
    """Bit for bit, log-probs included, whatever the global generator holds, which is left as it was."""
    policy, (prompts, _) = policy_of(generate_batch_size=8), ragged_ids(20)
    once = draw(engine, policy, prompts, iteration=3, first=20)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for _ in range(3):
        assert draw(engine, policy, prompts, iteration=3, first=20) == once
    assert torch.equal(torch.get_rng_state(), state)
    others = [draw(engine, policy, prompts, iteration=4, first=20), draw(engine, policy, prompts, iteration=3, first=0), draw(engine, policy_of(policy.model, seed=1, generate_batch_size=8), prompts, iteration=3, first=20)]
    ids = [[s.completion_ids for s in rows] for rows in (once, *others)]
    assert all(a != b for i, a in enumerate(ids) for b in ids[:i]), "another iteration, share or seed"


def test_row_22_one_seed_per_share_of_an_iteration():
    seeds = {share_seed(s, i, range(first, first + 8)) for s in range(3) for i in range(50) for first in range(0, 64, 8)}
    assert len(seeds) == 3 * 50 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("engine", ["generate", "static"])
def test_row_22_generate_draws_what_the_native_loop_draws_for_any_batch(engine):
    policy, (prompts, _) = policy_of(), ragged_ids(40)
    native = [s.completion_ids for s in draw("native", policy, prompts)]
    for size in (1, 7, 64):
        again = draw(engine, policy_of(policy.model, generate_batch_size=size), prompts)
        assert [s.completion_ids for s in again] == native


@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_trap_17_the_models_generation_config_neither_counts_nor_changes(engine):
    prompts, _ = ragged_ids(20)
    plain, bent = model_of(spread=0.15), model_of(spread=0.15)
    bent.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, min_p=0.5, temperature=0.01, eos_token_id=[5, 6, 7, 8], max_new_tokens=2, repetition_penalty=9.0, min_new_tokens=5,
        no_repeat_ngram_size=1, suppress_tokens=[7, 8], num_return_sequences=2,
    )  # fmt: skip
    before, config = copy.deepcopy(bent.generation_config.to_dict()), copy.deepcopy(bent.config.to_dict())
    assert draw(engine, policy_of(bent), prompts) == draw(engine, policy_of(plain), prompts)
    assert bent.generation_config.to_dict() == before
    assert bent.config.to_dict() == config
    assert bent.config._attn_implementation == plain.config._attn_implementation
    assert "forward" not in vars(bent), "the model is left as it was"


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor with a vocabulary's width that any operation made."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == self.vocabulary:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("engine", ["native", "generate", "static"])
def test_trap_13_no_tensor_of_a_rollout_s_logits(engine):
    """The largest tensor with a vocabulary's width holds one step of one batch; and no step's survives the next."""
    vocabulary, rows = 307, 20  # more rows than the model is wide: its own weights are smaller
    policy = policy_of(model_of(vocabulary=vocabulary), eos=(), max_new_tokens=16, stop_at_eos=False, generate_batch_size=rows)
    prompts, alive = [[5] * n for n in range(3, 3 + 2 * rows)], []
    policy.model.get_output_embeddings().register_forward_hook(lambda *_: alive.append(living(vocabulary)))
    with Largest(vocabulary) as largest:
        draw(engine, policy, prompts)
    assert 0 < largest.elements <= rows * vocabulary
    assert len(alive) == 32
    assert max(alive[1:]) <= alive[0] + 4 * rows * vocabulary, "steps before the last one are kept"


@pytest.mark.parametrize("engine", ["continuous"])
def test_trap_13_no_tensor_of_a_rollout_s_logits_in_the_worker_thread(engine):
    """The worker is out of a dispatch mode's sight: logits of each forward and what lives between them are counted."""
    vocabulary, rows, widths, alive = 307, 6, [], []
    policy = policy_of(model_of(vocabulary=vocabulary), eos=(), max_new_tokens=16, stop_at_eos=False, generate_batch_size=rows)

    def note(_, __, out):
        widths.append(out.numel() // vocabulary)
        alive.append(living(vocabulary))

    policy.model.get_output_embeddings().register_forward_hook(note)
    draw(engine, policy, [[5] * n for n in range(3, 3 + 2 * rows)])
    assert max(widths) <= rows
    assert max(alive[1:]) <= alive[0] + 4 * rows * vocabulary


def living(vocabulary):
    """Elements of all tensors with a vocabulary's width that are alive now, weights included."""
    import gc

    return sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor and x.dim() > 1 and x.shape[-1] == vocabulary)


@pytest.mark.parametrize("engine", ["native", "generate", "continuous"])
def test_pads_are_not_paid_for_and_nothing_is_computed_after_the_last_end(engine):
    """Eight prompts of 2 tokens and eight of 60, in an order that would mix them: the positions that the trunk reads are counted."""
    policy, positions = policy_of(eos=tuple(range(2, 26)), max_new_tokens=40, generate_batch_size=8), []
    prompts = [[5, 6], [7] * 60] * 8
    policy.model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].numel()))
    rows = draw(engine, policy, prompts)
    longest = [max(len(s.completion_ids) for s in rows[start::2]) for start in (0, 1)]
    assert max(longest) < 25, "all end well before the limit"
    real = sum(map(len, prompts))
    # Each row has at most its batch's longest completion; mixed batches would read 16 x 60 for the prompts alone.
    assert sum(positions) <= real + 8 * sum(longest)
    assert len(positions) <= sum(longest) + 3


@every_engine
def test_lora_the_engine_samples_with_the_policy_adapter(engine):
    """Adapters for policy and value on one backbone: log-probs are those with the policy's on, and not those without."""
    from peft import get_peft_model

    from configs.schema import Lora
    from stages.ppo.modules import POLICY, VALUE, AdapterSwitch
    from stages.tuning.adapters import lora_config

    peft_model = get_peft_model(model_of(spread=0.15), lora_config(Lora(rank=4, alpha=8), "CAUSAL_LM"), adapter_name=POLICY)
    peft_model.add_adapter(VALUE, lora_config(Lora(rank=4, alpha=8), "CAUSAL_LM"))
    backbone = peft_model.get_base_model().eval()
    switch = AdapterSwitch(backbone, [POLICY, VALUE])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    policy, (prompts, _) = policy_of(backbone, temperature=0.7, generate_batch_size=8), ragged_ids(20)
    samples = draw(engine, policy, prompts)
    assert largest_gap(policy, prompts, samples) < 1e-5
    for other in (None, VALUE):
        with switch.on(other):
            assert largest_gap(policy, prompts, samples) > 0.05


# -- what is refused


def test_samples_that_are_not_what_was_asked_for_are_refused():
    policy = policy_of(eos=(2,), max_new_tokens=3)
    sound = [Sample([5, 6, 7], [-1.0, -2.0, 0.0], False), Sample([5, 2], [-1.0, -1.0], True), Sample([5, 6, 2], [-1.0, -1.0, -1.0], True)]
    assert checked("x", sound, policy) == sound
    for wrong, message in [
        (Sample([], [], False), "has 0 tokens"),
        (Sample([5], [-1.0], False), "has 1 tokens and ends with"),
        (Sample([5, 6, 7, 8], [-1.0] * 4, False), "has 4 tokens"),
        (Sample([5, 2, 6], [-1.0] * 3, False), "goes on after an EOS"),
        (Sample([5, 6, 7], [-1.0] * 2, False), "one finite number per token"),
        (Sample([5, 6, 7], [-1.0, float("nan"), -1.0], False), "one finite number per token"),
        (Sample([5, 6, 7], [-1.0, 0.5, -1.0], False), "not above 0"),
        (Sample([5, 6, 2], [-1.0] * 3, False), "says finished: False"),
    ]:
        with pytest.raises(UserError, match=f"engine.kind x: completion 1 .*{message}"):
            checked("x", [sound[0], wrong], policy)


class Other:
    """An engine that samples from another temperature, or not at all."""

    def __init__(self, policy, error=None):
        self.native, self.error = NativeEngine(policy), error

    def sample(self, *args, **kwargs):
        if self.error:
            raise self.error
        return self.native.sample(*args, **kwargs)


def test_an_engine_that_does_not_sample_from_the_policy_is_refused_at_the_start():
    policy = policy_of(model_of(spread=0.4))
    prove_engine("vllm", NativeEngine(policy), policy, process=0)
    with pytest.raises(UserError, match=r"engine.kind vllm: its log-probs differ from the policy's by .* processed_logprobs"):
        prove_engine("vllm", NativeEngine(policy_of(policy.model, temperature=3.0)), policy, process=0)
    with pytest.raises(UserError, match=r"can't sample from LlamaForCausalLM \(KeyError: 'paged'\); use engine.kind native"):
        prove_engine("continuous", Other(policy, KeyError("paged")), policy, process=0)


def test_continuous_batching_says_what_it_needs(monkeypatch):
    import transformers

    with pytest.raises(UserError, match=r"install transformers 5\.17 or newer"):
        continuous.check_installed(object())
    monkeypatch.setattr(transformers, "ContinuousBatchingConfig", object)
    with pytest.raises(UserError, match="continuous batching with log-probs and a seed"):
        ContinuousEngine(policy_of())


def test_a_request_that_fails_in_the_worker_is_an_error_and_leaves_the_model_usable(monkeypatch):
    policy, calls = policy_of(), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of blocks")

    handle = policy.model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(UserError, match=r"out of blocks.*use engine.kind native"):
        draw("continuous", policy, [[5, 6, 7]] * 4)
    handle.remove()
    assert len(draw("continuous", policy, [[5, 6, 7]] * 4)) == 4


def test_vllm_is_named_where_it_is_missing(monkeypatch):
    cfg = config(engine="vllm")
    with pytest.raises(MissingExtra, match=r"engine.kind: vllm needs a package.*align-stack\[vllm\]"):
        check_engine(cfg)
    monkeypatch.setattr("stages.ppo.engines.build.need", lambda *_: None)
    with pytest.raises(UserError, match="needs a GPU"):
        check_engine(cfg)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "native", "vllm": {"mode": "colocate"}}, "engine.vllm is read by kind: vllm only"),
        ({"kind": "continuous", "static_cache": True}, "engine.static_cache is read by kind: generate only"),
        ({"kind": "vllm", "vllm": {"mode": "server"}}, "engine.vllm.url is the server's address"),
        ({"kind": "vllm", "vllm": {"url": "http://127.0.0.1:8000"}}, "engine.vllm.url is the server's address"),
        ({"kind": "vllm", "importance_cap": 0.5}, "importance_cap"),
        ("vlm", "kind"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(engine, message):
    with pytest.raises(ValueError, match=message):
        config(engine=engine)


def test_a_bare_name_is_an_engine():
    assert config(engine="continuous").engine == RolloutEngine(kind="continuous")
    assert config().engine == RolloutEngine(kind="native", importance_cap=2.0)
