"""Tool turns: an assistant's calls, their results and the schemas of the tools, as OpenAI lays them out, and the check that a template shows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from configs.errors import UserError
from stages.data.layouts import WITH_TOOLS
from stages.data.rows import Demonstration, Message, Messages, RowError
from stages.data.templates import Template

Fields = dict[str, Any]
PROBE = "probe-5f0c7e9ab1d2"
Render = Callable[[Messages, bool, str], str]


def extra_of(turn: Fields, role: str, name: str) -> str:
    """What a turn holds besides role and content, as JSON text: `tool_calls` of the assistant, `name` and `tool_call_id` of a result. Raises RowError."""
    if role == "assistant" and turn.get("tool_calls"):
        return _text({"tool_calls": _calls(turn["tool_calls"], f"{name}.tool_calls")})
    if role == "tool":
        kept = {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
        for key, value in kept.items():
            if not isinstance(value, str):
                raise RowError(f"{name}.{key}", f"is {value!r}; expected text")
        return _text(kept) if kept else ""
    return ""


def _calls(value: Any, name: str) -> list[Fields]:
    if not isinstance(value, (list, tuple)):
        raise RowError(name, f"is {value!r}; expected a list of calls")
    return [_call(one, f"{name}[{index}]") for index, one in enumerate(value)]


def _call(value: Any, name: str) -> Fields:
    """One call with its arguments as an object, whether the file has them so or as JSON text."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(name, 'is no call; expected {"type": "function", "function": {"name": …, "arguments": …}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"{name}.function.arguments")
    if not isinstance(arguments, dict | None):
        raise RowError(f"{name}.function.arguments", f"is {arguments!r}; expected an object, or JSON text of one")
    call: Fields = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
    return call | ({"id": value["id"]} if value.get("id") else {})


def schemas(fields: Fields) -> str:
    """The `tools` column, a list of schemas or JSON text of one, as JSON text; "" where there is none. Raises RowError."""
    value = fields.get("tools")
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "tools")
    if not value or (isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, (list, tuple)):
        raise RowError("tools", "is no list; expected a list of JSON schemas of tools, or JSON text of one (rename the column if it holds something else)")
    return _text([_schema(one, f"tools[{index}]") for index, one in enumerate(value)])


def _schema(value: Any, name: str) -> Fields:
    schema = value if isinstance(value, dict) and "function" in value else {"type": "function", "function": value}
    function = schema["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(name, 'is no schema of a tool; expected {"type": "function", "function": {"name": …, "description": …, "parameters": …}}')
    return schema


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(name, f"is text that is no JSON ({str(error).partition(';')[0]})") from None


def _text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise RowError("tools", f"holds what JSON cannot: {error}") from None


def calls_of(turn: Message) -> list[Fields]:
    """The calls of a turn; none but an assistant's has any."""
    return list(turn.as_dict().get("tool_calls", ()))


def check_results(turns: Sequence[Message], name: str, offset: int) -> None:
    """Every call has one result right after it, and results name calls that were made. Raises RowError.

    `offset`: the number of the first turn in the file's list.
    """
    for index, turn in enumerate(turns):
        if not (calls := calls_of(turn)) or index == len(turns) - 1:
            continue
        results = list(_results(turns[index + 1 :]))
        if len(results) != len(calls):
            raise RowError(f"{name}[{index + offset}]", f"calls {len(calls)} tools and is followed by {len(results)} results; expected one tool turn for each call")
        ids = [call.get("id") for call in calls]
        for place, result in enumerate(results, start=index + offset + 1):
            answered = result.as_dict().get("tool_call_id")
            if answered and all(ids) and answered not in ids:
                raise RowError(f"{name}[{place}].tool_call_id", f"is {answered!r}; the calls before it are {', '.join(map(repr, ids))}")


def _results(turns: Sequence[Message]) -> Iterator[Message]:
    for turn in turns:
        if turn.role != "tool":
            return
        yield turn


def has_tools(row: Demonstration) -> bool:
    """Whether a row holds tool turns or schemas."""
    return bool(row.tools) or any(turn.role == "tool" or calls_of(turn) for turn in row.messages)


def check_shown(template: Template, render: Render, row: Demonstration) -> None:
    """Raise UserError where `template` leaves out a part of a row's tool turns: nothing would be learned of it, or an answer to nothing.

    A part is shown if the text changes with it. The built-in layouts are proven by tests; any other template is asked for every part.
    """
    if template.layout:
        if template.layout not in WITH_TOOLS:
            raise UserError(
                f"the row has tool turns or `tools`, which the template {template.name!r} cannot show; set `template` to {' or '.join(WITH_TOOLS)}, to auto where "
                "the tokenizer's own has tools, or to a .jinja file that writes them"
            )
        return
    whole = render(row.messages, False, row.tools)
    for what, other in _changed(row):
        if render(other.messages, False, other.tools) == whole:
            raise UserError(f"the template {template.name!r} does not show {what}; set `template` to {' or '.join(WITH_TOOLS)}, or to a .jinja file that writes it")


def _changed(row: Demonstration) -> Iterator[tuple[str, Demonstration]]:
    """(what is changed, the row with that changed) for every part of its tool turns."""
    for index, turn in enumerate(row.messages):
        calls = calls_of(turn)
        if turn.role == "tool" or (calls and turn.content):
            what = "the result of a tool" if turn.role == "tool" else "the text beside a tool call"
            yield what, _with_turn(row, index, replace(turn, content=PROBE))
        for number, call in enumerate(calls):
            for part, value in (("name", PROBE), ("arguments", {PROBE: PROBE})):
                function = call["function"] | {part: value}
                other = [*calls[:number], call | {"function": function}, *calls[number + 1 :]]
                yield f"the {part} of a tool call", _with_turn(row, index, replace(turn, extra=_text({"tool_calls": other})))
    given = json.loads(row.tools or "[]")
    for number, schema in enumerate(given):
        other = [*given[:number], schema | {"function": schema["function"] | {"name": PROBE}}, *given[number + 1 :]]
        yield "the `tools` of a row", replace(row, tools=_text(other))


def _with_turn(row: Demonstration, index: int, turn: Message) -> Demonstration:
    return replace(row, messages=(*row.messages[:index], turn, *row.messages[index + 1 :]))
