"""The layouts a row can have: recognised from its columns, and turned into rows."""

from __future__ import annotations

import math
from typing import Any

from configs.errors import UserError
from stages.data import conversations as talk
from stages.data.conversations import optional_text, text, with_system
from stages.data.rows import Demonstration, Kind, Message, Messages, PreferencePair, Prompt, RowError, as_messages
from stages.data.tools import schemas

Fields = dict[str, Any]
RESERVED = ("prompts", "completions", "prompt_ids", "completion_ids")
LAYOUTS = {
    "demonstrations": "messages; prompt + completion; instruction (+ input) + output; conversations",
    "pairs": "prompt + chosen + rejected; chosen + rejected as message lists or \"\\n\\nHuman:\" text; "
    "conversations + chosen + rejected; instruction (+ input) + chosen + rejected",
    "prompts": "prompt; text; instruction (+ input); messages; conversations; any layout of pairs; a .txt file",
}
# Layouts that would read as nonsense under another's name: the columns that give them away, and what they are.
UNSUPPORTED = [
    ({"parent_message_id", "text"}, "a message tree (one row per message, linked by parent ids); join each path into `messages`"),
    ({"parent_id", "text", "role"}, "a message tree (one row per message, linked by parent ids); join each path into `messages`"),
    ({"output_1", "output_2", "label"}, "a labelled comparison; write the preferred output to `chosen`, the other to `rejected`, "
     "and `input` to `prompt`"),
]
LIKELY = {
    "output": ("response", "answer", "completion", "target"), "input": ("context",),
    "prompt": ("question", "query", "input", "instruction", "text"), "completion": ("response", "answer", "output", "target"),
    "chosen": ("preferred", "winner", "response_chosen"), "rejected": ("dispreferred", "loser", "response_rejected"),
}


def recognise(kind: Kind, fields: Fields, where: str) -> str:
    """The format of a file from its first row's columns. Raises UserError that names the columns when unclear."""
    for columns, explanation in UNSUPPORTED:
        if columns <= fields.keys():
            raise UserError(f"{where}: this is {explanation} (columns: {_names(fields)})")
    found = {"demonstrations": _demonstrations, "pairs": _pairs, "prompts": _prompts}[kind](fields, where)
    if found is None:
        raise UserError(
            f"{where}: cannot recognise {kind} from the columns {_names(fields)}; expected one of: {LAYOUTS[kind]}. "
            f"Name the file's columns with `columns: {{ours: theirs}}`{_suggest(kind, fields)}, or set `format`"
        )
    return found


def _names(fields: Fields) -> str:
    return ", ".join(map(str, fields)) or "(none)"


def _suggest(kind: Kind, fields: Fields) -> str:
    wanted = {
        "demonstrations": ["input", "output"] if "instruction" in fields else ["prompt", "completion"],
        "pairs": ["prompt", "chosen", "rejected"],
        "prompts": ["prompt"],
    }[kind]
    guesses: dict[str, str] = {}
    for ours in wanted:
        match = next((theirs for theirs in LIKELY[ours] if theirs in fields and theirs not in guesses.values()), None)
        if ours not in fields and match:
            guesses[ours] = match
    return f", perhaps {{{', '.join(f'{ours}: {theirs}' for ours, theirs in guesses.items())}}}" if guesses else ""


def _is_pair(fields: Fields) -> bool:
    return {"chosen", "rejected"} <= fields.keys()


def _demonstrations(fields: Fields, where: str) -> str | None:
    if "messages" in fields:
        if isinstance(fields.get("label"), bool):
            raise UserError(
                f"{where}: messages with a true/false label (KTO data) are not demonstrations: rows labelled false would be imitated. "
                "Keep the rows labelled true and drop the column, or set `format: messages` to imitate all"
            )
        return "messages"
    if {"prompt", "completion"} <= fields.keys():
        return "prompt_completion"
    if {"instruction", "output"} <= fields.keys():
        return "alpaca"
    if _is_pair(fields):
        layout = _pairs(fields, where)
        raise UserError(
            f"{where}: these are preference pairs (columns: {_names(fields)}), expected demonstrations; "
            f"set `format: {'hh' if layout == 'hh' else 'preference'}` to imitate the chosen completions"
        )
    return "sharegpt" if "conversations" in fields else None


def _pairs(fields: Fields, where: str) -> str | None:
    if not _is_pair(fields):
        return None
    for column, layout in (("prompt", "preference"), ("conversations", "sharegpt"), ("messages", "messages"), ("instruction", "alpaca")):
        if column in fields:
            return layout
    if isinstance(fields["chosen"], str):
        return "hh" if "\n\nHuman:" in "\n\n" + fields["chosen"] else None
    return "preference"


def _prompts(fields: Fields, where: str) -> str | None:
    for column, layout in (("prompt", "prompt_completion"), ("conversations", "sharegpt"), ("messages", "messages"), ("instruction", "alpaca")):
        if column in fields:
            return layout
    return _pairs(fields, where) or ("text" if "text" in fields else None)


