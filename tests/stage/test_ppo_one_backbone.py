"""One backbone: policy, value function, reference and reward model on one copy of the base weights."""

from __future__ import annotations

import pytest
import torch

from rewards.ensemble import combine
from stages import models
from stages.ppo import train as ppo_train
from stages.ppo.build import AdapterScorer
from stages.ppo.modules import POLICY, REWARD, VALUE, is_of
from stages.registry import Registry
from stages.scorers import reward_scorer
from tests.stage.ppo_runs import (
    ADAPTER,
    LORA,
    assembled,
    check_values_are_centred_scores,
    metrics,
    one_update,
    publish_policy,
    publish_reward,
    rollout_of,
    run,
    settings,
    weights,
    workspace,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workspace(tmp_path_factory.mktemp("ppo"))
    publish_reward(folder, "adapter", lora=True, seed=6)
    return folder


def test_one_backbone_trains_the_adapters_and_leaves_every_base_weight_as_it_was(place, monkeypatch):
    """Through `main`, so that nothing that main does on the way is left out."""
    seen = {}
    original = ppo_train.train

    def spy(cfg, accelerator, built, *rest):
        seen["before"] = {name: p.detach().clone() for name, p in built.trained.named_parameters()}
        result = original(cfg, accelerator, built, *rest)
        seen["after"] = dict(built.trained.named_parameters())
        return result

    monkeypatch.setattr(ppo_train, "train", spy)
    run(settings(place, "bits", lora=LORA, scorers=[ADAPTER]))
    changed = {name for name, p in seen["after"].items() if not torch.equal(p, seen["before"][name])}
    assert not [n for n in changed if not (is_of(n, POLICY) or is_of(n, VALUE) or n.startswith("value_head."))]
    adapters = {name for name in seen["after"] if is_of(name, POLICY) or is_of(name, VALUE)}
    assert adapters
    assert adapters <= changed
    assert [n for n in seen["after"] if is_of(n, REWARD)], "the reward adapter is there, and did not move"


def test_one_backbone_is_one_copy_of_the_weights(place):
    *_, built, _ = assembled(settings(place, lora=LORA, scorers=[ADAPTER]))
    scorer = next(iter(built.scorer.parts.values())).scorer
    assert isinstance(scorer, AdapterScorer)
    parameters = [p for m in (built.trained, built.reference.model, scorer.model, built.published) for p in m.parameters()]
    base = {p.data_ptr(): p.numel() for p in parameters if p.shape == (259, 32)}
    assert len(base) == 1
    one = sum(p.numel() for p in models.load_policy(models.find("sft/one", place / "registry")).parameters())
    frozen = {p.data_ptr(): p.numel() for n, p in built.trained.named_parameters() if not p.requires_grad and not is_of(n, REWARD)}
    assert sum(frozen.values()) == one


def test_one_backbone_the_reference_is_the_start_policy_to_the_bit(place):
    values = settings(place, lora=LORA, scorers=[ADAPTER], engine={"old_logprobs": "forward"})
    built, rollout, _ = one_update(values)
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)
    start = models.load_policy(models.find("sft/one", place / "registry"))
    from stages.ppo.modules import Reference

    alone = Reference(start, temperature=1.0).logprobs(rollout.tokens)
    torch.testing.assert_close(built.reference.logprobs(rollout.tokens), alone, atol=1e-6, rtol=0)
    with torch.no_grad():
        moved = built.trained(rollout.tokens).logprobs
    assert (moved - alone)[rollout.tokens.mask].abs().max() > 1e-3, "the policy has moved, its reference has not"


def test_one_backbone_both_adapters_get_gradients_of_their_own_loss(place):
    cfg, accelerator, tokens, built, prompts = assembled(settings(place, lora=LORA, scorers=[ADAPTER]))
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    for adapter, pick in ((POLICY, lambda o: o.logprobs.sum()), (VALUE, lambda o: o.values[:, :-1][rollout.tokens.mask].sum())):
        built.trained.zero_grad()
        pick(built.trained(rollout.tokens)).backward()
        moved = {n for n, p in built.trained.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any(is_of(n, adapter) for n in moved)
        assert all(is_of(n, adapter) or n.startswith("value_head.") for n in moved)


def test_one_backbone_scores_as_the_reward_model_loaded_alone(place):
    built, rollout, _ = one_update(settings(place, lora=LORA, scorers=[ADAPTER]))
    inside = next(iter(built.scorer.parts.values())).scorer
    assert isinstance(inside, AdapterScorer)
    alone = reward_scorer("reward/adapter", place / "registry")
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, strict=True)]
    completions = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.completion_ids, rollout.tokens.mask, strict=True)]
    expected = alone.score_ids(prompts, completions)
    assert expected.std() > 0.05
    torch.testing.assert_close(inside.score_ids(prompts, completions), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.scores, expected, atol=1e-5, rtol=0)  # before the update, too
    assert (inside.mean, inside.std) == (alone.mean, alone.std) == (0.3, 2.0)


