"""Conversations in the shapes found in the wild, into tuples of Message with roles in order."""

from __future__ import annotations

import re
from typing import Any

from stages.data.rows import Message, Messages, RowError
from stages.data.tools import calls_of, check_results, extra_of

ROLE_NAMES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def kind_of(value: Any) -> str:
    """How an error names what it found."""
    return "null" if value is None else {"str": "text", "dict": "an object", "list": "a list"}.get(type(value).__name__, f"{value!r}")


def text(fields: dict[str, Any], name: str) -> str:
    """The non-empty text of a required field. Raises RowError."""
    if name not in fields:
        raise RowError(name, f"is missing; the row has {', '.join(map(repr, fields)) or 'no fields'}")
    return check_text(fields[name], name)


def check_text(value: Any, name: str) -> str:
    """`value`, if it is text that is more than whitespace. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(name, f"is {kind_of(value)}; expected text")
    if not value.strip():
        raise RowError(name, "is empty")
    return value


def optional_text(fields: dict[str, Any], name: str) -> str:
    """The text of a field that may be absent, null or blank (all of them ""). Raises RowError when it is not text."""
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(name, f"is {kind_of(value)}; expected text")
    return value if value.strip() else ""


def message(value: Any, name: str, *, tools: bool = False) -> Message:
    """One {role, content} or {from, value} object; with `tools`, also an assistant's tool_calls and a tool's result. Raises RowError."""
    if not isinstance(value, dict):
        raise RowError(name, f"is {kind_of(value)}; expected an object with role and content (or from and value)")
    role_key, text_key = ("from", "value") if "from" in value else ("role", "content")
    called = bool(value.get("tool_calls"))
    if not tools and (called or value.get(role_key) == "tool"):
        raise RowError(name, "is a tool turn; these are read in the `messages` of demonstrations only (SFT)")
    for key in (role_key,) if called else (role_key, text_key):
        if key not in value:
            raise RowError(f"{name}.{key}", f"is missing; the turn has {', '.join(map(repr, value))}")
    known = ROLE_NAMES | ({"tool": "tool"} if tools else {})
    role = known.get(value[role_key]) if isinstance(value[role_key], str) else None
    if role is None:
        raise RowError(f"{name}.{role_key}", f"is {value[role_key]!r}; expected one of {', '.join(known)}")
    content, extra = value.get(text_key), extra_of(value, role, name)
    if called and role != "assistant":
        raise RowError(f"{name}.tool_calls", f"stands in a turn of {role}; only the assistant calls tools")
    if role == "tool" or called:
        content = content or "" if called else content
        if not isinstance(content, str):
            raise RowError(f"{name}.{text_key}", f"is {kind_of(content)}; expected text (a result that is no text is written as JSON text)")
        return Message(role, content, extra)
    if role == "system" and content == "":
        return Message(role, "")
    return Message(role, check_text(content, f"{name}.{text_key}"))


def conversation(value: Any, name: str, *, system: str = "", tools: bool = False) -> Messages:
    """A list of turns: [system], then user and assistant in turn, user first. Raises RowError naming the turn.

    With `tools`, an assistant's turn with calls is followed by their results, and these by the assistant's next turn. An empty system message is left out; `system` (a column of its own) is put first.
    """
    if not isinstance(value, (list, tuple)):
        raise RowError(name, f"is {kind_of(value)}; expected a list of turns")
    turns = [message(turn, f"{name}[{index}]", tools=tools) for index, turn in enumerate(value)]
    offset = 0
    if turns and turns[0].role == "system":
        offset = 1
        system = turns[0].content or system
        turns = turns[1:]
    if not turns:
        raise RowError(name, "has no turns")
    for index, turn in enumerate(turns):
        before = turns[index - 1] if index else None
        expected = _next_roles(before)
        if turn.role not in expected:
            place = f"after {before.role}{' with tool_calls' if calls_of(before) else ''}" if before else "at the beginning"
            raise RowError(f"{name}[{index + offset}]", f"is a turn of {turn.role} {place}; expected {' or '.join(expected)}")
    check_results(turns, name, offset)
    return with_system(system, tuple(turns))


def _next_roles(before: Message | None) -> tuple[str, ...]:
    if before is None:
        return ("user",)
    if before.role == "assistant":
        return ("tool",) if calls_of(before) else ("user",)
    return ("tool", "assistant") if before.role == "tool" else ("assistant",)


def with_system(system: str, turns: Messages) -> Messages:
    """`turns` after a system message, where there is one."""
    return (Message("system", system), *turns) if system.strip() else turns


def ends_with_assistant(turns: Messages, name: str) -> Messages:
    """Check that there is something to imitate at the end. Raises RowError."""
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError(name, "has no assistant turn; there is nothing to learn from")
    if turns[-1].role != "assistant":
        raise RowError(name, f"ends with a {turns[-1].role} turn; expected an assistant turn (leave the last {turns[-1].role} turn out)")
    return turns


def ends_with_user(turns: Messages, name: str) -> Messages:
    """Check that the turns are a prompt. Raises RowError."""
    if turns[-1].role != "user":
        raise RowError(name, "ends with an assistant turn; a prompt ends with a user turn")
    return turns


def completion(value: Any, name: str) -> str:
    """A completion: text, one assistant message, or a list of just that. Raises RowError."""
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise RowError(name, f"has {len(value)} messages; expected one assistant message")
        value, name = value[0], f"{name}[0]"
    if isinstance(value, dict):
        turn = message(value, name)
        if turn.role != "assistant":
            raise RowError(name, f"is a turn of {turn.role}; expected assistant")
        return turn.content
    return check_text(value, name)


def parse_hh(value: Any, name: str) -> Messages:
    """Anthropic's "\\n\\nHuman: …\\n\\nAssistant: …" text (arXiv:2204.05862). Raises RowError."""
    raw = check_text(value, name)
    pieces = HH_TURN.split(raw if raw.startswith("\n\n") else "\n\n" + raw)
    if len(pieces) < 3 or pieces[0].strip():
        raise RowError(name, 'does not begin with "\\n\\nHuman:"')
    turns = [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return conversation(turns, name)
