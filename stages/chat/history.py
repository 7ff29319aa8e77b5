"""The turns of a conversation, and as many of them as a model can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from configs.errors import UserError
from stages.data import Message
from stages.data.rows import Messages


@dataclass
class History:
    """A system prompt and the turns so far, user and assistant in turn."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def messages(self, *more: Message) -> Messages:
        """All of it, and what is added at the end."""
        first = (Message("system", self.system),) if self.system.strip() else ()
        return (*first, *self.turns, *more)

    def add(self, question: str, answer: str) -> None:
        """A turn of each. An answer without text is not kept: no template can render it."""
        if answer.strip():
            self.turns += [Message("user", question), Message("assistant", answer)]


def that_fit(history: History, question: str, prompt_ids: Callable[[Messages], list[int]], room: int | None, new_tokens: int) -> tuple[list[int], int]:
    """Ids of the newest turns before `question` that leave `new_tokens` of the `room` (tokens; None: no limit), and how many turns were left out.

    Whole exchanges go, the oldest first; the system prompt stays. Raises UserError when the question alone is too long.
    """
    for first in range(0, len(history.turns) + 1, 2):
        ids = prompt_ids(History(history.system, history.turns[first:]).messages(Message("user", question)))
        if room is None or len(ids) + new_tokens <= room:
            return ids, first
    raise UserError(
        f"this message and the system prompt are {len(ids)} tokens, the answer may have {new_tokens}, and the model reads {room}; shorten the message, or lower --max-new-tokens"
    )