def test_trap_8_the_reward_adapters_scores_do_not_depend_on_the_batch(place):
    built, rollout, _ = one_update(settings(place, lora=LORA, scorers=[ADAPTER]))
    scorer = next(iter(built.scorer.parts.values())).scorer
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, strict=True)]
    completions = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.completion_ids, rollout.tokens.mask, strict=True)]
    alone = torch.cat([scorer.score_ids([p], [c]) for p, c in zip(prompts, completions, strict=True)])
    for size in (1, 2, 8):
        scorer.batch_size = size
        torch.testing.assert_close(scorer.score_ids(prompts[::-1], completions[::-1]).flip(0), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["raw", "plain", "chatml"])
def test_trap_19_the_score_is_read_at_the_eos_that_a_rollout_ends_with(place, template):
    """Whatever a template writes after EOS: ids of a rollout and text of an answer are scored at the same token."""
    publish_policy(place, f"speaks-{template}", template)
    publish_reward(place, f"hears-{template}", base=f"sft/speaks-{template}")
    values = settings(place, init_from=f"sft/speaks-{template}", scorers=[{"kind": "model", "checkpoint": f"reward/hears-{template}"}])
    cfg, accelerator, tokens, built, prompts = assembled(values)
    scorer = next(iter(built.scorer.parts.values())).scorer
    assert scorer.token_key == tokens.key
    said = [tokens.formatter.completion_ids(text, "why") for text in ("because", "no idea at all")]
    assert [ids[-1] for ids in said] == [258, 258]
    by_ids = scorer.score_ids([tokens.formatter.prompt_ids("why")] * 2, said)
    assert scorer(["why", "why"], ["because", "no idea at all"], finished=[True, True]) == pytest.approx(by_ids.tolist(), abs=1e-5)
    beyond = scorer.score_ids([tokens.formatter.prompt_ids("why")] * 2, [[*ids, 198] for ids in said])
    assert (beyond - by_ids).abs().min() > 1e-3, "another position has another score"
    rollout = rollout_of(cfg, accelerator, tokens, built, prompts)
    assert all(ids[mask][-1] == 258 for ids, mask, end in zip(rollout.tokens.completion_ids, rollout.tokens.mask, rollout.finished, strict=True) if end)


def test_one_backbone_the_value_adapter_starts_as_the_centred_reward_adapter(place):
    *_, built, _ = assembled(settings(place, lora=LORA, scorers=[ADAPTER]))
    check_values_are_centred_scores(built, reward_scorer("reward/adapter", place / "registry"))


