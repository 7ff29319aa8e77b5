"""The loss of SFT through its real trainer: in chunks as whole, packed as unpacked, rows of like length in one step."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, TrainerCallback

from configs.errors import UserError
from stages.loss.model import add_token_sums
from stages.training import packing, rehearsal, resume
from tests.stage.runs import metrics, run, run_until, settings, weights, workspace
from tests.stage.test_sft import encoded
from tests.tiny import tiny_model
from tests.unit.test_loss import Largest, tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("loss"))


def labelled(place, count):
    from stages.sft import labelled

    return [labelled(row) for row in encoded(place, "train")][:count]


def gradients_of(place, monkeypatch, **changes):
    """(loss of the first optimizer step, gradients before it is taken) of a run of the stage."""
    seen = {}

    class Keep(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_pre_optimizer_step(self, args, state, control, **_):
            seen.setdefault("gradients", {name: p.grad.clone() for name, p in self.trainer.model.named_parameters() if p.grad is not None})

    train = resume.train

    def keeping(trainer, *arguments, **keywords):
        trainer.add_callback(Keep(trainer))
        train(trainer, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "train", keeping)
        run("sft", settings(place, "sft", **changes))
    return metrics(place, "sft", "loss")[0], seen["gradients"]


def assert_same(one, other, rel=1e-5):
    """Losses, and gradients relative to the largest of their tensor."""
    assert one[0] == pytest.approx(other[0], rel=rel)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        gap = (gradient - other[1][name]).abs().max() / other[1][name].abs().max().clamp(min=1e-9)
        assert gap < 10 * rel, (name, gap)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_chunks_give_trls_loss_and_gradients(place, monkeypatch, lora):
    """Micro-batches of different length and number of completion tokens; chunks of 7 tokens, in fp32."""
    train = {"max_steps": 1, "micro_batch_size": 2}
    ours = gradients_of(place, monkeypatch, train=train | {"loss_chunk": 7}, lora=lora, name="chunks")
    trls = gradients_of(place, monkeypatch, train=train | {"loss_chunk": None}, lora=lora, name="trl")
    assert_same(ours, trls)


def test_a_run_in_chunks_ends_where_trls_does_and_counts_every_token_alike(place):
    """Six steps: loss, gradient norm, evaluation; the accuracy of a step is that of its tokens, not a mean over micro-batches."""
    found = {}
    for chunk in ("auto", None):
        checkpoint = run("sft", settings(place, "sft", {"max_steps": 6, "loss_chunk": chunk, "gradient_checkpointing": chunk == "auto"}, name=f"whole-{chunk}".lower()))
        found[chunk] = [*metrics(place, "sft", "loss"), *metrics(place, "sft", "eval_loss"), *metrics(place, "sft", "eval_token_accuracy")], weights(checkpoint)
        accuracies = metrics(place, "sft", "token_accuracy")
    assert found["auto"][0] == pytest.approx(found[None][0], rel=1e-5)
    assert len(accuracies) == 6
    for name, tensor in found["auto"][1].items():
        torch.testing.assert_close(tensor, found[None][1][name], rtol=0, atol=2e-5)


def test_an_adapter_on_the_head_is_trained(tmp_path):
    """TRL refuses it, since its own loss would leave it out."""
    place = workspace(tmp_path, tie_word_embeddings=False)
    lora = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "lm_head"]}
    checkpoint = run("sft", settings(place, "sft", {"max_steps": 2}, name="head", lora=lora))
    trained = {name: tensor for name, tensor in weights(checkpoint).items() if "lm_head.lora_B" in name}
    assert trained
    assert all(tensor.abs().max() > 0 for tensor in trained.values())


def test_label_smoothing_is_the_one_that_is_added_to_trls_loss(place, monkeypatch):
    """Two ways: from a chunk's logits, and as a product of hidden states and rows of the head that is added to TRL's loss."""
    train = {"max_steps": 1, "label_smoothing": 0.1}
    assert_same(gradients_of(place, monkeypatch, train=train | {"loss_chunk": 5}, name="smooth"), gradients_of(place, monkeypatch, train=train | {"loss_chunk": None}, name="smooth-trl"))


def test_label_smoothing_of_a_mixture_of_experts(tmp_path, capsys):
    """Its loss has a part for the balance of experts and so is TRL's, whatever loss_chunk says: smoothing is added to it."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    place = workspace(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=259, pad_token_id=256, eos_token_id=258, initializer_range=0.3)
    Qwen2MoeForCausalLM(config).save_pretrained(place / "base")
    found = {}
    rehearsed = {"rehearsal": {"data": str(place / "sft.jsonl")}}
    for name, train in {"auto": {"label_smoothing": 0.3}, "null": {"label_smoothing": 0.3, "loss_chunk": None}, "plain": {}, "rehearsed": rehearsed}.items():
        run("sft", settings(place, "sft", {"max_steps": 1} | train, name=name))
        found[name] = metrics(place, "sft", "loss")[0]
    assert "rehearsal: the model has a loss for its experts, so the loss is TRL's own and not computed in chunks" in capsys.readouterr().out
    assert found["auto"] == pytest.approx(found["null"], rel=1e-6)
    assert abs(found["auto"] - found["plain"]) > 1e-3


