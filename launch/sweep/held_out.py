"""What trials are measured on: never the test part, because the best of many is chosen by what they are measured on."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

from configs.errors import UserError
from configs.schema import EvalSettings

Subset = Literal["validation", "all"]
WHY = "trials are chosen by it, and the test part is never to choose by"


def untested(chain: Any, own: frozenset[str]) -> Any:
    """The chain of a trial that makes the steps `own` itself: its SFT without the final test, its evaluation on rows that are held out and not the test part.

    Raises:
        UserError: the chain holds no such rows out.
    """
    changed: dict[str, Any] = {}
    if "sft" in own and chain.sft is not None:
        changed["sft"] = chain.sft.model_copy(update={"evaluation": chain.sft.evaluation.model_copy(update={"test": False})})
    if "eval" in own and chain.eval is not None:
        prompts, subset, _ = evaluated_on(chain)
        changed["eval"] = chain.eval.model_copy(update={"prompts": prompts, "subset": subset})
    return chain.model_copy(update=changed)


def evaluated_on(chain: Any) -> tuple[Any, Subset, str]:
    """Prompts and subset of the evaluation of a trial, and the same in words: the first of these that holds any prompt.

    The validation part of `eval.prompts` (unless eval.subset is all: then the file as a whole is for the end); `ppo.evaluation.prompts`, which PPO
    keeps out of training; the validation part of `ppo.prompts`. Of a file that is not made yet it is taken on trust.

    Raises:
        UserError: there is none of them.
    """
    asked: EvalSettings = chain.eval
    ppo = chain.ppo
    if chain.split.validation and asked.subset != "all" and _holds(chain, asked.prompts):
        return asked.prompts, "validation", "the validation part of eval.prompts"
    if ppo is not None and ppo.evaluation is not None and ppo.evaluation.prompts is not None:
        _refuse_test(chain, ppo.evaluation.prompts)
        return ppo.evaluation.prompts, "all", "ppo.evaluation.prompts"
    if chain.split.validation and ppo is not None and _holds(chain, ppo.prompts):
        return ppo.prompts, "validation", "the validation part of ppo.prompts"
    found = "split.validation is 0" if not chain.split.validation else "eval.subset is all" if asked.subset == "all" else "none of eval.prompts is in the validation part"
    raise UserError(
        f"eval: {found}, so that no prompts but those of the final evaluation are there to measure trials on; {WHY}. Set split.validation=0.05 and take eval.prompts "
        "that are split (with subset: test), or name prompts that nothing is trained on as ppo.evaluation.prompts, or sweep by a metric of a stage, such as evaluation/loss"
    )


def _holds(chain: Any, sources: Any) -> bool:
    """Whether any prompt of these is in the validation part."""
    if chain.split.test_prompts is not None and all(Path(source.path) == chain.split.test_prompts for source in sources):
        return False
    parts = _parts(sources, chain.split)
    return parts is None or "validation" in parts


def _refuse_test(chain: Any, sources: Any) -> None:
    """Raise UserError where prompts that PPO evaluates on are of the test part: PPO leaves them out, and the evaluation would not."""
    parts = _parts(sources, chain.split)
    if parts is not None and "test" in parts:
        raise UserError(
            f"ppo.evaluation.prompts: some of its prompts are of the test part (split.test {chain.split.test}, split.test_prompts {chain.split.test_prompts}); a trial would be evaluated on "
            f"them: {WHY}. Take them out of the file, or set split.validation, so that trials are evaluated on the validation part of eval.prompts"
        )


def _parts(sources: Any, split: Any) -> frozenset[str] | None:
    """The parts that prompts fall into; None where a file is not here (yet)."""
    files = [Path(source.path) for source in sources] + ([split.test_prompts] if split.test_prompts is not None else [])
    if any(str(file).startswith("hf:") or not file.exists() for file in files):
        return None
    return _read(json.dumps([source.model_dump(mode="json") for source in sources]), split.model_dump_json(), tuple(file.stat().st_mtime_ns for file in files))


@functools.lru_cache(maxsize=16)
def _read(sources: str, split: str, _changed: tuple[int, ...]) -> frozenset[str]:
    from configs.schema.common import Source, Split
    from stages import data

    splitter = data.Splitter(Split.model_validate_json(split))
    return frozenset(splitter.of(row) for row in data.read_prompts([Source.model_validate(source) for source in json.loads(sources)]).rows)
