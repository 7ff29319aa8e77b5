"""What a person types in a chat: messages and commands, and what is shown for them."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from configs.errors import UserError
from configs.printable import printable
from stages.chat.history import History
from stages.chat.speaker import Answer, Manner, Speakers, facts_of

HELP = """\
/use NAME       talk to this one from now on; the conversation stays
/compare [TEXT] the answers of all to TEXT, or to your last message, side by side; the conversation goes on with the answer of who is in use
/system [TEXT]  set the system prompt (alone: take it away)
/reset          begin anew; the system prompt stays
/save FILE      write the conversation as one line of JSON, a row that `align sft` can read
/help           this
/quit           leave (so does Ctrl-D; Ctrl-C stops an answer)"""
COMMANDS = ("use", "compare", "system", "reset", "save", "help", "quit")


class Room:
    """One conversation. `out` gets answers, `notice` everything else. as_json: answers are JSON objects, one a line, and nothing is shown before it is whole."""

    def __init__(self, speakers: Speakers, manner: Manner, *, system: str = "", as_json: bool = False, out: TextIO | None = None, notice: Callable[[str], None] | None = None) -> None:
        self.speakers, self.manner, self.as_json, self.out = speakers, manner, as_json, out or sys.stdout
        self.notice = notice or (lambda line: print(printable(line), file=sys.stderr, flush=True))
        self.history, self.using, self.turn, self.last = History(system), next(iter(speakers.readers)), 0, ""

    def take(self, lines: Iterable[str]) -> None:
        """Answer line after line, until /quit or the last of them. What is wrong with one is said, and the next is taken."""
        for line in lines:
            try:
                if not line.strip():
                    continue
                if line.strip() in ("/quit", "/exit"):
                    return
                self.command(line.strip()) if line.startswith("/") else self.say(line.strip())
            except UserError as error:
                self.notice(f"error: {error}")

    def say(self, question: str) -> Answer:
        """The answer of who is in use, shown as it is written and kept in the conversation. Raises UserError when the question does not fit."""
        answer = self._answer(self.using, question, self._show)
        self._keep(question, answer)
        if self.as_json:
            print(json.dumps(answer.to_json(), ensure_ascii=False), file=self.out, flush=True)
        else:
            print(file=self.out, flush=True)
        return answer

    def once(self, question: str) -> None:
        """The answers of all to one message, and nothing else. Raises UserError for an empty message, or one that does not fit."""
        if not question.strip():
            raise UserError("--once: the message is empty")
        names = list(self.speakers.readers)
        for name in names:
            answer = self._answer(name, question, lambda piece: None)
            plain = f"{name}: {printable(answer.text)}" if len(names) > 1 else printable(answer.text)
            print(json.dumps(answer.to_json(), ensure_ascii=False) if self.as_json else plain, file=self.out, flush=True)

    def _answer(self, name: str, question: str, show: Callable[[str], None]) -> Answer:
        answer = self.speakers.answer(name, self.history, question, self.manner, self.turn, show)
        if answer.left_out:
            self.notice(f"{name} reads {self.speakers.readers[name].room} tokens: the first {answer.left_out} turns of the conversation were left out")
        return answer

    def _show(self, piece: str) -> None:
        if not self.as_json:
            print(printable(piece), end="", file=self.out, flush=True)

    def _keep(self, question: str, answer: Answer) -> None:
        """The next answer has draws of its own, whether this one said something or not."""
        self.history.add(question, answer.text)
        self.turn, self.last = self.turn + 1, question
        if not answer.text.strip():
            self.notice(f"{answer.name} said nothing; the exchange is not kept")
        elif not answer.finished:
            self.notice(f"{answer.name} was stopped after {answer.tokens} tokens" + (" (--max-new-tokens)" if answer.tokens == self.manner.max_new_tokens else ""))

    # -- commands

    def command(self, line: str) -> None:
        """Carry a command out. Raises UserError for one that does not exist or can't be."""
        word, _, rest = line[1:].partition(" ")
        if word not in COMMANDS:
            close = difflib.get_close_matches(word, COMMANDS, n=1)
            raise UserError(f"/{word} is no command{f'; did you mean /{close[0]}?' if close else ''} (/help lists them; begin a message that starts with / with a space)")
        getattr(self, f"_{word}")(rest.strip())

    def _use(self, name: str) -> None:
        known = list(self.speakers.readers)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"/use {name}: this chat has {', '.join(known)}{f'; did you mean {close[0]}?' if close else ''}. Another is named when the chat is started: align chat NAME NAME")
        self.using = name
        self.notice(f"now talking to {name}")

    def _compare(self, question: str) -> None:
        question, before = question or self.last, self.history
        if not question:
            raise UserError("/compare: there is no message yet; write /compare TEXT")
        if question == self.last and before.turns and before.turns[-2].content == question:
            self.history = History(before.system, before.turns[:-2])  # the exchange is replaced, not repeated
        try:
            answers = [self._answer(name, question, lambda piece: None) for name in self.speakers.readers]
        except BaseException:
            self.history = before
            raise
        self._keep(question, next(answer for answer in answers if answer.name == self.using))
        if self.as_json:
            print(json.dumps([answer.to_json() for answer in answers], ensure_ascii=False), file=self.out, flush=True)
        else:
            side_by_side(answers, self.out)

    def _system(self, text: str) -> None:
        self.history.system = text
        self.notice("system prompt set; it holds from the next answer" if text else "no system prompt")

    def _reset(self, _: str) -> None:
        self.history, self.last = History(self.history.system), ""
        self.notice("the conversation begins anew")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file: /save talk.jsonl")
        if not self.history.turns:
            raise UserError("/save: nothing was said yet")
        row = {"messages": [message.as_dict() for message in self.history.messages()]}
        try:
            with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise UserError(f"/save {name}: there is such a file already; name another") from None
        except OSError as error:
            raise UserError(f"/save {name}: can't be written ({error.strerror}); name another") from None
        self.notice(f"saved {len(self.history.turns)} turns in {name}")

    def _help(self, _: str) -> None:
        self.notice("\n".join([HELP, *facts_of(self.speakers.origins)]))


def side_by_side(answers: list[Answer], out: TextIO) -> None:
    """A column for each answer."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=out) if out.isatty() else Console(file=out, width=120)
    table = Table(show_lines=True)
    for answer in answers:
        table.add_column(Text(printable(answer.name)), overflow="fold", ratio=1)
    table.add_row(*(Text(printable(answer.text)) for answer in answers))
    console.print(table)