# -- rehearsal


def with_rehearsal(place, monkeypatch, name, train, **changes):
    """(objective of the first optimizer step, gradients), and the micro-batches that it was made of."""
    (place / "general.txt").write_text("the cat sat on the mat and the dog ran to the door\n" * 12)
    batches, collate = [], rehearsal.Marked.__call__

    def watched(self, rows):
        batches.append(collate(self, rows))
        return dict(batches[-1])

    train = {"max_steps": 1, "max_grad_norm": 1e9, "rehearsal": {"data": str(place / "general.txt"), "share": 0.3, "tokens": 24, "weight": 0.7}} | train
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal.Marked, "__call__", watched)
        _, gradients = gradients_of(place, monkeypatch, train=train, name=name, **changes)
    return (metrics(place, "sft", "objective")[0], gradients), [batch for batch in batches if "general" in batch]


@pytest.mark.parametrize(
    ("train", "changes"),
    [
        ({"loss_chunk": 7, "micro_batch_size": 2}, {}), ({"loss_chunk": 7, "micro_batch_size": 8, "label_smoothing": 0.1}, {}), ({"loss_chunk": None, "micro_batch_size": 4}, {}),
        ({"micro_batch_size": 2, "label_smoothing": 0.2}, {"packing": True}),
    ],
)  # fmt: skip
def test_rehearsal_is_the_tasks_mean_and_its_weight_times_the_general_rows_from_whole_logits(place, monkeypatch, train, changes):
    """In chunks and as TRL computes it, cut in one to four micro-batches, padded and packed, labels smoothed."""
    found, batches = with_rehearsal(place, monkeypatch, "rehearsed", train, **changes)
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    losses = {False: [], True: []}
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "general")}
        logits, labels = model(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]
        each = F.cross_entropy(logits.double(), labels, reduction="none", label_smoothing=train.get("label_smoothing", 0.0))
        for kind in losses:
            losses[kind].append(each[(labels != -100) & (batch["general"][:, 1:] == kind)])
    wanted = torch.cat(losses[False]).mean() + 0.7 * torch.cat(losses[True]).mean()
    wanted.backward()
    assert_same(found, (wanted.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))


def test_rehearsal_holds_no_logits_of_a_batch(place, monkeypatch):
    """4,000 words, 8 wide, some 300 tokens under the loss: in chunks of 7 tokens nothing has the size of the logits of 20; TRL's loss has a tile of all tokens."""
    tiny_model(place / "wide", hidden=8, layers=1, vocabulary=4000)
    largest, train = [], resume.train

    def measured(trainer, *arguments):
        with Largest() as seen:
            train(trainer, *arguments)
        largest.append(seen.elements)

    monkeypatch.setattr(resume, "train", measured)
    with_rehearsal(place, monkeypatch, "wide", {"loss_chunk": 7, "micro_batch_size": 8}, init_from=str(place / "wide"))
    assert largest[0] < 20 * 4000


# -- packing


def test_packed_rows_give_the_loss_and_gradients_of_rows_apart(place, monkeypatch):
    """All rows in one optimizer step: in sequences of up to 128 tokens, two to a forward pass, and one by one. fp32."""
    rows = labelled(place, 100)
    sequences = len(packing.pack_rows(rows, 128))
    assert sequences < len(rows) // 2
    sequences -= sequences % 2
    same = {"split": {"validation": 0.1, "test": 0.1}, "max_length": 128}
    train = {"max_steps": 1, "max_grad_norm": 1e9}
    used = rows_of_first(place, sequences)
    packed = gradients_of(place, monkeypatch, packing=True, name="packed", train=train | {"batch_size": sequences, "micro_batch_size": 2}, **same)
    assert packed[0] > 0
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    add_token_sums(model, None)
    sums = [model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), token_sums=True) for row in used]
    loss = torch.stack([s.loss for s in sums]).sum() / torch.stack([s.counted for s in sums]).sum()
    loss.backward()
    assert_same(packed, (loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))


def rows_of_first(place, sequences):
    """The rows that lie in the packed sequences of the first optimizer step."""
    from stages.training.plan import Plan, row_order

    packed = packing.pack_rows(labelled(place, 100), 128)
    chosen = [packed[index] for index in row_order(Plan(len(packed), sequences, 1, 1, 1, 1, 0), 0)]
    rows = []
    for sequence in chosen:
        start = 0
        for length in sequence["seq_lengths"]:
            rows.append({key: sequence[key][start : start + length] for key in ("input_ids", "labels")})
            start += length
    return rows


