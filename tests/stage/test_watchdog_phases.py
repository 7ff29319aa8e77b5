"""What a stage does while the watchdog counts which phase: the limit that ends a hang is the one of that work, in every phase of a real run.

That a limit is applied, whichever phase it is of, is shown by tests/unit/test_watchdog.py; that real runs end so, by ranks that stand still in `make reliability`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from stages import data, models
from stages.ppo import store, watch
from stages.ppo import train as ppo
from stages.registry import Registry
from stages.training import measures, saves, watchdog
from tests.stage import ppo_runs, runs

seen: defaultdict[str, set[str]] = defaultdict(set)


def scored(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A scorer that takes down the phase that it is called in."""
    seen["scorer"].add(watchdog._now.phase)
    return ppo_runs.share_of_vowels(prompts, completions, **columns)


def observe(patch: pytest.MonkeyPatch, work: dict[str, tuple[Any, str]]) -> None:
    """Have each function take down the phase that it is called in."""
    seen.clear()
    watchdog.phase("load")
    for what, (place, name) in work.items():
        function = getattr(place, name)

        def observed(*arguments: Any, _what: str = what, _function: Any = function, **keywords: Any) -> Any:
            seen[_what].add(watchdog._now.phase)
            return _function(*arguments, **keywords)

        patch.setattr(place, name, observed)


def test_the_phases_of_sft(tmp_path, monkeypatch):
    from transformers import Trainer

    observe(monkeypatch, {
        "load": (models, "load_policy"), "data": (data, "encode_demonstrations"), "update": (Trainer, "training_step"), "eval": (measures, "tokens"),
        "save": (saves, "store"), "publish": (Registry, "publish"),
    })  # fmt: skip
    place = runs.workspace(tmp_path, rows=20)
    runs.run("sft", runs.settings(place, "sft", {"max_steps": 4, "eval_every": 2, "save_every": 3, "micro_batch_size": 2}))
    assert {what: phases for what, phases in seen.items()} == {what: {what} for what in ("load", "data", "update", "eval", "save", "publish")}


def test_the_phases_of_ppo(tmp_path, monkeypatch):
    observe(monkeypatch, {
        "load": (models, "load_policy"), "update": (ppo, "update_policy"), "eval": (watch.evaluation, "complete"),
        "save": (store.saves, "store"), "publish": (Registry, "publish"),
    })  # fmt: skip
    place = ppo_runs.workspace(tmp_path)
    seen.clear()
    scorers = [{"kind": "python", "function": "tests.stage.test_watchdog_phases:scored"}]
    engine = ppo.build_engine

    def watched(*arguments: Any) -> Any:
        built = engine(*arguments)
        observed = type(built).sample

        def sample(self: Any, *arguments: Any, **keywords: Any) -> Any:
            seen["rollout"].add(watchdog._now.phase)
            return observed(self, *arguments, **keywords)

        monkeypatch.setattr(type(built), "sample", sample)
        return built

    monkeypatch.setattr(ppo, "build_engine", watched)
    held_out = {"prompts": str(place / "held_out.jsonl")}
    ppo_runs.run(ppo_runs.settings(place, "phases", {"iterations": 2, "save_every": 1}, scorers=scorers, evaluation={"every": 1, **held_out}))
    expected = {what: {what} for what in ("load", "rollout", "update", "eval", "save", "publish")} | {"scorer": {"scoring", "eval"}}
    assert {what: phases for what, phases in seen.items()} == expected
