"""Everything about a sweep that is decided, and checked, before its first process starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import UserError
from configs.load import load
from configs.schema.chain import STAGES
from configs.schema.sweep import Range, Sweep
from launch.chain import inputs
from launch.chain.decide import check_files
from launch.chain.steps import steps_of
from launch.sweep.evaluations import spread
from launch.sweep.held_out import evaluated_on, untested
from launch.sweep.metric import Metric, metric_of, why_own
from launch.sweep.parts import Parts, excerpt, outside, parts_of, section_of
from launch.sweep.slots import check_batches, places
from launch.sweep.space import WIDTH, Field, combinations, fields_of, override
from launch.sweep.subject import Subject

Values = list[tuple[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A sweep that can begin. `rename`: what its checkpoints are called where they go to a registry that is not the sweep's own."""

    subject: Subject
    spec: Sweep
    fields: tuple[Field, ...]
    metric: Metric
    parts: Parts
    output: Path
    registry: Path
    rename: str | None
    environments: tuple[dict[str, str], ...]
    notes: tuple[str, ...]

    @property
    def grid(self) -> bool:
        """Whether every combination is tried."""
        return self.spec.sampler == "grid"

    def chain(self, values: Values) -> Any:
        """The whole chain with these values; what is not moved to a trial's folder lies in OUTPUT/shared."""
        return self.subject.chain(values, [("output", str(self.output / "shared")), ("registry", str(self.registry))])

    def shared_chain(self) -> Any:
        """What all trials share, made once."""
        return excerpt(self.chain([]), self.parts.shared, self.output / "shared", rename=self.rename)

    def trial_chain(self, values: Values, number: int) -> Any:
        """The chain of one trial.

        Raises:
            UserError: with everything that is wrong with it.
        """
        whole = untested(self.chain(values), self.parts.own)
        shared_files = self.parts.shared & set(whole.prepare)
        chain = excerpt(whole, self.parts.needed - shared_files, self.folder(number), self.parts.own & set(whole.prepare), self.rename)
        check_batches(chain, self.environments[0])
        return chain

    def folder(self, number: int) -> Path:
        """Where a trial works."""
        return self.output / "trials" / f"{number:04d}"

    def values(self, labels: Mapping[str, Any]) -> Values:
        """What the study keeps of a trial, as keys and values of the config."""
        return [(field.key, field.value_of(labels[field.key])) for field in self.fields]

    def extra(self, values: Values) -> Values:
        """Keys that no one swept but that every trial needs: how often it is evaluated."""
        return spread(self.chain(values), self.metric, self.spec) if self.spec.pruner != "none" else []

    def first(self) -> dict[str, Any] | None:
        """The labels of the config's own values; None where the space does not hold them."""
        found = {field.key: field.label_of(self.subject.configured(field.key)) for field in self.fields}
        return None if any(label is None for label in found.values()) else {key: label[0] for key, label in found.items() if label is not None}

    def about(self) -> dict[str, Any]:
        """What the trials of one study have in common, so that they can be compared."""
        chain = self.chain([])
        plain = chain.model_dump(mode="json", by_alias=True, exclude={"sweep"})
        written = [path for spec in chain.prepare.values() for path in spec.writes]
        files = [text for text in inputs.named(plain, inputs.FILE_KEYS) if Path(text).exists()]
        files = [text for text in files if not any(Path(text) == path or path in Path(text).parents for path in written)]
        data = inputs.digest([[text, inputs.path_digest(Path(text))] for text in sorted(set(files))])
        space = {field.key: [str(field), field.whole] for field in self.fields}
        kept = {key: value for key, value in plain.items() if key not in ("machine", "processes")}
        for stage in STAGES:
            kept[stage] = inputs.without_ignored(kept[stage]) if kept[stage] else None
        evaluated = {"evaluated": "held out"} if self.metric.stage == "eval" else {}  # an older sweep's trials were evaluated on the test part
        return evaluated | {"config": inputs.digest(kept), "data": data, "space": space, "metric": [self.metric.name, self.metric.stage, self.metric.goal], "evaluations": self.spec.evaluations}


