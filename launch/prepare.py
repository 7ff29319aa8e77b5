"""Runs one preparation step of a chain: python -m launch.prepare STEP.json

STEP.json holds {"run": "module:function", "with": {…}, "writes": [paths], "key": digest, "parts": …, "record": path}. The function is called
with the keys of `with`; when every path of `writes` is there afterwards, `record` is written in one rename, which is what marks
the step as done.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.chain.inputs import path_digest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; exit code 2 with one line for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m launch.prepare", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("step", type=Path, help="the step's JSON file, as `align run` writes it")
    try:
        prepare(json.loads(parser.parse_args(argv).step.read_text(encoding="utf-8")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(step: dict[str, Any]) -> None:
    """Call the function and record that its files are complete. Raises UserError when it is not there or wrote too little."""
    function = find(step["run"])
    started = time.monotonic()
    function(**step["with"])
    missing = [path for path in step["writes"] if not Path(path).exists()]
    if missing:
        raise UserError(f"{step['run']} ended without writing {', '.join(missing)}; correct `writes:` of the step, or the function")
    record = Path(step["record"])
    record.parent.mkdir(parents=True, exist_ok=True)
    part = record.with_name(f".{record.name}.{os.getpid()}")
    done = {
        "key": step["key"],
        "parts": step.get("parts", {}),
        "writes": {path: path_digest(Path(path)) for path in step["writes"]},
        "seconds": time.monotonic() - started,
    }
    part.write_text(json.dumps(done), encoding="utf-8")
    os.replace(part, record)


def find(name: str) -> Callable[..., Any]:
    """The function that module:function names. Raises UserError."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # something that the module itself imports
        raise UserError(f"{name}: there is no module {error.name!r}; run from the folder that holds it, or install it") from error
    if not callable(function):
        raise UserError(f"{name}: module {module} has no function {attribute!r}")
    return function


if __name__ == "__main__":
    sys.exit(main())
