"""The study: optuna's journal file in the sweep's folder, mended after a kill, with what draws values and what ends trials early.

The journal is a file of JSON lines, each synced as it is written, so that it is safe on a shared file system, where SQLite is not. One sweep at
a time writes it (launch/sweep/run.py holds the folder's lock).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.schema.sweep import Range, Sweep
from launch.sweep.space import Field, combinations

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from launch.sweep.ended import Ended

JOURNAL, NAME = "study.jsonl", "sweep"
VOID = "void"  # attribute of the study: numbers of failed trials that count no more, for their values are tried again


def journal(output: Path) -> Path:
    """The study's file."""
    return output / JOURNAL


def mend(file: Path) -> None:
    """Cut off the line that a killed process left unfinished, and remove the lock that it held. Only for who holds the folder's lock.

    Optuna appends behind such a line and then reads neither.
    """
    for left in file.parent.glob(f"{file.name}.lock*"):
        left.unlink(missing_ok=True)
    if not file.exists():
        return
    content = file.read_bytes()
    end = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or not _is_json(line):
            break
        end += len(line)
    if end < len(content):
        with file.open("r+b") as stream:
            stream.truncate(end)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def storage(file: Path) -> Any:
    """Optuna's storage on a journal file."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file))))


def begin(output: Path, goal: str, about: Mapping[str, Any]) -> Study:
    """The folder's study, begun if there is none. `about`: what its trials have in common, which must be what it was begun with.

    Raises:
        UserError: the folder holds a sweep of something else.
    """
    import optuna

    file = journal(output)
    mend(file)
    with quiet():
        study = optuna.create_study(storage=storage(file), study_name=NAME, direction="minimize" if goal == "min" else "maximize", load_if_exists=True)
    before = study.user_attrs.get("about")
    if before is None:
        study.set_user_attr("about", dict(about))
    elif changed := [key for key in about if before.get(key) != json.loads(json.dumps(about[key]))]:
        raise UserError(
            f"{output}: holds a sweep that differs in {', '.join(changed)}; its trials can't be compared with new ones. "
            "Give this sweep a folder of its own with --output PATH, or delete that one"
        )
    return study


def there(output: Path) -> Study:
    """The study of a sweep that was begun, to look at.

    Raises:
        UserError: there is none.
    """
    import optuna

    file = journal(output)
    try:
        with quiet():
            return optuna.load_study(storage=storage(file) if file.is_file() else _absent(output), study_name=NAME)
    except KeyError:
        _absent(output)
        raise


def _absent(output: Path) -> Any:
    inner = output / "sweep"
    hint = f"; did you mean {inner}?" if journal(inner).is_file() else ""
    raise UserError(f"{output}: no sweep was begun here (no {JOURNAL}){hint}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without optuna's warnings about what is experimental in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sampler_of(kind: str, seed: int, number: int, trials: int, jobs: int) -> BaseSampler:
    """What draws the values of the trial with this number: seeded by both, so that a sweep that goes on does not repeat its first draws."""
    from numpy.random import SeedSequence
    from optuna.samplers import RandomSampler, TPESampler

    own = int(SeedSequence([abs(seed), number]).generate_state(1)[0])
    if kind != "tpe":
        return RandomSampler(seed=own)
    with quiet():
        return TPESampler(n_startup_trials=min(10, max(3, trials // 3)), seed=own, constant_liar=jobs > 1)


def pruner_of(kind: str, reduction: int) -> BasePruner:
    """What ends trials early; resources are counted in evaluations."""
    from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

    if kind == "halving":
        return SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction)
    return MedianPruner(n_startup_trials=3) if kind == "median" else NopPruner()


def enqueue(study: Study, fields: Sequence[Field], first: Mapping[str, Any] | None, grid: bool) -> None:
    """Before anything is drawn: the config's own values, and of a grid every combination. Nothing twice, however often it is called."""
    wanted = ([dict(first)] if first is not None else []) + (combinations(fields) if grid else [])
    for labels in wanted:
        with quiet():
            study.enqueue_trial(labels, skip_if_exists=True)


