"""The reward model as a scorer: where the score is read, and what must not change it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from configs.errors import UserError
from rewards.model import RewardModelScorer, last_token_scores
from rewards.protocol import Turn

PAD, EOS = 0, 1


class Letters:
    """A formatter that spells: one id per letter, EOS at the end of a completion."""

    def prompt_ids(self, messages):
        return [2 + ord(c) % 40 for m in messages for c in m.content]

    def completion_ids(self, text, prompt):
        assert text, "an empty text is not rendered"
        return [2 + ord(c) % 40 for c in text] + [EOS]


def tiny(kind: str, **changes):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=PAD, num_labels=1, initializer_range=0.3, **changes,
        )  # fmt: skip
    else:
        config = GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=PAD, num_labels=1,
            initializer_range=0.3, bos_token_id=EOS, eos_token_id=EOS, **changes,
        )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def scorer_of(model, **changes):
    return RewardModelScorer(model, Letters(), **{"pad_id": PAD, "eos_ids": [EOS], **changes})


def rows(count=13):
    """Prompts and completions of many lengths, some holding the pad id among their real tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 25, (count, 2), generator=generator)
    draw = lambda n: torch.randint(0, 64, (int(n),), generator=generator).tolist()  # noqa: E731
    return [draw(p) for p, _ in lengths], [[*draw(c), EOS] for _, c in lengths]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_do_not_depend_on_batch_size_padding_or_order(kind):
    model = tiny(kind)
    prompts, completions = rows()
    alone = torch.cat([scorer_of(model).score_ids([p], [c]) for p, c in zip(prompts, completions, strict=True)])
    assert alone.std() > 0.1, "a model whose scores are all alike proves nothing"
    for batch_size in (2, 5, 64):
        torch.testing.assert_close(scorer_of(model, batch_size=batch_size).score_ids(prompts, completions), alone, atol=1e-4, rtol=0)
    backwards = scorer_of(model, batch_size=4).score_ids(prompts[::-1], completions[::-1])
    torch.testing.assert_close(backwards.flip(0), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_either_side_and_whatever_it_holds_changes_nothing(kind):
    model = tiny(kind).eval()
    row = torch.tensor([[5, 9, PAD, 11, EOS]])
    alone = last_token_scores(model, row, torch.ones_like(row))
    junk, off = torch.tensor([[33, 44]]), torch.zeros(1, 2, dtype=torch.long)
    on = torch.ones_like(row)
    right = last_token_scores(model, torch.cat([row, junk], 1), torch.cat([on, off], 1))
    left = last_token_scores(model, torch.cat([junk, row], 1), torch.cat([off, on], 1))
    torch.testing.assert_close(torch.cat([right, left]), alone.repeat(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_score_is_the_head_at_the_last_token_as_hugging_face_trains_it(kind):
    model = tiny(kind).eval()
    prompts, completions = [[5, 6, 7]], [[8, 9, EOS]]
    ids = torch.tensor([[5, 6, 7, 8, 9, EOS]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, 0]
    ours = scorer_of(model).score_ids(prompts, completions)[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    cut_off = scorer_of(model).score_ids(prompts, [[8, 9]])[0]
    assert abs(cut_off - ours) > 1e-3, "a completion without EOS is read at its own last token"


def test_a_real_token_equal_to_the_pad_id_is_still_read():
    model = tiny("llama").eval()
    ids = torch.tensor([[5, 6, PAD]])
    hidden = model.model(ids).last_hidden_state[0]
    torch.testing.assert_close(scorer_of(model).score_ids([[5, 6]], [[PAD]])[0], model.score(hidden[2])[0].detach(), atol=1e-5, rtol=0)


def test_text_is_rendered_with_the_models_own_formatter():
    scorer = scorer_of(tiny("llama"))
    letters = Letters()
    prompt, completion = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "world"}]
    ids = [letters.prompt_ids([Turn("user", "hello")])], [letters.completion_ids("world", ())]
    expected = scorer.score_ids(*ids).tolist()
    assert scorer(["hello"], ["world"]) == scorer([prompt], [completion]) == expected
    cut = scorer.score_ids(ids[0], [ids[1][0][:-1]]).tolist()
    assert scorer(["hello"], ["world"], finished=[False]) == cut != expected


def test_an_empty_text_is_scored_at_its_eos_or_at_the_end_of_the_prompt():
    scorer = scorer_of(tiny("llama"))
    prompt = scorer.tokens.prompt_ids([Turn("user", "hello")])
    assert scorer(["hello"], [""]) == scorer.score_ids([prompt], [[EOS]]).tolist()
    assert scorer(["hello"], [""], finished=[False]) == scorer.score_ids([prompt], [[]]).tolist()


def test_trap_19_a_finished_completion_without_eos_is_scored_at_one_in_ids_as_in_text():
    """Completions of a fixed length count as finished; the model learned to read its score at an EOS and nowhere else."""
    scorer = scorer_of(tiny("llama"))
    letters = Letters()
    prompt, said = letters.prompt_ids([Turn("user", "hello")]), letters.completion_ids("world", ())
    assert said[-1] == EOS
    for end, text in ((True, scorer(["hello"], ["world"])), (False, scorer(["hello"], ["world"], finished=[False]))):
        assert scorer.score_ids([prompt], [said[:-1]], [end]).tolist() == text
    assert scorer.score_ids([prompt], [said], [True]).tolist() == scorer(["hello"], ["world"]), "one EOS is enough"


def test_dropout_is_off_while_scoring_and_the_mode_comes_back():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    model.score.eval()
    scorer = scorer_of(model)
    prompts, completions = rows(5)
    assert torch.equal(scorer.score_ids(prompts, completions), scorer.score_ids(prompts, completions))
    assert model.training
    assert not model.score.training


def test_dropout_that_stays_on_is_noticed():
    class Stubborn(torch.nn.Dropout):
        def train(self, mode=True):
            return super().train(True)

    model = tiny("gpt2")
    model.transformer.drop = Stubborn(0.5)
    with pytest.raises(AssertionError, match="scoring with dropout"):
        scorer_of(model).score_ids([[3]], [[4]])


def test_pad_equal_to_eos_is_refused():
    with pytest.raises(UserError, match=r"its pad token is its EOS \(1\)"):
        scorer_of(tiny("llama"), pad_id=EOS)


def test_a_model_without_one_label_is_refused():
    model = tiny("llama")
    model.config.num_labels = 2
    with pytest.raises(UserError, match="has 2 labels; a reward model has 1"):
        scorer_of(model)
    with pytest.raises(UserError, match="has no score head"):
        scorer_of(tiny("llama").model)


def test_a_row_longer_than_the_model_reads_is_refused():
    with pytest.raises(UserError, match="a row has 65 tokens, the model reads 64"):
        scorer_of(tiny("gpt2")).score_ids([[3] * 60], [[4] * 5])


def test_text_longer_than_the_model_reads_loses_its_beginning_and_that_is_said():
    scorer, letters = scorer_of(tiny("gpt2")), Letters()
    long, short = "abcdefghij" * 6, "abc"
    row = [letters.prompt_ids([Turn("user", long)]), letters.completion_ids("hello", ())]
    expected = scorer.score_ids([row[0][2:], letters.prompt_ids([Turn("user", short)])], [row[1], row[1]])  # 60 + 6 tokens, 64 positions
    with pytest.warns(UserWarning, match="1 of 2 rows had more than the 64 tokens it reads"):
        assert scorer([long, short], ["hello", "hello"]) == expected.tolist()
    with pytest.warns(UserWarning, match="1 of 1 rows"):
        assert scorer([short], [long + "klmno"]) == scorer.score_ids([[]], [letters.completion_ids(long + "klmno", ())[-64:]]).tolist()


def test_whichever_eos_ends_a_rollout_the_model_reads_the_one_it_was_trained_with():
    scorer = scorer_of(tiny("llama"), eos_ids=[EOS, 7])
    assert scorer.score_ids([[5, 6]], [[8, 7]]) == scorer.score_ids([[5, 6]], [[8, EOS]])
    assert scorer.score_ids([[5, 7]], [[7, 8]]) != scorer.score_ids([[5, EOS]], [[EOS, 8]]), "only the end of a completion is replaced"


def test_scores_in_bf16_come_from_a_head_in_float32():
    model = tiny("llama")
    model.score.bias = torch.nn.Parameter(torch.tensor([5.0]))
    scores = scorer_of(model, autocast=torch.bfloat16).score_ids(*rows())
    exact = scorer_of(model).score_ids(*rows())
    assert (scores.bfloat16().float() != scores).float().mean() > 0.5
    assert 1e-4 < (scores - exact).abs().max() < 0.5


def test_a_head_beside_the_backbone_scores_the_same():
    model = tiny("llama")
    head, backbone = model.score, model.model
    prompts, completions = rows(4)
    apart = scorer_of(backbone, head=head).score_ids(prompts, completions)
    torch.testing.assert_close(apart, scorer_of(model).score_ids(prompts, completions))


def test_no_rows_give_no_scores():
    assert scorer_of(tiny("llama")).score_ids([], []).shape == (0,)
