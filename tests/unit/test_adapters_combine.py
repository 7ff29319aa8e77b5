"""Adapters composed into new ones: the arithmetic by hand, what is published, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from configs.errors import UserError
from launch.cli import main
from stages import models
from stages.adapters.combine import Method, combine
from stages.adapters.facts import listed
from tests.adapters import logits, publish_adapter, publish_whole, updates, world


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """a and b of rank 2, c of rank 3, r rank-stabilised, all on one folder; d on another one."""
    from peft import IA3Config

    registry, base = world(tmp_path_factory.mktemp("combine"))
    for seed, name in enumerate("ab", start=1):
        publish_adapter(registry, f"sft/{name}", base, seed=seed)
        ia3 = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
        publish_adapter(registry, f"sft/ia3-{name}", base, seed=seed, config=ia3)
    publish_adapter(registry, "sft/c", base, seed=3, r=3, target_modules=["q_proj", "o_proj"])
    publish_adapter(registry, "sft/r", base, seed=4, use_rslora=True, lora_alpha=3)
    publish_adapter(registry, "sft/dora", base, seed=5, use_dora=True)
    publish_adapter(registry, "sft/d", str(world(tmp_path_factory.mktemp("other"), seed=9)[1]), seed=6)
    publish_whole(registry, "sft/whole", base)
    return registry, base


def model_of(registry, ref):
    return models.load_policy(models.find(ref, registry.root))


def summed(registry, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """Layer -> Σ w · scaling · B · A."""
    found: dict[str, torch.Tensor] = {}
    for ref, weight in weights.items():
        for layer, update in updates(registry.resolve(ref)).items():
            found[layer] = found.get(layer, 0) + weight * update
    return found


@pytest.mark.parametrize("weights", [{"sft/a": 0.7, "sft/b": 0.3}, {"sft/a": 1.5, "sft/c": -0.5}, {"sft/a": 0.25, "sft/r": 2.0}, {"sft/r": 2.0, "sft/a": 0.25}])
def test_cat_is_the_weighted_sum_of_the_updates(place, weights):
    """Of different ranks and layers too, and whoever comes first: rank-stabilised, the first one's scaling would be handed on as √rank."""
    registry, base = place
    made = combine(registry, list(weights), "sft/cat", Method("cat", tuple(weights.values())))
    wanted, found = summed(registry, weights), updates(made)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[layer], wanted[layer], atol=1e-6) for layer in wanted)
    plain = models.load_policy(models.find(base, registry.root))
    for layer, update in wanted.items():
        plain.get_submodule(layer.removeprefix("base_model.model.")).weight.data += update.float()
    assert torch.allclose(logits(model_of(registry, "sft/cat")), logits(plain), atol=1e-4)
    record = made.info("stage_info")["combined"]
    assert record["deviation"] < 1e-6
    assert record["result_rank"] == (5 if "sft/c" in weights else 4)


def test_linear_adds_the_factors_so_that_products_of_one_with_the_other_remain(place):
    """(√.7·B1 + √.3·B2)(√.7·A1 + √.3·A2) with scalings 2, worked out from the files; it is not the weighted sum, and that is told."""
    from safetensors.torch import load_file

    registry, _ = place
    told = []
    made = combine(registry, ["sft/a", "sft/b"], "sft/linear", Method("linear", (0.7, 0.3)), say=told.append)
    one, two = (load_file(registry.resolve(ref).model_dir / "adapter_model.safetensors") for ref in ("sft/a", "sft/b"))
    for layer, update in updates(made).items():
        a, b = ((1.4**0.5) * one[f"{layer}.lora_{x}.weight"] + (0.6**0.5) * two[f"{layer}.lora_{x}.weight"] for x in "AB")
        assert torch.allclose(update, (b @ a).double(), atol=1e-5)
    wanted = summed(registry, {"sft/a": 0.7, "sft/b": 0.3})
    gap = sum(float((updates(made)[layer] - wanted[layer]).square().sum()) for layer in wanted) ** 0.5
    whole = sum(float(value.square().sum()) for value in wanted.values()) ** 0.5
    assert gap / whole > 0.1
    assert made.info("stage_info")["combined"]["deviation"] == pytest.approx(gap / whole, rel=1e-4)
    assert f"{gap / whole:.1%} away from the weighted sum" in told[0]


@pytest.mark.parametrize("how", ["linear", "svd"])
def test_one_adapter_at_weight_1_is_that_adapter(place, how):
    registry, _ = place
    combine(registry, ["sft/r"], "sft/alone", Method(how, (1.0,)))
    assert torch.allclose(logits(model_of(registry, "sft/alone")), logits(model_of(registry, "sft/r")), atol=1e-5)


