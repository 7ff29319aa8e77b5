"""What each step of a chain would do now: run, continue or be skipped, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.errors import UserError
from configs.references import is_reference, pin, references
from launch.chain import inputs
from launch.chain.steps import STAGES, Step, evaluation_config, made_by, sections, stage_of
from launch.chain.uses import texts_in, uses

if TYPE_CHECKING:
    from stages.registry import Checkpoint, Registry

Action = Literal["run", "continue", "skip"]


@dataclass(frozen=True)
class Decision:
    """What a step does. `key` and `parts` identify its inputs (None while a step before it has to run first)."""

    step: Step
    action: Action
    why: str
    config: Any
    key: str | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    ref: str | None = None  # of a skipped stage: the checkpoint that stands in


class Decider:
    """Decides step after step; what a step led to is told by `done` (a real run) or `assume` (a dry run)."""

    def __init__(self, chain: Any) -> None:
        self.chain = chain
        self.output: Path = chain.output
        self.results: dict[str, Checkpoint] = {}
        self._pending: set[str] = set()  # stages and prepare steps that would run

    def registry(self) -> Registry | None:
        """The chain's registry, or None while there is none."""
        from stages.registry import Registry

        root = self.chain.registry
        return Registry(root, create=False) if (root / "registry.json").is_file() else None

    def decide(self, step: Step) -> Decision:
        """What `step` does now, given what the steps before it led to."""
        if step.kind == "prepare":
            return self._prepare(step)
        return self._eval(step) if step.kind == "eval" else self._stage(step)

    def done(self, step: Step, checkpoint: Checkpoint | None) -> None:
        """A step has run or was skipped; `checkpoint` is what a stage published."""
        if checkpoint is not None:
            self.results[step.name] = checkpoint

    def assume(self, decision: Decision) -> None:
        """In a dry run: the step would be run now, or its checkpoint stands."""
        step = decision.step
        if decision.action != "skip":
            self._pending.add(step.name)
        elif decision.ref is not None:
            self.results[step.name] = self.resolve(decision.ref)

    def resolve(self, ref: str) -> Checkpoint:
        """A checkpoint of the registry. Raises UserError when it is not there or damaged."""
        from stages.registry import Registry

        return (self.registry() or Registry(self.chain.registry)).resolve(ref)

    def checkpoint(self, ref: str) -> Checkpoint:
        """What a reference in a config means in this chain: of the chain's own stages, what this run made or found."""
        name = made_by(self.chain, ref)
        if name is None:
            return self.resolve(ref)
        if name not in self.results:  # not among the steps (--only): what is up to date, else the newest
            decision = self._stage(Step("stage", name, stage_of(name), "given"))
            self.results[name] = self.resolve(decision.ref or ref)
        return self.results[name]

    def _waits_for(self, refs: list[str], config: dict[str, Any]) -> str | None:
        """The name of a step that has to run before the inputs of this one are known."""
        return next((name for name in uses(self.chain, refs, config) if name in self._pending), None)

    def _stage(self, step: Step) -> Decision:
        section = sections(self.chain)[step.name]
        plain = section.model_dump(mode="json", by_alias=True)
        waits = self._waits_for(list(references(section).values()), plain)
        if waits:
            return Decision(step, "run", f"{waits} runs first", section)
        config, parts = self._inputs(section, f"stages.{step.before}")
        key = inputs.inputs_key(parts)
        attempt = read_attempt(config.output)
        same = attempt.get("key") == key
        allowed = bool(attempt) and bool(set(section.allow_changed) - {"split"})  # the stage compares, and refuses what is not allowed
        unfinished = (same or allowed) and not attempt.get("finished")
        published = self._published(step.before, section.name)
        matching = [c for c in published if c.info("inputs_key") == key]

        def decision(action: Action, why: str, ref: str | None = None) -> Decision:
            return Decision(step, action, why, config, key, parts, ref)

        if step.mode == "force":
            return decision("continue", "asked for, was interrupted") if unfinished else decision("run", "asked for")
        sound = next((c for c in reversed(matching) if not self._damaged(c)), None)
        if sound is not None:
            return decision("skip", f"{sound.ref} is published and its inputs are unchanged", sound.ref)
        changed = f"changed since the last run: {inputs.what_changed(attempt['parts'], parts)}" if attempt else "inputs unknown"
        if step.mode == "given" and published:
            return decision("skip", f"{published[-1].ref} is taken as it is ({changed})", published[-1].ref)
        if unfinished:
            return decision("continue", "was interrupted" if same else f"was interrupted; {changed}, and allow_changed is given")
        if matching:
            return decision("run", f"{matching[-1].ref} is damaged")
        return decision("run", changed if attempt.get("key") not in (None, key) else "not published yet")

    def _inputs(self, section: Any, module: str) -> tuple[Any, dict[str, Any]]:
        """The config with its parents pinned, and the digests of all that the result depends on."""
        parents = {role: self.checkpoint(ref) for role, ref in references(section).items()}
        config = pin(section, lambda ref: self.checkpoint(ref).ref)
        plain = inputs.without_ignored(section.model_dump(mode="json", by_alias=True))
        return config, {
            "config": inputs.digest(plain),
            "parents": {role: parent.manifest_hash for role, parent in parents.items()},
            "data": inputs.data_digest(plain),
            "code": inputs.code_digest(module),
        }

    def _published(self, stage: str, name: str) -> list[Checkpoint]:
        registry = self.registry()
        return registry.list(stage=stage, name=name) if registry else []

    def _damaged(self, checkpoint: Checkpoint) -> bool:
        registry = self.registry()
        return registry is None or bool(registry.verify(checkpoint.id))

    def _eval(self, step: Step) -> Decision:
        section = evaluation_config(self.chain, self.output / "eval")
        plain = section.model_dump(mode="json", by_alias=True)
        waits = self._waits_for(list(references(section).values()), {**plain, "init_from": self.chain.base})
        if waits:
            return Decision(step, "run", f"{waits} runs first", section)
        missing = [s for s in STAGES if f"checkpoints.{s}" in references(section) and not self._there(s)]
        if missing:  # --only eval before every stage has run: measure those that exist
            kept = {label: ref for label, ref in section.checkpoints.items() if label not in missing}
            against = "sft" if "sft" in kept else "base"
            section = section.model_copy(update={"checkpoints": kept, "against": against, "reference": against})
        config, parts = self._inputs(section, "stages.evaluation")
        parts["data"] = inputs.digest([parts["data"], inputs.path_digest(Path(self.chain.base))])
        key = inputs.inputs_key(parts)
        attempt = read_attempt(config.output)
        if step.mode != "force" and attempt.get("key") == key and attempt.get("finished") and (config.output / "results.json").is_file():
            return Decision(step, "skip", "its results are there and its inputs are unchanged", config, key, parts)
        changed = attempt.get("key") not in (None, key)
        why = "asked for" if step.mode == "force" else f"changed: {inputs.what_changed(attempt['parts'], parts)}" if changed else "no results yet"
        return Decision(step, "run", why, config, key, parts)

    def _there(self, stage: str) -> bool:
        return stage in self.results or bool(self._published(stage, getattr(self.chain, stage).name))

    def _prepare(self, step: Step) -> Decision:
        spec = self.chain.prepare[step.name]
        writes = [str(path) for path in spec.writes]
        refs = sorted({text for text in texts_in(spec.arguments) if is_reference(text)})
        record = self.output / "prepare" / f"{step.name}.done.json"
        config = {"run": spec.run, "with": spec.arguments, "writes": writes, "key": None, "record": str(record)}
        waits = self._waits_for(refs, config)
        if waits:
            return Decision(step, "run", f"{waits} runs first", config)
        if step.mode == "given" and all(Path(path).exists() for path in writes):
            return Decision(step, "skip", "its files are taken as they are", config)
        parts = {
            "config": inputs.digest([spec.run, spec.arguments, writes]),
            "parents": {ref: self.checkpoint(ref).manifest_hash for ref in refs},
            "data": inputs.digest([[text, inputs.path_digest(Path(text))] for text in self._read_by(spec.arguments, writes)]),
            "code": inputs.code_digest(spec.run.partition(":")[0]),
        }
        key = inputs.inputs_key(parts)
        config.update({"key": key, "parts": parts, "with": _replace(spec.arguments, {ref: self.checkpoint(ref).ref for ref in refs})})
        before = read_json(record)
        if before.get("key") != key:
            changed = f"changed: {inputs.what_changed(before.get('parts', {}), parts)}" if before else "has not run yet"
            return Decision(step, "run", changed, config, key, parts)
        touched = [path for path, digest in before["writes"].items() if inputs.path_digest(Path(path)) != digest]
        if touched:
            return Decision(step, "run", f"{', '.join(touched)} is missing or was changed", config, key, parts)
        return Decision(step, "skip", "its files are there and its inputs are unchanged", config, key, parts)

    def _read_by(self, arguments: dict[str, Any], writes: list[str]) -> list[str]:
        """Arguments that name a file or a model folder that exists and that the step does not itself write."""
        texts = [text for text in texts_in(arguments) if text not in writes and len(text) < 4096]
        return [text for text in texts if Path(text).is_file() or (Path(text) / "config.json").is_file()]


def read_attempt(folder: Path) -> dict[str, Any]:
    """What was last started in a step's working folder: {"key", "parts", "finished", "ref"}; {} for nothing."""
    return read_json(folder / "inputs.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none or it is damaged, which makes its step run again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _replace(value: Any, by: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replace(inner, by) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replace(inner, by) for inner in value]
    return by.get(value, value) if isinstance(value, str) else value


def check_files(chain: Any, steps: list[Step]) -> None:
    """Raise UserError naming every data file that neither exists nor is written by a prepare step of these steps."""
    written = [path for step in steps if step.kind == "prepare" for path in chain.prepare[step.name].writes]
    problems = []
    for step in steps:
        if step.kind == "prepare":
            continue
        owner = chain.eval if step.kind == "eval" else sections(chain)[step.name]
        section = owner.model_dump(mode="json", by_alias=True)
        for text in inputs.named(section, {"path", "test_prompts", "plain_text"}):
            path = Path(text)
            if not (text.startswith("hf:") or path.exists() or any(path == w or w in path.parents for w in written)):
                problems.append(f"{step.name}: {text} does not exist, and no prepare step writes it")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)) + f"\nRelative paths start at {Path.cwd()}")