def setting_of(subject: Subject, asked: Mapping[str, Any], sweep_file: str | None = None) -> Setting:
    """What is to be swept. `asked`: keys of the command line, which win over those of the chain's `sweep:` section or of `sweep_file`.

    Raises:
        UserError: with what is wrong with the chain, the space, the metric or the machine.
    """
    base = subject.chain()
    spec = _spec(subject, base, asked, sweep_file)
    notes: list[str] = []
    if not spec.space:
        spec = spec.model_copy(update={"space": _default_space(base, spec)})
        key, found = next(iter(spec.space.items()))
        assert isinstance(found, Range)
        notes.append(f"no space was given: {key} is tried from {found.low:.3g} to {found.high:.3g}, log-uniform around the config's {found.low * WIDTH:.3g}")
    spec = spec.model_copy(update={"space": {subject.key(key): values for key, values in spec.space.items()}})
    fields = tuple(fields_of(spec.space, subject.model()))
    _check_values(subject, fields)
    swept = [section for field in fields if (section := section_of(field.key))]
    metric = metric_of(base, spec.metric, spec.stage, spec.goal, swept)
    if spec.metric is None:
        notes.append(why_own(base, metric))
    if spec.pruner != "none" and not metric.reported:
        notes.append(f"{metric.name} is known at the end of a trial only: none is ended early")
    output = spec.output or base.output / "sweep"
    foreign = outside(base)
    parts = parts_of(base, [field.key for field in fields], metric.stage)
    if not parts.own:
        raise UserError(f"space: nothing that {metric.name} is measured on depends on {', '.join(field.key for field in fields)}; sweep fields of {metric.stage}, or of what it is made from")
    if metric.stage == "eval":
        notes.append(f"trials are evaluated on {evaluated_on(base)[2]}: the test part is never to choose by; that of the chain itself stays as it is")
    registry = base.registry if foreign else output / "registry"
    if foreign:
        notes.append(f"trials are published in {registry} as {base.name}-sweep, because {', '.join(foreign)} lies there")
    setting = Setting(subject, spec, fields, metric, parts, output, registry, f"{base.name}-sweep" if foreign else None, (), tuple(notes))
    return _ready(setting)


def _ready(setting: Setting) -> Setting:
    """With the places that trials run in, once every end and combination of the space that can be known has been checked."""
    chain = setting.chain([])
    needed = excerpt(chain, setting.parts.needed, setting.output / "shared")
    check_files(needed, steps_of(needed))
    found = replace(setting, environments=tuple(places(needed, setting.spec.jobs)))
    candidates = combinations(found.fields) if found.grid else []
    for labels in candidates:
        found.trial_chain(found.values(labels), 0)
    for field in found.fields:
        for value in field.ends():
            found.trial_chain([(field.key, value)], 0)
    if found.first() is None:
        outside_of = [field.key for field in found.fields if field.label_of(found.subject.configured(field.key)) is None]
        return replace(found, notes=(*found.notes, f"the config's own {', '.join(outside_of)} is not in the space, so that it is not tried"))
    return found


def _spec(subject: Subject, base: Any, asked: Mapping[str, Any], sweep_file: str | None) -> Sweep:
    given = load(sweep_file, "sweep") if sweep_file else (base.sweep or Sweep())
    told = {key: value for key, value in asked.items() if value is not None}
    try:
        return Sweep(**{name: getattr(given, name) for name in Sweep.model_fields} | told)
    except ValidationError as error:
        problems = [f"--{'.'.join(map(str, problem['loc']))}: found {problem['input']!r}; {problem['msg']}" for problem in error.errors()]
        raise UserError("\n".join(problems)) from error


def _default_space(base: Any, spec: Sweep) -> dict[str, Range | list[Any]]:
    """The learning rate of the first stage that trains, or of the one that the metric is of, around what the config says."""
    present = [stage for stage in STAGES if getattr(base, stage) is not None]
    told = (spec.metric or "").partition("/")[0]
    stage = next((each for each in (spec.stage, told) if each in present), present[0])
    rate = getattr(base, str(stage)).train.learning_rate
    return {f"{stage}.train.learning_rate": Range(low=rate / WIDTH, high=rate * WIDTH, log=True)}


def _check_values(subject: Subject, fields: Sequence[Field]) -> None:
    """Every end of a range and every value of a list, each alone, in the config.

    Raises:
        UserError: with what the schema says of those that it refuses: unknown keys, values out of a field's range.
    """
    problems: dict[str, str] = {}  # what is wrong, without the value that shows it -> the line
    for field in fields:
        for value in field.ends():
            try:
                subject.config([(field.key, value)])
            except UserError as error:
                for line in str(error).splitlines():
                    problems.setdefault(line.partition(f"{override(field.key, value)}: ")[2] or line, line)
    if problems:
        raise UserError("\n".join(problems.values()))


def overrides_of(values: Values) -> str:
    """Values as a person types them."""
    return " ".join(override(key, value) for key, value in values)

