"""What names and references look like. No name can leave the registry's folder."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Literal

from configs.errors import UserError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ID = re.compile(r"\d{8}t\d{6}-[0-9a-f]{12}")
_METRIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")
FORMS = "sft/demo, sft/demo@3, sft/demo@latest, sft/demo@best:METRIC, sft/demo@ALIAS, or a checkpoint's id"


def is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def check_name(value: str, what: str) -> str:
    """`value` itself. Raises UserError unless it is a plain lower-case name."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise UserError(
            f"{what} {value!r} is not a usable name: 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit"
        )
    return value


def check_alias(value: str) -> str:
    """`value` itself. Raises UserError when it could be taken for a version, `latest` or `best`."""
    check_name(value, "alias")
    if value.isdigit() or value in ("latest", "best"):
        raise UserError(
            f"alias {value!r} would read as a version or as {value!r} itself; choose a word such as production"
        )
    return value


def is_id(value: str) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def new_id() -> str:
    """Time (UTC) and 48 random bits: sorts by age, unique without any coordination."""
    return f"{datetime.now(UTC):%Y%m%dt%H%M%S}-{secrets.token_hex(6)}"


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Reference:
    """A parsed `stage/name[@selector]`."""

    stage: str
    name: str
    kind: Literal["latest", "version", "best", "alias"]
    value: str = ""  # the version, the metric or the alias

    @property
    def family(self) -> str:
        return f"{self.stage}/{self.name}"


def split_family(text: str) -> tuple[str, str]:
    """`stage/name` as two checked names. Raises UserError."""
    stage, slash, name = text.partition("/")
    if not slash:
        raise UserError(f"{text!r} is not a checkpoint: expected stage/name, such as sft/demo")
    return check_name(stage, f"{text!r}: stage"), check_name(name, f"{text!r}: name")


def parse(text: str) -> Reference:
    """A reference as a person types it (ids are handled by the registry). Raises UserError."""
    if not isinstance(text, str) or "/" not in text.partition("@")[0]:
        raise UserError(f"{text!r} is not a reference to a checkpoint; write one of: {FORMS}")
    family, at, selector = text.strip().partition("@")
    stage, name = split_family(family)
    if not at or selector == "latest":
        return Reference(stage, name, "latest")
    if selector.isascii() and selector.isdigit():
        return Reference(stage, name, "version", str(int(selector[:9])))
    if found := re.fullmatch(r"best(?:[: ]\s*(.*))?", selector):
        metric = (found.group(1) or "").strip()
        if not _METRIC.fullmatch(metric):
            raise UserError(f"{text!r} does not say by which metric; write for example {family}@best:score")
        return Reference(stage, name, "best", metric)
    return Reference(stage, name, "alias", check_name(selector, f"{text!r}: alias"))


def did_you_mean(asked: str, known: list[str]) -> str:
    """` Did you mean X?` or nothing."""
    close = get_close_matches(asked, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""