def demonstration(fields: Fields, layout: str, where: str, weight: float) -> Demonstration:
    """One row as a demonstration. Raises RowError."""
    if layout in ("preference", "hh"):
        return pair(fields, "hh" if layout == "hh" else (_pairs(fields, where) or layout), where, weight).demonstration()
    if layout == "messages":
        system = optional_text(fields, "system")
        turns = talk.ends_with_assistant(talk.conversation(_present(fields, "messages"), "messages", system=system, tools=True), "messages")
        return Demonstration(turns, where, weight, schemas(fields))
    if layout == "sharegpt":
        turns = talk.ends_with_assistant(*_turns(fields, layout))
    elif layout == "prompt_completion":
        prompt = _prompt_field(fields)
        turns = (*prompt, Message("assistant", talk.completion(_present(fields, "completion"), "completion")))
    elif layout == "alpaca":
        turns = (*_alpaca_prompt(fields), Message("assistant", text(fields, "output")))
    else:
        raise RowError("format", f"is {layout!r}, which holds no completions; demonstrations are {LAYOUTS['demonstrations']}")
    return Demonstration(turns, where, weight)


def pair(fields: Fields, layout: str, where: str, weight: float) -> PreferencePair:
    """One row as a preference pair. Raises RowError."""
    margin = _margin(fields)
    if layout == "hh":
        chosen, rejected = (talk.parse_hh(_present(fields, name), name) for name in ("chosen", "rejected"))
        prompt = _shared_prompt(chosen, rejected)
        return PreferencePair(prompt, chosen[-1].content, rejected[-1].content, margin, where, weight)
    prompt = _pair_prompt(fields, layout)
    chosen_text, rejected_text = (_after_prompt(fields, name, prompt) for name in ("chosen", "rejected"))
    return PreferencePair(prompt, chosen_text, rejected_text, margin, where, weight)


def prompt(fields: Fields, layout: str, where: str, weight: float) -> tuple[Prompt, list[str]]:
    """One row as a prompt with the other scalar columns kept, and the names of columns left out. Raises RowError."""
    if layout == "text":
        turns, used = as_messages(text(fields, "text")), {"text"}
    elif layout == "alpaca":
        turns, used = _alpaca_prompt(fields), {"instruction", "input", "system"}
    elif layout == "hh" or (layout == "preference" and "prompt" not in fields):
        turns, used = pair(fields, layout, where, weight).prompt, {"chosen", "rejected"}
    elif layout in ("messages", "sharegpt"):
        turns, name = _turns(fields, layout)
        turns, used = _without_answer(turns), {name, "system"}
    else:
        turns, used = _prompt_field(fields), {"prompt", "system"}
    extra = {name: value for name, value in fields.items() if name not in used and is_scalar(value)}
    left_out = [name for name in extra if name in RESERVED]
    return Prompt(turns, {k: v for k, v in extra.items() if k not in left_out}, where, weight), left_out


def is_scalar(value: Any) -> bool:
    """Whether a column's value is kept for scorers and metrics."""
    return value is None or isinstance(value, (str, int, float, bool))


def _present(fields: Fields, name: str) -> Any:
    if name not in fields:
        raise RowError(name, f"is missing; the row has {', '.join(map(repr, fields)) or 'no fields'}")
    return fields[name]


def _turns(fields: Fields, layout: str) -> tuple[Messages, str]:
    name = "conversations" if layout == "sharegpt" else "messages"
    return talk.conversation(_present(fields, name), name, system=optional_text(fields, "system")), name


def _prompt_field(fields: Fields) -> Messages:
    """`prompt` as text or as turns that end with the user's."""
    value, system = _present(fields, "prompt"), optional_text(fields, "system")
    if isinstance(value, (list, tuple)):
        return talk.ends_with_user(talk.conversation(value, "prompt", system=system), "prompt")
    return with_system(system, as_messages(talk.check_text(value, "prompt")))


def _alpaca_prompt(fields: Fields) -> Messages:
    if fields.get("history"):
        raise RowError("history", "holds earlier turns, which this layout does not read; write the row as `messages`")
    extra = optional_text(fields, "input")
    instruction = text(fields, "instruction")
    return with_system(optional_text(fields, "system"), as_messages(f"{instruction}\n\n{extra}" if extra else instruction))


def _without_answer(turns: Messages) -> Messages:
    """The prompt of a conversation: everything up to the last user turn."""
    return turns[:-1] if turns[-1].role == "assistant" else turns


def _pair_prompt(fields: Fields, layout: str) -> Messages:
    if layout == "alpaca":
        return _alpaca_prompt(fields)
    if layout in ("sharegpt", "messages"):
        return talk.ends_with_user(*_turns(fields, layout))
    if "prompt" in fields:
        return _prompt_field(fields)
    chosen, rejected = (
        talk.conversation(_present(fields, name), name, system=optional_text(fields, "system")) for name in ("chosen", "rejected")
    )
    return _shared_prompt(chosen, rejected)


def _shared_prompt(chosen: Messages, rejected: Messages) -> Messages:
    """The turns before the last, which both conversations must share. Raises RowError."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        talk.ends_with_assistant(turns, name)
    if chosen[:-1] != rejected[:-1]:
        differing = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
        raise RowError("rejected", f"differs from 'chosen' already at turn {differing}; they may differ in the last assistant turn only")
    return chosen[:-1]


def _after_prompt(fields: Fields, name: str, prompt: Messages) -> str:
    """The completion in `name`: text, an assistant message, or a conversation that repeats the prompt."""
    value = _present(fields, name)
    if isinstance(value, (list, tuple)) and len(value) > 1:
        turns = talk.ends_with_assistant(talk.conversation(value, name), name)
        without_system = tuple(turn for turn in prompt if turn.role != "system")
        if turns[:-1] not in (prompt, without_system):
            raise RowError(name, "is a conversation that does not begin with the row's prompt")
        return turns[-1].content
    return talk.completion(value, name)


def _margin(fields: Fields) -> float | None:
    value = fields.get("margin")
    if value is None or value == "":
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("margin", f"is {value!r}; expected a finite number (or null)")
    return number
