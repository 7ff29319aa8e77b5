"""The user's own function as a scorer, named by a dotted path: package.module:function."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from configs.errors import UserError
from rewards.protocol import Score, Text, check_scores

EXPECTED = "f(prompts, completions, **columns) -> list[float]"


def load_function(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules of the working directory are found too.

    Raises UserError for a path without a colon, a module that is missing or fails to import, a missing or uncallable name.
    """
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f"scorer {path}: expected package.module:function")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:  # `python -m` has it, a console command has not
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(
                f"scorer {path}: there is no module {module_name!r}; it is looked for in the working directory ({here}) and in what is installed"
            ) from error
        raise UserError(f"scorer {path}: module {module_name!r} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise UserError(f"scorer {path}: module {module_name!r} failed to import: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if function is None:
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise UserError(f"scorer {path}: {module_name} has no function {function_name!r}; it has: {', '.join(names) or 'none'}")
    if not callable(function):
        raise UserError(f"scorer {path}: {function_name!r} is a {type(function).__name__}; expected a function {EXPECTED}")
    return function


class PythonFunction:
    """Calls the user's function; its exceptions come back as UserError with the scorer's name, the cause kept.

    The function is called with keywords. It may name the columns it wants; without **columns it is given only those. After an
    exception it is called again on single completions, to say which prompt it fails on.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self._function = load_function(path)
        try:
            parameters = list(inspect.signature(self._function).parameters.values())
        except (TypeError, ValueError):  # builtins and some extension types have no signature
            parameters = []
        self._names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters) or not parameters
        self._required = {p.name for p in parameters if p.default is p.empty and p.name in self._names}
        if not self._takes_all and not {"prompts", "completions"} <= self._names:
            signature = ", ".join(p.name for p in parameters)
            raise UserError(f"scorer {path}: the function takes ({signature}); expected {EXPECTED}")

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Score]:
        missing = self._required - {"prompts", "completions", *columns}
        if missing:
            raise UserError(
                f"scorer {self.name}: the function needs the column {', '.join(sorted(missing))}; the prompts have: {', '.join(sorted(columns)) or 'none'}"
            )
        chosen = columns if self._takes_all else {k: v for k, v in columns.items() if k in self._names}
        try:
            returned = self._function(prompts=list(prompts), completions=list(completions), **chosen)
        except Exception as error:
            where = self._first_failure(prompts, completions, chosen)
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"scorer {self.name}: failed {where}: {type(error).__name__}: {error} ({last.filename}:{last.lineno}, in {last.name}); correct the function"
            ) from error
        return check_scores(self.name, returned, len(completions))

    def _first_failure(self, prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]) -> str:
        """Which prompt the function fails on, by calling it on one completion at a time."""
        for index in range(len(completions)):
            single = {name: values[index : index + 1] for name, values in columns.items()}
            try:
                self._function(prompts=list(prompts[index : index + 1]), completions=list(completions[index : index + 1]), **single)
            except Exception:
                return f"on prompt {index} of {len(prompts)}"
        return f"on a batch of {len(prompts)}, though on no prompt alone"