def test_svd_is_exact_at_the_sum_of_the_ranks_and_the_best_of_its_rank_below(place):
    registry, _ = place
    weights = {"sft/a": 0.7, "sft/c": 0.3}
    wanted = summed(registry, weights)
    whole = combine(registry, list(weights), "sft/svd", Method("svd", (0.7, 0.3), rank=5))
    assert all(torch.allclose(update, wanted[layer], atol=1e-5) for layer, update in updates(whole).items())
    for layer, update in updates(combine(registry, list(weights), "sft/svd", Method("svd", (0.7, 0.3), rank=2))).items():
        rest = torch.linalg.svdvals(wanted[layer])[2:].square().sum()
        assert float((update - wanted[layer]).square().sum()) == pytest.approx(float(rest), rel=1e-3, abs=1e-8)  # Eckart and Young 1936


@pytest.mark.parametrize("how", ["svd", "ties_svd", "dare_linear_svd"])
def test_a_peft_that_scales_twice_is_refused(place, monkeypatch, how):
    """peft 0.19 and 0.20 gave twice the update of adapters whose scaling is 2."""
    registry, _ = place
    monkeypatch.setattr("stages.adapters.combine.version", lambda name: "0.20.0")
    with pytest.raises(UserError, match=r"peft 0\.20\.0 multiplies the updates by their scaling twice.*peft>=0\.21"):
        combine(registry, ["sft/a", "sft/b"], f"sft/{how}", Method(how, (0.5, 0.5), density=0.5 if how != "svd" else None))
    combine(registry, ["sft/a", "sft/b"], "sft/still", Method("cat", (0.5, 0.5)))


def test_ties_by_hand():
    """Two updates of four entries, density 1/2, weights 1 and 2.

    [4, -3, 1, 0] and [-2, 5, 0, 1]: each keeps its two largest, [4, -3, 0, 0] and [-2, 5, 0, 0]. Sums 2 and 2 elect + for both entries. Of the
    first only 4 · 1 agrees, of the second only 5 · 2; each is a mean over one: [4, 10, 0, 0].
    """
    from peft.utils.merge_utils import ties

    one, two = torch.tensor([[4.0, -3.0], [1.0, 0.0]]), torch.tensor([[-2.0, 5.0], [0.0, 1.0]])
    assert torch.equal(ties([one, two], torch.tensor([1.0, 2.0]), 0.5), torch.tensor([[4.0, 10.0], [0.0, 0.0]]))


def test_ties_svd_works_on_the_updates(place):
    """At full rank (v_proj is 16 to 8) what is published is peft's TIES of ΔW, which the case above checks by hand."""
    from peft.utils.merge_utils import ties

    registry, _ = place
    made = updates(combine(registry, ["sft/a", "sft/b"], "sft/ties", Method("ties_svd", (0.5, 0.5), density=0.5, rank=8)))
    one, two = (updates(registry.resolve(ref)) for ref in ("sft/a", "sft/b"))
    layers = [layer for layer in made if layer.endswith("v_proj")]
    assert len(layers) == 2
    for layer in layers:
        assert torch.allclose(made[layer], ties([one[layer], two[layer]], torch.tensor([0.5, 0.5]).double(), 0.5), atol=1e-4)


def test_a_rank_that_a_layer_does_not_have_is_refused(place):
    """peft would write factors of another shape than its config says, which nothing loads."""
    registry, _ = place
    with pytest.raises(UserError, match=r"--rank 9: .*v_proj.* is 16 to 8, so its updates have rank 8 at most"):
        combine(registry, ["sft/a", "sft/b"], "sft/refused", Method("svd", rank=9))


def test_dare_follows_its_seed_and_nothing_else(place):
    registry, _ = place

    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.randint(0, 1000, ()).item())
        return updates(combine(registry, ["sft/a", "sft/b"], "sft/dare", Method("dare_linear", density=0.5, seed=seed)))

    first, again, other = draw(3), draw(3), draw(4)
    assert all(torch.equal(first[layer], again[layer]) for layer in first)
    assert not all(torch.equal(first[layer], other[layer]) for layer in first)
    assert registry.resolve("sft/dare").info("stage_info")["combined"]["seed"] == 4


def test_ia3_vectors_are_averaged(place):
    from safetensors.torch import load_file

    registry, _ = place
    made = combine(registry, ["sft/ia3-a", "sft/ia3-b"], "sft/ia3-ab", Method("linear", (0.75, 0.25)))
    one, two, both = (load_file(item.model_dir / "adapter_model.safetensors") for item in (registry.resolve("sft/ia3-a"), registry.resolve("sft/ia3-b"), made))
    assert all(torch.allclose(both[name], 0.75 * one[name] + 0.25 * two[name]) for name in one)
    assert made.info("stage_info")["combined"]["deviation"] is None


