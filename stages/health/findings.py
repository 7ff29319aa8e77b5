"""What a health check is, what it finds, and what is made of that: each check has a name, a cause and a remedy, and is a pure function of the metrics so far.

A check looks at the lines that were logged up to now and says what it saw, or None. Nothing else is remembered: the line in which checks failed
holds `health/NAME` for each of them, so a resumed run warns as the uninterrupted one does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from configs.errors import UserError
from configs.schema.health import Checks

Metrics = Mapping[str, float]
History = Sequence[Metrics]  # the newest line last

PREFIX = "health/"


class Check(NamedTuple):
    """A condition that should not hold, why it may hold, and what to change.

    `seen(history, context)` is called for the newest lines that are `due`: those in which the check can fail at all.
    """

    name: str
    seen: Callable[[History, Any], str | None]
    cause: str
    remedy: str
    due: Callable[[Metrics], bool] = lambda line: True


class Finding(NamedTuple):
    """A check that failed, with the numbers it saw."""

    name: str
    seen: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}. Cause: {self.cause}. Remedy: {self.remedy}"


def findings(checks: Iterable[Check], history: History, asked: Checks, context: Any) -> list[Finding]:
    """What is wrong in the newest line of `history`."""
    if asked.action == "off":
        return []
    made = [check for check in checks if check.name not in asked.ignore and check.due(history[-1])]
    seen = [(check, check.seen(history, context)) for check in made]
    return [Finding(check.name, words, check.cause, check.remedy) for check, words in seen if words is not None]


def examine(checks: Sequence[Check], line: Metrics, before: History, asked: Checks, context: Any) -> tuple[dict[str, float], list[Finding]]:
    """A line with what failed in it, and of that what had not failed in the line before that it could fail in."""
    found = findings(checks, [*before, line], asked, context)
    due = {check.name: check.due for check in checks}
    news = [f for f in found if PREFIX + f.name not in next((old for old in reversed(before) if due[f.name](old)), {})]
    return {**line, **{PREFIX + f.name: 1.0 for f in found}}, news


def counts(history: History) -> dict[str, int]:
    """In how many lines each check failed; those that never did are left out."""
    return dict(Counter(key.removeprefix(PREFIX) for line in history for key in line if key.startswith(PREFIX)))


def refusal(started: Sequence[Finding], kept: str) -> UserError:
    """The error that ends a run whose `health.action` is stop, naming each check that has begun to fail; `kept` says what there is to go on from."""
    found = "\n".join(f"  {finding}" for finding in started)
    return UserError(
        f"health.action is stop, and a health check has failed:\n{found}\n{kept}: run the same command again to go on. What stands under `health` "
        "may change (health.ignore: [NAME] leaves a check out), other settings with allow_changed: [config]; a chain starts the stage anew for those"
    )


def stop(started: Sequence[Finding], save: Callable[[], bool]) -> None:
    """Where a check has begun to fail, call `save`, which says whether it could, and raise.

    Raises:
        UserError: naming each of them.
    """
    if started:
        raise refusal(started, saved_words(save()))


def saved_words(saved: bool) -> str:
    """What there is to go on from."""
    return "The run is saved as it is" if saved else "The run could not be saved as it is, and goes on from its last save"
