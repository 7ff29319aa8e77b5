"""`align chat`: what is asked, what is answered, what is kept, and how it ends."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch

from configs.errors import UserError
from configs.printable import printable
from configs.schema import Sampling
from launch.chat.room import Room
from launch.cli import main
from stages.chat.history import History, that_fit
from stages.chat.speaker import Manner, Speakers, find_policy, settled, stream
from stages.data import Message
from stages.ppo.sampling import completion_seed, sample
from tests.adapters import publish_adapter, publish_whole, world

EOS = 258


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    registry, folder = world(tmp_path_factory.mktemp("chat"))
    publish_whole(registry, "sft/base", folder)
    for seed, name in enumerate("ab", start=1):
        publish_adapter(registry, f"sft/{name}", "sft/base", seed=seed)
    publish_whole(registry, "reward/r", folder)
    return registry, folder


@pytest.fixture(scope="module")
def speakers(place):
    return Speakers(["sft/a", "sft/b"], place[0].root)


def room(speakers, **changes):
    told: list[str] = []
    out = io.StringIO()
    made = Room(speakers, Manner(max_new_tokens=8, seed=3), out=out, notice=told.append, **changes)
    return made, out, told


def test_a_conversation_shares_the_base_and_switches(place, speakers):
    assert speakers.shared() == [["sft/a", "sft/b"]]
    made, out, told = room(speakers)
    made.take(["hello", "/use sft/b", "hello again"])
    assert [message.role for message in made.history.turns] == ["user", "assistant"] * 2
    assert out.getvalue() == "".join(f"{printable(message.content)}\n" for message in made.history.turns if message.role == "assistant")
    assert "now talking to sft/b" in told


def test_the_second_answer_is_given_the_whole_conversation(speakers, monkeypatch):
    asked = []
    original = Speakers.answer

    def remember(self, name, history, question, manner, turn, show=lambda piece: None):
        asked.append([*history.messages(Message("user", question))])
        return original(self, name, history, question, manner, turn, show)

    monkeypatch.setattr(Speakers, "answer", remember)
    made, _, _ = room(speakers, system="Be kind.")
    made.take(["one", "two", "/reset", "three", "/system", "four"])
    assert [[message.role[0] for message in messages] for messages in asked] == [["s", "u"], ["s", "u", "a", "u"], ["s", "u"], ["u", "a", "u"]]


def test_answers_are_those_of_the_sampler_and_the_seed(speakers):
    """The draws of a chat are those of an evaluation: one token after the other or in a batch, the same completion."""
    reader, model = speakers.readers["sft/a"], speakers.shelf.weights("sft/a")()
    ids = reader.tokens.formatter.prompt_ids("hello")
    batch = sample(model, [ids], sampling=Sampling(max_new_tokens=8, temperature=0.7), eos_ids=[EOS], pad_id=256, seeds=[completion_seed(3, 5, 0)])
    assert list(stream(model, ids, [EOS], Manner(0.7, 8, 3), 5)) == batch[0].completion_ids
    assert list(stream(model, ids, [EOS], Manner(0.7, 8, 4), 5)) != batch[0].completion_ids
    likeliest = list(stream(model, ids, [], Manner(0.0, 4, 0), 0))
    with torch.no_grad():
        for step, token in enumerate(likeliest):
            assert int(model(torch.tensor([[*ids, *likeliest[:step]]])).logits[0, -1].argmax()) == token


def test_an_answer_stops_at_every_eos(speakers):
    reader, model = speakers.readers["sft/a"], speakers.shelf.weights("sft/a")()
    ids = reader.tokens.formatter.prompt_ids("hello")
    free = list(stream(model, ids, [], Manner(1.0, 8, 1), 0))
    for place, token in enumerate(free):
        if token not in free[:place]:
            assert list(stream(model, ids, [EOS, token], Manner(1.0, 8, 1), 0)) == free[: place + 1]


def test_what_does_not_fit_is_left_out_and_told(speakers):
    made, _, told = room(speakers, system="stay")
    made.history.turns = [Message("user", "x" * 150), Message("assistant", "y" * 150)] * 2
    made.take(["short"])
    assert any("sft/a reads 512 tokens: the first 2 turns of the conversation were left out" in line for line in told)
    made.take(["z" * 600])
    assert any(line.startswith("error: this message and the system prompt are") and "the model reads 512" in line for line in told)
    assert made.history.turns[-2].content == "short"


def test_whole_exchanges_go_and_the_system_prompt_stays():
    history = History("sys", [Message("user", "1"), Message("assistant", "2"), Message("user", "3"), Message("assistant", "4")])

    def ids(messages):
        return [ord(message.content[0]) for message in messages]

    assert that_fit(history, "5", ids, None, 4) == ([115, 49, 50, 51, 52, 53], 0)
    assert that_fit(history, "5", ids, 9, 4) == ([115, 51, 52, 53], 2)
    assert that_fit(history, "5", ids, 6, 4) == ([115, 53], 4)
    with pytest.raises(UserError, match="are 2 tokens, the answer may have 5, and the model reads 6"):
        that_fit(history, "5", ids, 6, 5)


def test_a_character_is_shown_once_it_is_whole():
    assert settled("caf\ufffd", "ca", last=False) == "f"
    assert settled("café", "caf", last=False) == "é"
    assert settled("caf\ufffd", "caf", last=True) == "\ufffd"
    assert settled("other", "caf", last=True) == ""


def test_ctrl_c_ends_the_answer_and_keeps_what_there_is(speakers, monkeypatch):
    def interrupted(*_):
        yield from (104, 105)
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.chat.speaker.stream", interrupted)
    made, out, told = room(speakers)
    made.take(["hello", "/quit", "never asked"])
    text = made.history.turns[1].content
    assert (text, out.getvalue()) == (speakers.readers["sft/a"].tokens.formatter.completion_text([104, 105]), f"{text}\n")
    assert told == ["sft/a was stopped after 2 tokens"]


def test_an_answer_without_text_is_not_kept(speakers, monkeypatch):
    monkeypatch.setattr("stages.chat.speaker.stream", lambda *_: iter([EOS]))
    made, _, told = room(speakers)
    made.take(["hello"])
    assert made.history.turns == []
    assert told == ["sft/a said nothing; the exchange is not kept"]


def test_all_answer_side_by_side_and_the_exchange_is_kept_once(speakers):
    made, out, _ = room(speakers)
    made.take(["hello", "/compare"])
    assert len(made.history.turns) == 2
    assert "sft/a" in out.getvalue()
    assert "sft/b" in out.getvalue()
    made.take(["/compare something else"])
    assert [message.content for message in made.history.turns[::2]] == ["hello", "something else"]
    fresh, _, told = room(speakers)
    fresh.take(["/compare"])
    assert told == ["error: /compare: there is no message yet; write /compare TEXT"]


def test_a_comparison_that_one_of_them_can_t_give_loses_no_exchange(speakers, monkeypatch):
    made, _, told = room(speakers)
    made.take(["hello"])
    before = list(made.history.turns)
    with monkeypatch.context() as patch:
        patch.setattr(type(speakers), "answer", lambda *_: (_ for _ in ()).throw(UserError("sft/b: this does not fit")))
        made.take(["/compare"])
    assert told[-1] == "error: sft/b: this does not fit"
    assert (len(before), made.history.turns) == (2, before)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/usee sft/a", "/usee is no command; did you mean /use?"),
        ("/use sft/c", "this chat has sft/a, sft/b; did you mean sft/"),
        ("/save", "/save needs a file"),
        ("/save x.jsonl", "nothing was said yet"),
        ("/help", "/compare"),
    ],
)
def test_commands_say_what_is_wrong_and_go_on(speakers, line, said):
    made, _, told = room(speakers)
    made.take([line, " ", ""])
    assert len(told) == 1
    assert said in told[0]


def test_a_saved_conversation_is_a_row_to_train_on(speakers, tmp_path):
    from configs.schema.common import Source
    from stages.data import read_demonstrations

    made, _, told = room(speakers, system="Be kind.")
    file = tmp_path / "talk.jsonl"
    made.take(["hello", f"/save {file}", f"/save {file}"])
    (row,) = read_demonstrations([Source(path=str(file))]).rows
    assert row.messages == made.history.messages()
    assert told[-1].endswith("there is such a file already; name another")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"], "nothing else was written"


def test_what_a_terminal_would_obey_is_written_out(speakers, monkeypatch):
    monkeypatch.setattr("stages.chat.speaker.stream", lambda *_: iter(bytes_of("\x1b[2Jhi")))
    made, out, _ = room(speakers)
    made.take(["hello"])
    assert "\x1b" not in out.getvalue()
    assert "\\x1b[2Jhi" in out.getvalue()


def bytes_of(text: str) -> list[int]:
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()(text)["input_ids"]


def test_a_model_that_scores_is_refused(place, tmp_path):
    from tests.tiny import tiny_model

    registry, _ = place
    with pytest.raises(UserError, match=r"reward/r is a reward model: it scores answers and writes none\. Talk to a policy .*align eval … --scorer reward/r"):
        find_policy("reward/r", registry.root)
    folder = tiny_model(tmp_path / "scorer", hidden=16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UserError, match="LlamaForSequenceClassification: it scores"):
        find_policy(str(folder), registry.root)


def test_once_prints_one_answer_and_leaves(place, capsys):
    registry, folder = place
    words = ["chat", "sft/a", "--registry", str(registry.root), "--max-new-tokens", "6", "--seed", "2"]
    assert main([*words, "--once", "hello", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"name", "answer", "finished", "tokens", "prompt_tokens", "turns_left_out", "seconds"}
    assert main([*words, "--once", "hello"]) == 0
    assert capsys.readouterr().out == printable(answer["answer"]) + "\n"
    assert main(["chat", "sft/b", folder, *words[2:], "--once", "hello"]) == 0
    assert [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()] == ["sft/b", folder]


def test_lines_of_a_pipe_are_answered_one_by_one(place, capsys, monkeypatch):
    registry, _ = place
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/compare\nbye\n"))
    assert main(["chat", "sft/a", "sft/b", "--registry", str(registry.root), "--max-new-tokens", "4", "--json"]) == 0
    one, both, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one["name"] == last["name"] == "sft/a"
    assert [answer["name"] for answer in both] == ["sft/a", "sft/b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "-1"], "--temperature -1.0: expected 0 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 or more"),
        (["--once", " "], "--once: the message is empty"),
    ],
)
def test_options_that_cannot_be(place, capsys, words, said):
    assert main(["chat", "sft/a", "--registry", str(place[0].root), *words]) == 2
    assert said in capsys.readouterr().err


def test_the_verb_imports_nothing_heavy():
    code = (
        "import sys, argparse, launch.chat_cli as c, launch.adapters_cli as a; c.add_parser(argparse.ArgumentParser().add_subparsers());"
        "a.add_parser(argparse.ArgumentParser().add_subparsers());"
        "print([m for m in ('torch', 'transformers', 'rich', 'pydantic', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