def test_what_is_published_has_its_lineage_and_is_an_adapter_like_any_other(place):
    registry, base = place
    made = combine(registry, ["sft/a", "sft/b@1"], "sft/ab", Method("dare_ties", density=0.5, seed=7))
    assert [(parent["role"], parent.get("ref") or parent["source"]) for parent in made.manifest["parents"]] == [("adapter", "sft/a@1"), ("adapter", "sft/b@1"), ("base", base)]
    record = made.info("stage_info")["combined"]
    assert {key: record[key] for key in ("how", "weights", "density", "seed", "sign", "of")} == {
        "how": "dare_ties", "weights": [0.5, 0.5], "density": 0.5, "seed": 7, "sign": "total", "of": ["sft/a@1", "sft/b@1"],
    }  # fmt: skip
    assert made.info("stage_info")["adapter"] == registry.resolve("sft/a").info("stage_info")["adapter"]
    assert "sft/b@1" in registry.lineage("sft/ab").render()
    assert sorted(path.name for path in made.model_dir.glob("adapter*")) == ["adapter_config.json", "adapter_model.safetensors"]
    models.verify(models.find("sft/ab", registry.root))
    combine(registry, ["sft/ab", "sft/c"], "sft/abc", Method("cat"))  # a combination can be combined


@pytest.mark.parametrize(
    ("refs", "method", "said"),
    [
        (["sft/a", "sft/c"], Method("linear"), r"ranks must be one; found sft/a: 2, sft/c: 3\. Use --how svd, .* or --how cat, which is exact"),
        (["sft/a", "sft/c"], Method("ties", density=0.5), "Use --how ties_svd"),
        (["sft/a", "sft/d"], Method(), r"sft/a@1 is an adapter on .*base.* and sft/d@1 on .*; only adapters of one base"),
        (["sft/a", "sft/whole"], Method(), "sft/whole@1 holds whole weights, no adapter"),
        (["sft/a", "sft/dora"], Method(), "sft/dora@1 is a DoRA adapter: .*--merge"),
        (["sft/a", "sft/ia3-a"], Method("linear"), "sft/a is lora, sft/ia3-a is ia3; only adapters of one kind"),
        (["sft/ia3-a", "sft/ia3-b"], Method("svd"), "--how svd: IA3 adapters are vectors; .*--how linear"),
        (["sft/ia3-a", "sft/ia3-b"], Method("linear", (0.7, 0.7)), r"add up to 1\.4; IA3"),
        (["sft/a", "sft/b"], Method("magic"), "--how magic: expected one of cat, svd"),
        (["sft/a", "sft/b"], Method("ties"), r"--density: ties needs .*; found None"),
        (["sft/a", "sft/b"], Method("dare_ties", density=0.0), r"above 0 and up to 1.*found 0\.0"),
        (["sft/a", "sft/b"], Method("cat", density=0.5), "cat keeps every entry: leave it out"),
        (["sft/a", "sft/b"], Method("cat", rank=4), "--rank 4: .*follows from the parents'"),
        (["sft/a", "sft/b"], Method("cat", (1.0,)), "found 1 for 2 adapters"),
        (["sft/a", "sft/b"], Method("cat", (1.0, float("nan"))), "expected one number for each"),
        (["sft/none"], Method(), "no checkpoint sft/none"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_what_to_do(place, refs, method, said):
    registry, _ = place
    with pytest.raises(UserError, match=said):
        combine(registry, refs, "sft/refused", method)
    assert not registry.list("sft", "refused")


def test_a_reward_adapter_or_name_is_refused(place):
    registry, _ = place
    with pytest.raises(UserError, match="--as reward/x: adapters of policies make a policy; name it sft/x"):
        combine(registry, ["sft/a"], "reward/x", Method())


def test_a_base_that_has_changed_is_refused(tmp_path):
    registry, base = world(tmp_path)
    publish_adapter(registry, "sft/a", base)
    world(tmp_path, seed=8)
    with pytest.raises(UserError, match=r"adapter trained on .*, and would be put on"):
        combine(registry, ["sft/a"], "sft/x", Method())


def test_adapters_are_listed_by_base(place, capsys):
    registry, base = place
    rows = listed(registry, base)
    assert {row.checkpoint.name for row in rows} >= {"a", "b", "c", "ia3-a", "dora", "r"}
    assert all(row.base == base for row in rows)
    # 2 layers · 2 modules · rank 2: A is [2, 16], B [16, 2] of q_proj and [8, 2] of v_proj
    (a,) = (row for row in rows if row.checkpoint.name == "a")
    assert (a.facts.technique, a.facts.rank, a.facts.trained) == ("lora", 2, 2 * ((2 * 16 + 16 * 2) + (2 * 16 + 8 * 2)))
    assert {row.checkpoint.name: row.facts.technique for row in rows}["r"] == "rslora"
    assert main(["adapters", "list", "--registry", str(registry.root), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {row["base"] for row in shown} > {base}
    assert next(row for row in shown if row["ref"] == "sft/a@1")["metrics"] == {"loss": 1.5}
    assert main(["adapters", "list", "--registry", str(registry.root), "--base", "nowhere"]) == 0
    assert "no adapters on nowhere" in capsys.readouterr().out


def test_the_command_publishes_and_says_what(place, capsys):
    registry, _ = place
    words = ["adapters", "combine", "sft/a", "sft/b", "--weights", "0.7", "-0.3", "--how", "svd", "--as", "sft/typed", "--registry", str(registry.root)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "published sft/typed@1" in shown.out
    assert "combined by svd" in shown.err
    assert registry.resolve("sft/typed").info("stage_info")["combined"]["weights"] == [0.7, -0.3]
