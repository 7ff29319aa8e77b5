"""The loss in chunks: the loss and the gradients of whole logits, under every head, and nothing as large as those logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from configs.schema import SFTTrain
from stages.compat import head_may_be_adapted
from stages.loss import model as loss_model
from stages.loss import sums
from stages.loss.head import plain

N, D, V = 23, 6, 37


def by_hand(states, weight, bias, ids, scale, cap, smoothing):
    """From all logits, by autograd: loss, tokens right, entropy."""
    logits = (states @ weight.t() + (0 if bias is None else bias)) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logprobs = logits.log_softmax(-1)
    loss = -(1 - smoothing) * logprobs.gather(1, ids[:, None]).sum() - smoothing * logprobs.mean(1).sum()
    return loss, (logits.argmax(1) == ids).sum(), -(logprobs.exp() * logprobs).sum()


def draws(dtype, bias):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=dtype)
    return torch.randn(N, D, dtype=dtype, requires_grad=True), head, torch.randint(V, (N,))


@pytest.mark.parametrize("rows", [1, 5, N, 100])
@pytest.mark.parametrize(("bias", "scale", "cap", "smoothing"), [(False, 1.0, None, 0.0), (True, 0.25, None, 0.0), (True, 3.0, 2.0, 0.1), (False, 1.0, None, 0.3)])
def test_sums_and_gradients_are_those_of_whole_logits(rows, bias, scale, cap, smoothing):
    """float64, where nothing but a wrong formula makes a difference of 1e-12."""
    states, head, ids = draws(torch.float64, bias)
    parameters = [states, *head.parameters()]
    expected = by_hand(states, head.weight, head.bias, ids, scale, cap, smoothing)
    wanted = torch.autograd.grad(expected[0] * 0.3, parameters)
    found = sums.linear_sums(states, ids, head, scale=scale, cap=cap, rows=rows, smoothing=smoothing)
    got = torch.autograd.grad(found.loss * 0.3, parameters)
    torch.testing.assert_close(torch.stack(found[:3]).detach(), torch.stack([e.double() for e in expected]).detach(), rtol=1e-12, atol=1e-12)
    assert found.counted == N
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)

    def logits_of(part):
        logits = head(part) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    other = sums.module_sums(states, ids, logits_of, list(head.parameters()), rows=rows, smoothing=smoothing)
    torch.testing.assert_close(torch.stack(other[:4]).detach(), torch.stack(found[:4]).detach(), rtol=1e-12, atol=0)
    for mine, theirs in zip(torch.autograd.grad(other.loss * 0.3, parameters), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_through_onednn_sums_and_gradients_are_those_of_whole_logits(taken):
    """In float32; the second chunk, of 7 rows, is padded."""
    states, head, ids = draws(torch.float32, True)
    parameters = [states, *head.parameters()]
    expected = by_hand(states, head.weight, head.bias, ids, 0.25, 2.0, 0.1)
    found = sums.linear_sums(states, ids, head, scale=0.25, cap=2.0, rows=16, smoothing=0.1)
    torch.testing.assert_close(torch.stack(found[:3]).float(), torch.stack([e.float() for e in expected]), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found.loss, parameters), torch.autograd.grad(expected[0], parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert {shape[0] for shape in taken} >= {8, 16}


def weighting(dtype=torch.float64):
    """A weight for each of N tokens, one of them 0, and a mark on every third."""
    weights = torch.rand(N, dtype=dtype, generator=torch.Generator().manual_seed(3)) * 4
    weights[7] = 0
    return sums.Weighting(weights, torch.arange(N) % 3 == 0)


@pytest.mark.parametrize("way", ["linear", "module", "whole"])
@pytest.mark.parametrize(("rows", "cap", "smoothing"), [(1, None, 0.0), (5, 2.0, 0.1), (100, None, 0.3)])
def test_weighted_tokens_have_the_loss_and_gradients_of_whole_logits_and_sums_apart_without_weights(way, rows, cap, smoothing):
    states, head, ids = draws(torch.float64, True)
    parameters, asked = [states, *head.parameters()], weighting()

    def logits_of(part):
        return head(part) if cap is None else cap * torch.tanh(head(part) / cap)

    losses = F.cross_entropy(logits_of(states), ids, reduction="none", label_smoothing=smoothing)
    wanted = torch.autograd.grad((losses * asked.weights).sum() * 0.3, parameters)
    if way == "linear":
        found = sums.linear_sums(states, ids, head, cap=cap, rows=rows, smoothing=smoothing, weighting=asked)
    elif way == "module":
        found = sums.module_sums(states, ids, logits_of, list(head.parameters()), rows=rows, smoothing=smoothing, weighting=asked)
    else:
        found = sums.whole_sums(logits_of(states), ids, smoothing, asked)
    assert found.loss.item() == pytest.approx((losses * asked.weights).sum().item(), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found.loss * 0.3, parameters), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    assert not found.apart.requires_grad
    for kind, part in zip((~asked.marks, asked.marks), found.apart, strict=True):
        _, correct, entropy = by_hand(states[kind], head.weight, head.bias, ids[kind], 1.0, cap, smoothing)
        assert part.tolist() == pytest.approx([losses[kind].sum().item(), correct.item(), entropy.item(), kind.sum().item()], rel=1e-12)
    assert torch.stack(found[1:4]).tolist() == pytest.approx(found.apart[:, 1:].sum(0).tolist()), "all of them, marked or not"


def test_two_tokens_by_hand():
    """Logits (0, ln 3) and (ln 3, 0), both asked for token 0: probabilities 1/4 and 3/4, loss ln 4 + ln 4/3 = ln(16/3), one right.

    Gradients p - onehot are (-3/4, 3/4) and (-1/4, 1/4).
    """
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double() * torch.tensor(3.0).double().log()
    found = sums.read(logits, torch.tensor([0, 0]))
    assert found.loss.sum().item() == pytest.approx(1.6739764335716716, rel=1e-12)
    assert found.correct.tolist() == [False, True]
    torch.testing.assert_close(found.gradient, torch.tensor([[-0.75, 0.75], [-0.25, 0.25]], dtype=torch.float64))


def test_of_equal_logits_the_first_is_the_highest():
    assert sums.read(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1])).correct.tolist() == [True, False]


def test_smoothing_is_torchs():
    logits, ids = torch.randn(5, 7, dtype=torch.float64), torch.randint(7, (5,))
    torch.testing.assert_close(sums.read(logits, ids, 0.1).loss, F.cross_entropy(logits, ids, reduction="none", label_smoothing=0.1))


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_the_head_is_bf16_and_the_softmax_is_not(autocast):
    """The loss is that of the rounded logits to float32's accuracy; gradients are within bf16's rounding, and sums of many chunks are not rounded."""
    states, head, ids = draws(torch.float32 if autocast else torch.bfloat16, False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = sums.linear_sums(states, ids, head, rows=2)
        logits = F.linear(states, head.weight)
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float(), ids, reduction="sum")
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found.loss, [states, head.weight]), torch.autograd.grad(expected, [states, head.weight]), strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() / theirs.norm() < 0.01


def test_no_token_counts():
    states, head, ids = draws(torch.float32, True)
    found = sums.linear_sums(states[:0], ids[:0], head)
    assert torch.stack(found[:4]).tolist() == [0, 0, 0, 0]
    assert found.apart is None
    assert all(g.eq(0).all() for g in torch.autograd.grad(found.loss, [states, head.weight]))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_iter(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_head(frozen, as_module, weighted):
    states, head = torch.randn(200, 8, requires_grad=True), nn.Linear(8, 300, bias=False).requires_grad_(not frozen)
    ids, trained = torch.randint(300, (200,)), [] if frozen else [head.weight]
    how = sums.Weighting(torch.rand(200), torch.rand(200) < 0.5) if weighted else None
    with Largest() as seen:
        found = sums.module_sums(states, ids, head, trained, rows=10, weighting=how) if as_module else sums.linear_sums(states, ids, head, rows=10, weighting=how)
        found.loss.backward()
    assert seen.elements <= max(16 * 300, 200 * 8)  # 10 rows, or 16 where oneDNN wants them
    with Largest() as seen:
        F.cross_entropy(head(states), ids).backward()
    assert seen.elements == 200 * 300


def tiny(kind, tied=True, **changes):
    """A random model of an architecture; the head's weights are large enough that a cap or a scale matters."""
    import transformers

    torch.manual_seed(1)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
              "tie_word_embeddings": tied, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.3}  # fmt: skip
    if kind == "GPT2":
        common = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 64, "tie_word_embeddings": tied}
    if kind == "GPTNeoX":
        common.pop("head_dim")
    config = getattr(transformers, f"{kind}Config")(**common, **changes)
    return getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()