def draw(study: Study, fields: Sequence[Field]) -> Trial:
    """The next trial with its values, from the queue or the sampler."""
    with quiet():
        return _complete(study.ask(), fields)


def again(study: Study, trial: FrozenTrial, fields: Sequence[Field]) -> Trial:
    """A trial that a sweep began and did not finish, to go on with; values that it was killed before it had drawn are drawn now."""
    import optuna

    with quiet():
        return _complete(optuna.trial.Trial(study, trial._trial_id), fields)


def _complete(trial: Trial, fields: Sequence[Field]) -> Trial:
    for field in fields:
        if not isinstance(field.values, Range):
            trial.suggest_categorical(field.key, field.labels)
        elif field.whole:
            trial.suggest_int(field.key, int(field.values.low), int(field.values.high), log=field.values.log, step=int(field.values.step or 1))
        else:
            trial.suggest_float(field.key, float(field.values.low), float(field.values.high), log=field.values.log, step=field.values.step)
    return trial


def report(trial: Trial, series: Sequence[tuple[int, float]]) -> bool:
    """Tell the study of evaluations 1, 2 … that it does not know; whether the pruner wants the trial ended."""
    known = trial.storage.get_trial(trial._trial_id).intermediate_values
    asked = False
    for number, (_, value) in enumerate(series, 1):
        if number not in known:
            trial.report(value, number)
            with quiet():
                asked = trial.should_prune() or asked
    return asked


def counted(study: Study) -> list[FrozenTrial]:
    """The trials that were begun and count, in order."""
    from optuna.trial import TrialState

    void = set(study.user_attrs.get(VOID, []))
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING and trial.number not in void]


def twin_of(study: Study, params: Mapping[str, Any]) -> FrozenTrial | None:
    """A finished trial with the same values: the stages repeat themselves exactly, so that it need not run."""
    from optuna.trial import TrialState

    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return next((trial for trial in counted(study) if trial.state in done and trial.params == dict(params)), None)


def queued(study: Study) -> bool:
    """Whether trials wait in the queue."""
    from optuna.trial import TrialState

    return any(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def unfinished(study: Study) -> list[FrozenTrial]:
    """Trials that were begun and have not ended."""
    from optuna.trial import TrialState

    return [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]


def attributes(trial: Trial) -> dict[str, Any]:
    """What the study knows of a trial by now."""
    return dict(trial.storage.get_trial(trial._trial_id).user_attrs)


def tell(study: Study, trial: Trial, ended: Ended) -> None:
    """Record how a trial ended."""
    from optuna.trial import TrialState

    if ended.published:
        trial.set_user_attr("published", ended.published)
    if ended.error:
        trial.set_user_attr("error", ended.error)
    with quiet():
        if ended.state == "done":
            study.tell(trial, ended.value)
        else:
            study.tell(trial, state=TrialState.PRUNED if ended.state == "pruned" else TrialState.FAIL)


def best(study: Study) -> FrozenTrial | None:
    """The best trial that ran to its end; the first of equals. None while there is none."""
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    done = [trial for trial in counted(study) if trial.state == TrialState.COMPLETE]
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    return min(done, key=lambda trial: sign * (trial.value or 0.0), default=None)


def retry_failed(study: Study) -> None:
    """Queue the values of the trials that failed again; the failed ones count no more."""
    from optuna.trial import TrialState

    failed = [trial for trial in counted(study) if trial.state == TrialState.FAIL]
    study.set_user_attr(VOID, [*study.user_attrs.get(VOID, []), *(trial.number for trial in failed)])
    for trial in failed:
        with quiet():
            study.enqueue_trial(trial.params)


def preview(fields: Sequence[Field], first: Mapping[str, Any] | None, grid: bool, spec: Sweep, count: int) -> list[dict[str, Any]]:
    """The labels of the first trials, drawn as they will be, as far as no result is needed for that; nothing is kept."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    enqueue(study, fields, first, grid)
    found = []
    for _ in range(count):
        if grid and not queued(study):
            break
        study.sampler = sampler_of(spec.sampler, spec.seed, len(study.get_trials(deepcopy=False)), spec.trials, spec.jobs)
        found.append(dict(draw(study, fields).params))
    return found
