"""What a scorer is, and the check of what it returned.

A scorer is a function of TRL's shape, f(prompts, completions, **columns) -> list[float]: one number per completion, higher is
better. Prompts and completions are plain text, or message lists ([{"role": …, "content": …}]) as TRL hands them to a reward
function; columns are further lists of the same length.

None in the place of a number means "does not apply to this completion", as in TRL: it adds nothing to a weighted sum and is
left out of the scorer's own mean. A completion that no scorer applies to is an error (see combine.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from configs.errors import UserError

Text = str | Sequence[Mapping[str, Any]]
Score = float | None


class Turn(NamedTuple):
    """One message of a dialogue, in the shape that a formatter reads."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores completions."""

    @property
    def name(self) -> str:
        """How the scorer is called in metrics and errors."""
        ...

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Sequence[Score]:
        """Score each completion."""
        ...


def _content(message: Any) -> str:
    """The text of a message, given as a mapping or as an object; parts that are not text are left out."""
    content = message["content"] if isinstance(message, Mapping) else message.content
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))


def _role(message: Any) -> str:
    return message["role"] if isinstance(message, Mapping) else message.role


def text_of(value: Text) -> str:
    """The plain text of a prompt or completion: itself, or its messages' contents, one per line."""
    return value if isinstance(value, str) else "\n".join(_content(message) for message in value)


def turns_of(value: Text) -> tuple[Turn, ...]:
    """A prompt as messages: plain text is one user message."""
    if isinstance(value, str):
        return (Turn("user", value),)
    return tuple(Turn(_role(message), _content(message)) for message in value)


def scorer_prompt(messages: Sequence[Any]) -> Text:
    """What a scorer is given of a prompt: the text of a single user message, else the messages as TRL has them."""
    turns = turns_of(messages)
    return turns[0].content if len(turns) == 1 and turns[0].role == "user" else [turn.as_dict() for turn in turns]


def check_scores(name: str, returned: Any, count: int) -> list[Score]:
    """What a scorer returned, as a list of `count` floats (or None, "does not apply").

    Arrays and tensors of one dimension are taken as lists. Raises UserError, naming the scorer, for a wrong type or number of
    values and for values that are not finite numbers.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(f"scorer {name}: returned {type(returned).__name__}; expected a list of {count} numbers, one per completion")
    if len(values) != count:
        raise UserError(f"scorer {name}: returned {len(values)} scores for {count} completions; expected one per completion")
    return [_check_score(name, value, index) for index, value in enumerate(values)]


def _check_score(name: str, value: Any, index: int) -> Score:
    if value is None:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (int, float)):
        raise UserError(f"scorer {name}: score {index} is {value!r} ({type(value).__name__}); expected a number (or None)")
    if not math.isfinite(value):
        raise UserError(f"scorer {name}: score {index} is {value}; expected a finite number (None says: does not apply)")
    return float(value)