ARCHITECTURES = {
    "Llama": {}, "Qwen2": {"tied": False}, "GPT2": {}, "GPTNeoX": {"tied": False}, "Gemma2": {"final_logit_softcapping": 5.0}, "Granite": {"logits_scaling": 8.0}, "Cohere": {"logit_scale": 0.0625},
    "Phi": {"tied": False},  # its head has a bias
}  # fmt: skip


def batch():
    """Two rows, the second padded; the first part of each does not count."""
    ids = torch.tensor([[3, 7, 5, 9, 11, 13], [4, 8, 15, 16, 0, 0]])
    labels = torch.tensor([[-100, -100, 5, 9, 11, 13], [-100, -100, 15, 16, -100, -100]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, labels


def expected_loss(model, inputs, labels):
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).double(), labels[:, 1:].reshape(-1), reduction="sum")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_models_give_the_loss_and_gradients_of_their_own_logits(kind):
    model = tiny(kind, **ARCHITECTURES[kind])
    inputs, labels = batch()
    wanted = expected_loss(model, inputs, labels)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss_model.add_token_sums(model, 3)
    assert loss_model.prove(model, inputs["input_ids"][0].tolist()) is None
    found = model(**inputs, labels=labels, token_sums=True)
    found.loss.backward()
    assert (found.counted.item(), found.loss.item()) == (6, pytest.approx(wanted.item(), rel=1e-6))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    other = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 39)
    assert model(input_ids=other, attention_mask=inputs["attention_mask"], labels=labels, token_sums=True).loss.item() == found.loss.item(), "what padding holds matters"
    assert model.generate(inputs["input_ids"][:1], max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.parametrize("kind", ["Gemma2", "Granite", "Cohere"])
def test_a_scale_or_cap_that_we_miss_is_found_and_whole_logits_taken(kind, monkeypatch):
    """With the real logits and the head's plain ones within 1e-4 of each other, what is missed shows when hidden states grow."""
    from stages.loss import trainer

    model = tiny(kind, **ARCHITECTURES[kind])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    wanted = expected_loss(model, *batch())
    monkeypatch.setattr(loss_model, "logits_scale", lambda model: 1.0)
    monkeypatch.setattr(loss_model, "logits_cap", lambda model: None)
    said = []
    monkeypatch.setattr(trainer, "say", said.append)
    inputs, labels = batch()
    trainer.trainer_class(object, model, SFTTrain(), inputs["input_ids"][0].tolist())
    assert "loss_chunk" in said[0]
    assert model(**inputs, labels=labels, token_sums=True).loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("how", ["lora", "modules_to_save"])
def test_a_head_that_peft_trains(how):
    """An adapter on the head, or a copy of it that is trained: loss and gradients of the model's own logits."""
    from peft import LoraConfig, get_peft_model

    model = tiny("Llama", tied=False)
    loss_model.add_token_sums(model, 4)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"]) if how == "lora" else LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert (plain(model.get_output_embeddings()) is None) == (how == "lora")
    inputs, labels = batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = expected_loss(model, inputs, labels)
    found = model(**inputs, labels=labels, token_sums=True)
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for mine, theirs in zip(torch.autograd.grad(found.loss, trained), torch.autograd.grad(wanted, trained), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_trl_refuses_an_adapted_head_by_a_name_that_we_know():
    from peft.tuners.tuners_utils import BaseTunerLayer
    from trl.trainer import sft_trainer

    with head_may_be_adapted():
        assert not isinstance(nn.Linear(1, 1), sft_trainer.BaseTunerLayer)
    assert sft_trainer.BaseTunerLayer is BaseTunerLayer


def test_a_model_for_a_flash_kernel_is_proven_where_that_can_not_compute():
    """Before the trainer has it on a GPU and in 16 bits; the loss was computed from whole logits there."""
    from transformers import AttentionInterface

    def refusing(*_, **__):
        raise RuntimeError("FlashAttention only supports CUDA tensors of 16 bits")

    AttentionInterface.register("flash_of_a_gpu", refusing)
    model = tiny("Llama")
    model.config._attn_implementation = "flash_of_a_gpu"
    loss_model.add_token_sums(model, 3)
    assert loss_model.prove(model, batch()[0]["input_ids"][0].tolist()) is None
    assert model.config._attn_implementation == "flash_of_a_gpu"


def test_the_log_probs_of_labels_need_the_logits_of_labels_only():
    """Rows of like length: five positions of twelve, and the log-probs that whole logits give."""
    from types import SimpleNamespace

    from accelerate import Accelerator

    from stages.validation.labels import Choice, label_logprobs

    model, seen = tiny("Llama"), []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    rows = [Choice(list(range(3, 12)), [[20, 21], [22, 23, 24]], 0), Choice(list(range(13, 21)), [[20, 21], [22, 23, 24]], 1)]
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), args=SimpleNamespace(per_device_eval_batch_size=4), is_deepspeed_enabled=False, model=model)
    found = label_logprobs(trainer, rows, 0)
    assert seen == [5]  # the last token of the shorter prompt, and what comes after it
    for row, logprobs in zip(rows, found, strict=True):
        for ids, mine in zip(row.label_ids, logprobs, strict=True):
            whole = model(torch.tensor([row.prompt_ids + ids])).logits[0].log_softmax(-1)
            assert mine.item() == pytest.approx(sum(whole[len(row.prompt_ids) - 1 + i, t].item() for i, t in enumerate(ids)), abs=1e-4)