def test_one_backbone_the_published_adapter_is_the_trained_policy(place):
    """8 prompts: base + adapter, merged by load_policy, and peft's own loading give the logits of the policy in memory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    seen = {}
    original = ppo_train.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_train, "train", lambda cfg, a, built, *r: (original(cfg, a, built, *r), seen.update(policy=built.trained.policy))[0])
        checkpoint = run(settings(place, "adapter", lora=LORA, scorers=[ADAPTER]))
    merged = models.load_policy(models.find("ppo/adapter", place / "registry"))
    base = Registry(place / "registry").resolve("sft/one")
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.model_dir), checkpoint.model_dir).eval()
    assert {k.split(".lora_")[1][:1] for k in weights(checkpoint)} == {"A", "B"}
    assert not [k for k in weights(checkpoint) if "value" in k or "reward" in k]
    start = models.load_policy(models.find("sft/one", place / "registry"))
    for length in range(2, 10):
        ids = torch.arange(length).unsqueeze(0) * 7 % 256
        with torch.no_grad():
            trained, one, other, before = (m(input_ids=ids).logits for m in (seen["policy"], merged, unmerged, start))
        torch.testing.assert_close(one, trained, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other, trained, atol=1e-5, rtol=1e-5)
    assert (trained - before).abs().max() > 1e-2
    parents = {(p["role"], p["id"]) for p in checkpoint.manifest["parents"]}
    assert {("init_from", base.id), ("reference", base.id)} <= parents


def test_one_backbone_value_head_starts_at_zero_without_a_reward_model(place):
    *_, built, _ = assembled(settings(place, lora=LORA))
    assert built.trained.value_head.weight.eq(0).all()


def test_one_backbone_on_a_base_that_is_itself_base_and_adapter(place):
    """SFT with adapters, a reward adapter on that, PPO with adapters on that: one backbone all the same."""
    if not Registry(place / "registry").list("ppo", "under"):
        run(settings(place, "under", {"iterations": 1}, lora=LORA))
    publish_reward(place, "above", lora=True, base="ppo/under", seed=8)
    chain = settings(place, "chain", init_from="ppo/under", lora=LORA, scorers=[{"kind": "model", "checkpoint": "reward/above"}])
    *_, built, _ = assembled(chain)
    inside, alone = next(iter(built.scorer.parts.values())).scorer, reward_scorer("reward/above", place / "registry")
    assert isinstance(inside, AdapterScorer)
    rows = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    torch.testing.assert_close(inside.score_ids(*rows), alone.score_ids(*rows), atol=1e-5, rtol=0)
    run(chain)
    assert metrics(chain)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    models.load_policy(models.find("ppo/chain", place / "registry"))


def test_one_backbone_holds_every_adapter_of_a_reward_ensemble(place):
    """Two reward adapters beside policy and value adapter on one copy of the weights score as the two reward models loaded alone."""
    publish_reward(place, "adapter-2", lora=True, seed=9, mean=-1.0, std=0.5)
    ensemble = {"kind": "ensemble", "checkpoints": ["reward/adapter", "reward/adapter-2"], "spread_coef": 0.5}
    values = settings(place, "together", lora=LORA, scorers=[ensemble])
    built, rollout, _ = one_update(values)
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, strict=True)]
    completions = [ids[mask].tolist() for ids, mask in zip(rollout.tokens.completion_ids, rollout.tokens.mask, strict=True)]
    alone = [reward_scorer(f"reward/{name}", place / "registry").score_ids(prompts, completions).tolist() for name in ("adapter", "adapter-2")]
    expected = combine(alone, [0.3, -1.0], [2.0, 0.5], how="mean", spread_coef=0.5)
    torch.testing.assert_close(rollout.scores, torch.tensor(expected.scores), atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.parts[:, 1], torch.tensor(expected.spread), atol=1e-5, rtol=0)
    members = built.scorer.parts["reward/adapterx2"].scorer.members
    assert [member.adapter for member in members] == [REWARD, f"{REWARD}_2"]
    assert len({p.data_ptr() for m in (built.trained, *(m.model for m in members)) for p in m.parameters() if p.shape == (259, 32)}) == 1
    run(values)
    lines = metrics(values)
    assert all(line["objective/score_spread"] > 0.01 for line in lines if "objective/score" in line)


def held_out(place, *scorers):
    return {"evaluation": {"prompts": str(place / "held_out.jsonl"), "scorers": list(scorers), "samples_per_prompt": 1}}


def test_one_backbone_holds_the_reward_adapters_that_evaluations_hold_out(place):
    """Alone and in an ensemble, one of which is trained on too: one copy of the weights, the scores of the models loaded alone, and nothing of them in what is trained."""
    publish_reward(place, "other", lora=True, seed=11, mean=-1.0, std=0.5)
    other, ensemble = {"kind": "model", "checkpoint": "reward/other"}, {"kind": "ensemble", "checkpoints": ["reward/adapter", "reward/other"]}
    *_, plain, _ = assembled(settings(place, lora=LORA, scorers=[ADAPTER]))
    *_, built, _ = assembled(settings(place, lora=LORA, scorers=[ADAPTER], **held_out(place, other, ensemble)))
    members = [scorer for _, scorer in built.heldout_scorer.single()]
    assert [member.adapter for member in members] == [f"{REWARD}_2", REWARD, f"{REWARD}_2"]
    assert len({p.data_ptr() for m in (built.trained, *(m.model for m in members)) for p in m.parameters() if p.shape == (259, 32)}) == 1
    prompts, completions = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    alone = [reward_scorer(f"reward/{name}", place / "registry").score_ids(prompts, completions) for name in ("other", "adapter", "other")]
    assert (alone[0] - alone[1]).abs().min() > 0.05
    for member, expected in zip(members, alone, strict=True):
        torch.testing.assert_close(member.score_ids(prompts, completions), expected, atol=1e-5, rtol=0)
    ours, theirs = ({n: p for n, p in m.trained.named_parameters() if p.requires_grad} for m in (built, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())
    assert [parent.role for parent in built.parents] == ["init_from", "reference", "scorer", *["heldout_scorer"] * 3]


def test_one_backbone_a_value_function_does_not_start_as_a_reward_adapter_that_is_held_out(place):
    *_, plain, _ = assembled(settings(place, lora=LORA))
    *_, built, _ = assembled(settings(place, lora=LORA, **held_out(place, ADAPTER)))
    assert isinstance(built.heldout_scorer.single()[0][1], AdapterScorer)
    theirs = dict(plain.trained.named_parameters())
    trained = {n: p for n, p in built.trained.named_parameters() if p.requires_grad}
    assert built.trained.value_head.weight.eq(0).all()
    assert all(torch.equal(p, theirs[n]) for n, p in trained.items())
