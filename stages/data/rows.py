"""The three kinds of rows every stage reads, and what reading them found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

ROLES = ("system", "user", "assistant", "tool")
Kind = Literal["demonstrations", "pairs", "prompts"]


class RowError(ValueError):
    """One row is wrong in one field; the reader adds file and row and collects these into one UserError."""

    def __init__(self, field_name: str, message: str) -> None:
        super().__init__(f"field {field_name!r} {message}")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is one of ROLES, `content` is text as the file has it, `extra` is what a tool turn has besides (JSON text, or "")."""

    role: str
    content: str
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates and TRL take."""
        return {"role": self.role, "content": self.content} | (json.loads(self.extra) if self.extra else {})


Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What SFT imitates: [system], user, assistant, … , assistant. `where` is "file:row"; `tools` the schemas of a row's tools (JSON text, or "").

    An assistant's turn that calls tools is followed by one turn of a tool for each call, and these by the assistant.
    """

    messages: Messages
    where: str = ""
    weight: float = 1.0
    tools: str = ""

    @property
    def prompt(self) -> Messages:
        """Everything before the last assistant turn."""
        return self.messages[:-1]

    @property
    def completion(self) -> str:
        """The text of the last assistant turn, "" where that only calls tools."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, the better first; `margin` (in score units) says by how much, where known."""

    prompt: Messages
    chosen: str
    rejected: str
    margin: float | None = None
    where: str = ""
    weight: float = 1.0

    def demonstration(self) -> Demonstration:
        """The chosen completion as something to imitate."""
        return Demonstration((*self.prompt, Message("assistant", self.chosen)), self.where, self.weight)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy completes; `columns` holds the file's other scalar columns, for scorers."""

    prompt: Messages
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    weight: float = 1.0


Row = Demonstration | PreferencePair | Prompt
R = TypeVar("R", Demonstration, PreferencePair, Prompt)


@dataclass
class Report:
    """What reading found: counts of rows, and of what a person may want to mend."""

    rows: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    equal_pairs: int = 0
    placeholders: int = 0
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """Rows of all sources in file order, and the report about them."""

    rows: list[R]
    report: Report


def as_messages(prompt: str | Messages) -> Messages:
    """A plain text prompt is one user message."""
    return (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