KINDS = ["Llama", "Qwen2", "GPTNeoX", "GPT2", "Phi", "Mistral", "Qwen3", "OPT"]


@pytest.mark.parametrize(("kind", "kernel"), [*((kind, "sdpa") for kind in KINDS), ("Llama", "eager"), ("GPT2", "eager"), ("OPT", "eager"), ("Gemma2", "eager")])
def test_architectures_keep_packed_rows_apart(kind, kernel):
    """Three rows in two sequences, the shorter padded: the loss and gradients of the rows one by one."""
    model = tiny(kind)
    model.set_attn_implementation(kernel)
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(3, 40, (length,), generator=draw).tolist()), "labels": [-100, -100, *ids[2:]]} for length in (9, 5, 12)]
    way = packing.isolation(model, rows)
    assert way == ("mask" if kind == "OPT" else "positions")
    add_token_sums(model, 4)
    sums = [model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), token_sums=True) for row in rows]
    torch.stack([s.loss for s in sums]).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = model(**packing.collator(way, model, 0)(packing.pack_rows(rows, 16)), token_sums=True)
    found.loss.backward()
    assert found.counted == sum(s.counted for s in sums) == 20
    assert found.loss.item() == pytest.approx(sum(s.loss.item() for s in sums), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=2e-5)


def test_a_packed_run_publishes_and_its_validation_rows_are_apart(place):
    checkpoint = run("sft", settings(place, "sft", {"max_steps": 2, "batch_size": 2, "micro_batch_size": 1}, name="packed", packing=True))
    assert math.isfinite(checkpoint.info("metrics")["loss"])


def test_refused_where_rows_see_one_another(place, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    rows = labelled(place, 4)
    assert packing.isolation(model, rows) == "positions"
    forward = model.forward

    def leaking(input_ids, position_ids=None, attention_mask=None, use_cache=False):
        return forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids)

    monkeypatch.setattr(model, "forward", leaking)
    with pytest.raises(UserError, match="see one another"):
        packing.isolation(model, rows)


def test_in_16_bits_rounding_is_not_taken_for_a_leak_nor_a_leak_for_rounding(monkeypatch):
    """Qwen2's log-probs of the same rows differ by 0.002 there; of rows that see one another by 1.0. OPT does not read position ids."""
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(3, 40, (length,), generator=draw).tolist()), "labels": ids} for length in (20, 30)]
    assert packing.isolation(tiny("Qwen2").bfloat16(), rows) == "positions"
    opt = tiny("OPT").bfloat16()
    assert packing.isolation(opt, rows) == "mask"
    monkeypatch.setattr(packing, "_looks_back_in_part", lambda model: True)
    with pytest.raises(UserError, match="see one another"):
        packing.isolation(opt, rows)


def test_flash_attention_without_a_gpu_is_refused(place, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(UserError, match="flash_attention_2 computes on a GPU"):
        packing.isolation(model, labelled(place, 2))


# -- rows of like length


def test_a_run_with_rows_of_like_length_pads_as_little_as_it_says_and_resumes_to_the_bit(place, capsys, monkeypatch):
    """The share of padding in the batches that the trainer is given; a resume between two logs, whose line tells of all the steps since the one before."""
    from stages.loss import trainer as loss_trainer

    masks, summed = [], loss_trainer.summed

    def watched(*arguments):
        class Watched(summed(*arguments)):
            def compute_loss(self, model, inputs, **keywords):
                masks.append(inputs["attention_mask"])
                return super().compute_loss(model, inputs, **keywords)

        return Watched

    monkeypatch.setattr(loss_trainer, "summed", watched)
    train = {"max_steps": 12, "save_every": 3, "eval_every": 12, "log_every": 4, "group_by_length": True}  # six steps are a pass over the rows
    whole, broken = (settings(place, "sft", train, name=f"grouped-{name}", output=str(place / f"out-{name}")) for name in ("whole", "broken"))
    expected = run("sft", whole)
    padded, tokens = sum((mask == 0).sum().item() for mask in masks), sum(mask.numel() for mask in masks)
    said = re.search(r"padding: (.*)% of the tokens in batches; rows in random order would have (.*)%", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(100 * padded / tokens, abs=0.06)
    assert float(said[1]) < float(said[2]) / 2
    run_until("sft", broken, 10)
    found = run("sft", broken)
    assert "continuing from checkpoint-9" in capsys.readouterr().out
    assert (place / "out-broken" / "metrics.jsonl").read_text() == (place / "out-whole" / "metrics.jsonl").read_text()
    assert all(torch.equal(tensor, weights(found)[name]) for name, tensor in weights(expected).items())
