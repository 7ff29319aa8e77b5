"""What a trial is judged by: where the metric is written, its values so far and in the end, and which way is better."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema.chain import STAGES
from launch.chain.decide import read_json
from stages.registry.best import lower_is_better

LOWER = re.compile(r"(?:loss|perplexity|kl|kl_k3|ece|error)$")
SUPERVISED = ("sft", "reward", "dpo")


@dataclass(frozen=True)
class Metric:
    """A metric's name, the stage (or eval) that it is of, and which way is better."""

    name: str
    stage: str
    goal: str

    @property
    def names(self) -> tuple[str, ...]:
        """What the stage may call it: evaluations of the stages that TRL trains are evaluation/X or STAGE/eval_X."""
        if self.stage in SUPERVISED:
            for before, other in (("evaluation/", f"{self.stage}/eval_"), (f"{self.stage}/eval_", "evaluation/")):
                if self.name.startswith(before):
                    return (self.name, other + self.name.removeprefix(before))
        return (self.name,)

    @property
    def reported(self) -> bool:
        """Whether a running stage writes it, so that a trial can be stopped early."""
        return "/" in self.name and self.stage != "eval"

    def series(self, folder: Path) -> list[tuple[int, float]]:
        """(step or iteration, value) of every line of the stage's metrics.jsonl that has it, the last of each step; [] while there are none."""
        found: dict[int, float] = {}
        for row in lines_of(folder / self.stage / "metrics.jsonl"):
            value = next((row[name] for name in self.names if name in row), None)
            if isinstance(value, int | float):
                found[int(row.get("step", row.get("iteration", len(found) + 1)))] = float(value)
        return sorted(found.items())

    def value(self, folder: Path, published: dict[str, Any]) -> float:
        """The finished trial's value: of what was published where its metrics hold it, else the last that the stage wrote.

        Raises:
            LookupError: no file has the metric; the message names those there are.
        """
        if self.stage == "eval":
            return self._evaluated(folder)
        bare = [name.removeprefix("evaluation/") for name in self.names if name.startswith("evaluation/")]
        for name in (*self.names, *bare):
            if isinstance(published.get(name), int | float):
                return float(published[name])
        series = self.series(folder)
        if series:
            return series[-1][1]
        raise LookupError(self._missing({*published, *(key for row in lines_of(folder / self.stage / "metrics.jsonl") for key in row)} - {"step", "iteration"}))

    def _evaluated(self, folder: Path) -> float:
        """eval/LABEL/FIGURE of the chain's evaluation, such as eval/ppo/score, eval/ppo/win_rate, eval/dpo/kl/k3."""
        here: Any = read_json(folder / "eval" / "results.json").get("models", {})
        known = {f"eval/{label}/{figure}" for label, figures in here.items() for figure in figures}
        for part in self.name.removeprefix("eval/").replace("/gold", "/score").split("/"):
            here = here.get(part) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here = here.get("mean", here.get("k1"))
        if isinstance(here, bool) or not isinstance(here, int | float):
            raise LookupError(self._missing(known))
        return float(here)

    def _missing(self, known: set[str]) -> str:
        close = difflib.get_close_matches(self.name, known, n=1, cutoff=0.5)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        return f"metric {self.name!r}: {self.stage} has none of that name; there are {', '.join(sorted(known)) or 'none'}{hint}"

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is the better value."""
        return one < other if self.goal == "min" else one > other


def metric_of(chain: Any, name: str | None, stage: str | None, goal: str | None, swept: Sequence[str]) -> Metric:
    """The metric that is asked for, or the stage's own where none is. `swept`: the stages that fields of the space are of.

    Raises:
        UserError: the chain does not have its stage; the stage keeps no rows to measure it on.
    """
    present = [each for each in (*STAGES, "eval") if getattr(chain, each) is not None]
    told = name.partition("/")[0] if name else None
    if told in (*STAGES, "eval") and stage is not None and stage != told:
        raise UserError(f"metric {name!r} is of the stage {told}, and stage says {stage}; leave one out")
    named = told if told in (*STAGES, "eval") else None
    chosen = stage or named or next((each for each in reversed(present) if each in swept), present[0])
    if chosen not in present:
        raise UserError(f"stage {chosen}: the chain has no section {chosen!r}; it has {', '.join(present)}")
    if chosen == "eval" and name is None:
        raise UserError("stage: eval needs a metric, such as eval/ppo/score: eval/LABEL/FIGURE as align eval shows them")
    if chosen == "eval" and not str(name).startswith("eval/"):
        raise UserError(f"metric {name!r}: the evaluation's figures are eval/LABEL/FIGURE, such as eval/{next(each for each in reversed(present) if each in STAGES)}/score")
    name = name or _own(chain, chosen)
    _check_measured(chain, chosen, name)
    return Metric(name, chosen, goal or _goal(chain, chosen, name))


def chosen_by(chain: Any, stage: str) -> tuple[str, str, str] | None:
    """What a stage chooses its published state by, which way is better, and the setting that says so; None where it says nothing and publishes the last one."""
    evaluation = getattr(getattr(chain, stage), "evaluation", None)
    if evaluation is None:
        return None
    if stage == "sft":
        found = evaluation.chosen_by
        return (found, "max" if evaluation.higher_is_better else "min", evaluation.asks) if found else None
    name = evaluation.metric.removeprefix("-")
    if name == "evaluation/heldout_score" and not evaluation.scorers:
        name = "evaluation/score"  # the same numbers, where nothing else scores
    lower = evaluation.metric.startswith("-") or lower_is_better(name.removesuffix("_k3"))
    return name, "min" if lower else "max", "evaluation.metric"


def _goal(chain: Any, stage: str, name: str) -> str:
    """Which way is better: as the stage's own choice of its best state has it, else as the name tells."""
    own = chosen_by(chain, stage) if stage in STAGES else None
    if own is not None and own[0] == name:
        return own[1]
    return "min" if LOWER.search(name) else "max"


def _own(chain: Any, stage: str) -> str:
    """The metric that a stage is judged by when nothing is said: what it chooses its published state by, else the validation loss."""
    own = chosen_by(chain, stage)
    if own is None and stage == "ppo":
        raise UserError("ppo.evaluation is null, so that nothing measures a trial; give it back, or name a metric, such as --metric objective/score")
    return own[0] if own else "evaluation/loss"


def why_own(chain: Any, metric: Metric) -> str:
    """One line on why trials are judged by this metric when none was given."""
    own = chosen_by(chain, metric.stage)
    why = f"which {metric.stage}.{own[2]} chooses the published state by" if own else f"the validation loss of {metric.stage}"
    return f"no metric was given: trials are judged by {metric.name}, {why} ({'less' if metric.goal == 'min' else 'more'} is better)"


def _check_measured(chain: Any, stage: str, name: str) -> None:
    if name.startswith("test/"):
        raise UserError(f"metric {name!r}: the test part is looked at once, and never to choose by; take evaluation/{name.removeprefix('test/')}")
    held_out = name.startswith(("evaluation/", f"{stage}/eval_"))
    own_prompts = stage == "ppo" and chain.ppo.evaluation is not None and chain.ppo.evaluation.prompts is not None
    if held_out and not chain.split.validation and not own_prompts:
        raise UserError(f"metric {name!r}: split.validation is 0, so that no rows are held out to measure it on; set split.validation=0.05, or name another metric")


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of a file that is being written; [] where there is none."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.split("\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows
