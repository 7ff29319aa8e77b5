"""The user's own function, named by a dotted path package.module:function: as a scorer here, as a metric of an evaluation elsewhere."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from configs.errors import UserError
from rewards.protocol import Score, Text, check_scores

EXPECTED = "f(prompts, completions, **columns) -> list[float]"


def load_function(path: str, what: str = "scorer", expected: str = EXPECTED) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules of the working directory are found too.

    `what` it is and what is `expected` of it are for messages. Raises UserError for a path without a colon, a module that is missing or fails to import, a missing or uncallable name.
    """
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f"{what} {path}: expected package.module:function")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:  # `python -m` has it, a console command has not
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(
                f"{what} {path}: there is no module {module_name!r}; it is looked for in the working directory ({here}) and in what is installed"
            ) from error
        raise UserError(f"{what} {path}: module {module_name!r} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise UserError(f"{what} {path}: module {module_name!r} failed to import: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if function is None:
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise UserError(f"{what} {path}: {module_name} has no function {function_name!r}; it has: {', '.join(names) or 'none'}")
    if not callable(function):
        raise UserError(f"{what} {path}: {function_name!r} is a {type(function).__name__}; expected a function {expected}")
    return function


def source_digest(path: str) -> str | None:
    """The first 16 hex digits of a BLAKE3 of a function's source: another text is another function. None where there is no source."""
    from blake3 import blake3

    try:
        return blake3(inspect.getsource(load_function(path)).encode()).hexdigest()[:16]
    except (OSError, TypeError):  # a builtin or a callable object
        return None


class UserFunction:
    """Calls the user's function with keywords; its exceptions come back as UserError with its name, the cause kept.

    It may name the columns it wants; without **columns it is given only those. After an exception it is called again on single
    rows, to say which one it fails on. `given` names the lists that it always gets.
    """

    def __init__(self, path: str, what: str, expected: str, given: Sequence[str]) -> None:
        self.called, self.given = f"{what} {path}", set(given)
        self._function = load_function(path, what, expected)
        try:
            parameters = list(inspect.signature(self._function).parameters.values())
        except (TypeError, ValueError):  # builtins and some extension types have no signature
            parameters = []
        self._names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters) or not parameters
        self._required = {p.name for p in parameters if p.default is p.empty and p.name in self._names}
        if not self._takes_all and not self.given <= self._names:
            signature = ", ".join(p.name for p in parameters)
            raise UserError(f"{self.called}: the function takes ({signature}); expected {expected}")

    def call(self, given: Mapping[str, Sequence[Any]], columns: Mapping[str, Sequence[Any]]) -> Any:
        """What the function returns for lists of one length. Raises UserError."""
        if missing := self._required - {*given, *columns}:
            raise UserError(
                f"{self.called}: the function needs the column {', '.join(sorted(missing))}; the prompts have: {', '.join(sorted(columns)) or 'none'}"
            )
        lists = {**given, **{k: v for k, v in columns.items() if self._takes_all or k in self._names}}
        try:
            return self._function(**{name: list(values) for name, values in lists.items()})
        except Exception as error:
            where = self._first_failure(lists)
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(f"{self.called}: failed {where}: {type(error).__name__}: {error} ({last.filename}:{last.lineno}, in {last.name}); correct the function") from error

    def _first_failure(self, lists: Mapping[str, Sequence[Any]]) -> str:
        """Which row the function fails on, by calling it on one at a time."""
        count = len(next(iter(lists.values())))
        for index in range(count):
            try:
                self._function(**{name: list(values[index : index + 1]) for name, values in lists.items()})
            except Exception:
                return f"on prompt {index} of {count}"
        return f"on a batch of {count}, though on no prompt alone"


class PythonFunction:
    """The user's function as a scorer: one score per completion."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._function = UserFunction(path, "scorer", EXPECTED, ("prompts", "completions"))

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Score]:
        returned = self._function.call({"prompts": prompts, "completions": completions}, columns)
        return check_scores(self.name, returned, len(completions))
