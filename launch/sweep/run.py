"""Goes through the trials: begins them, ends early those that are bad, records how each one ended, and goes on where a sweep was stopped."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.exit_codes import REQUEUE
from launch.process import FORWARDED
from launch.sweep import clean, jobs, results, study
from launch.sweep.ended import Ended, how
from launch.sweep.setting import Setting, overrides_of
from launch.sweep.space import size
from stages.claim import Claim

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

POLL = 0.25  # seconds between two looks at the trials
INTERRUPTED = 128 + signal.SIGINT


def run_sweep(setting: Setting, *, again: str, retry_failed: bool = False, as_json: bool = False, command: Sequence[str] = jobs.RUN) -> int:
    """Run a sweep, or go on with it; 0, or REQUEUE or 130 where it was told to stop. `again`: the command that goes on with it.

    Raises:
        UserError: the folder is in use, holds another sweep, or can't be written; what all trials share fails; the first trials fail alike.
    """
    with Claim(setting.output, "align sweep"):
        sweep = Running(setting, again, as_json, command)
        try:
            with sweep.listening():
                return sweep.run(retry_failed)
        except OSError as error:
            raise UserError(f"{setting.output} can't be written: {error.strerror or error}; the trials so far are kept; make room, then go on with: {again}") from error
        finally:
            sweep.end_all()


class Running:
    """One `align sweep` under its lock."""

    def __init__(self, setting: Setting, again: str, as_json: bool, command: Sequence[str]) -> None:
        self.setting, self.again, self.command = setting, again, command
        self.out = sys.stderr if as_json else sys.stdout
        self.study = study.begin(setting.output, setting.metric.goal, setting.about())
        self.study.set_user_attr("shown", results.shown(setting))
        self.running: list[jobs.Job] = []
        self.waiting: list[Trial] = []
        self.received: list[int] = []
        self.stopping: str | None = None  # why no further trial is begun
        self.errors: list[str] = []  # of the trials of this start that failed before any came to something
        self.seen: dict[str, int] = {}  # bytes of a trial's metrics when they were last read
        self.began = time.monotonic()

    def run(self, retry_failed: bool) -> int:
        """All trials; the exit code."""
        self._share()
        if not self.received:
            self._recover(retry_failed)
        while True:
            self._listen()
            while self._begin():
                pass
            for job in list(self.running):
                self._look(job)
            if not self.running and not self._more():
                break
            time.sleep(POLL)
        if self.stopping:
            raise UserError(self.stopping)
        if self.received:
            return self._interrupted()
        for trial in study.counted(self.study):
            if trial.state.name == "PRUNED":  # until now another trial with the same values before this stage could go on from them
                clean.drop_made(self.setting.folder(trial.number), self.setting.registry)
        return 0

    def say(self, text: str) -> None:
        """One line for a person; a reader that has gone stops nothing."""
        with suppress(BrokenPipeError):
            print(text, file=self.out, flush=True)

    # ---- what is begun

    def _share(self) -> None:
        """Make, once, what no trial makes itself."""
        setting = self.setting
        if not setting.parts.shared or self.study.user_attrs.get("shared"):
            return
        from configs.load import save

        folder = setting.output / "shared"
        save(setting.shared_chain(), folder / "chain.yaml")
        self.say(f"shared by all trials, made once: {', '.join(sorted(setting.parts.shared))}; log: {folder / 'log'}")
        job = jobs.start("shared", [*self.command, str(folder / "chain.yaml"), "--json"], setting.environments[0], folder / "log", 0)
        self.running.append(job)
        while (code := job.code()) is None:
            self._listen()
            job.hurry()
            time.sleep(POLL)
        self.running.remove(job)
        if self.received or code in (REQUEUE, INTERRUPTED):
            self.received = self.received or [signal.SIGTERM]
        elif code:
            raise UserError(f"what all trials share ({', '.join(sorted(setting.parts.shared))}) failed: {jobs.error_in(job.log, code)}; its log: {job.log}; to go on: {self.again}")
        else:
            self.study.set_user_attr("shared", True)

    def _recover(self, retry_failed: bool) -> None:
        """Take up what the last start left: trials to continue, or to record as ended; queue what comes first."""
        if retry_failed:
            study.retry_failed(self.study)
        study.enqueue(self.study, self.setting.fields, self.setting.first(), self.setting.grid)
        for trial in study.unfinished(self.study):
            taken = study.again(self.study, trial, self.setting.fields)
            if trial.user_attrs.get("ended_early"):
                self._record(taken, Ended("pruned"))
            else:
                self.waiting.append(taken)

    def _more(self) -> bool:
        """Whether another trial may be begun."""
        if self.stopping or self.received:
            return False
        if self.waiting:
            return True
        if self.setting.spec.timeout is not None and time.monotonic() - self.began > 60 * self.setting.spec.timeout:
            return False
        if self.setting.grid:
            return study.queued(self.study)
        done = study.counted(self.study)
        combinations = size(self.setting.fields)
        whole = combinations is not None and len({tuple(sorted(trial.params.items(), key=str)) for trial in done}) >= combinations
        return len(done) < self.setting.spec.trials and not whole

    def _begin(self) -> bool:
        """Begin one trial where there is a place and one is due; whether there may be another."""
        busy = {job.place for job in self.running}
        free = [place for place in range(self.setting.spec.jobs) if place not in busy]
        if not free or not self._more():
            return False
        if self.waiting and clean.is_left(self.setting.folder(self.waiting[0].number)):
            return False  # several processes of a killed sweep save before they leave
        trial = self.waiting.pop(0) if self.waiting else self._drawn()
        folder = self.setting.folder(trial.number)
        trial.set_user_attr("values", dict(self.setting.values(trial.params)))
        if not (folder / "chain.yaml").is_file():  # a trial that goes on keeps the chain that it began with
            twin = study.twin_of(self.study, trial.params)
            if twin is not None:
                trial.set_user_attr("same_as", twin.number)
                self._record(trial, Ended("done", value=twin.value) if twin.state.name == "COMPLETE" else Ended("pruned"))
                return True
            try:
                self._write_chain(trial)
            except UserError as error:
                self._record(trial, Ended("failed", error=str(error)))
                return True
        command = [*self.command, str(folder / "chain.yaml"), "--json"]
        job = jobs.start(f"trial {trial.number}", command, self.setting.environments[free[0]], folder / "log", free[0], trial)
        self.running.append(job)
        self.say(f"{self._number(trial)}: {self._values(trial)}; log: {folder / 'log'}")
        return True

    def _drawn(self) -> Trial:
        spec = self.setting.spec
        number = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = study.sampler_of(spec.sampler, spec.seed, number, spec.trials, spec.jobs)
        self.study.pruner = study.pruner_of(spec.pruner, spec.reduction)
        return study.draw(self.study, self.setting.fields)

    def _write_chain(self, trial: Trial) -> None:
        from configs.load import save

        values = self.setting.values(trial.params)
        extra = self.setting.extra(values)
        trial.set_user_attr("extra", [list(pair) for pair in extra])
        save(self.setting.trial_chain([*values, *extra], trial.number), self.setting.folder(trial.number) / "chain.yaml")

    # ---- what is running

    def _look(self, job: jobs.Job) -> None:
        """End a trial early where the pruner says so; record one that has ended."""
        code = job.code()
        if code is not None:
            self.running.remove(job)
            self._ended(job, code)
        elif job.told is not None:
            job.hurry()
        elif self.setting.metric.reported and self._report(job) and not self.stopping and not jobs.at_its_end(job.log):
            job.trial.set_user_attr("ended_early", True)
            self.say(f"{self._number(job.trial)}: ended early, after {len(self._series(job))} evaluation(s)")
            job.tell()

    def _report(self, job: jobs.Job) -> bool:
        file = self.setting.folder(job.trial.number) / self.setting.metric.stage / "metrics.jsonl"
        bytes_now = file.stat().st_size if file.exists() else 0
        if self.seen.get(job.name) == bytes_now:
            return False
        self.seen[job.name] = bytes_now
        return study.report(job.trial, self._series(job))

    def _series(self, job: jobs.Job) -> list[tuple[int, float]]:
        return self.setting.metric.series(self.setting.folder(job.trial.number))

    def _ended(self, job: jobs.Job, code: int) -> None:
        trial, metric = job.trial, self.setting.metric
        if metric.reported:
            study.report(trial, self._series(job))
        attributes = study.attributes(trial)
        trial.set_user_attr("seconds", round(attributes.get("seconds", 0.0) + job.seconds, 1))
        ended = how(job, code, metric, self.setting.folder(trial.number), self.setting.registry, early=bool(attributes.get("ended_early")))
        if ended.state == "interrupted" or (self.received and ended.state == "failed"):
            if not self.stopping:
                self.received = self.received or [signal.SIGTERM]
            return  # it goes on with the next start
        if ended.state == "no room":
            self.stopping = f"{ended.error}; the trials so far are kept; make room, then go on with: {self.again}"
            return
        self._record(trial, ended)

    def _record(self, trial: Trial, ended: Ended) -> None:
        """How a trial ended, in the study, on the screen and on the disk."""
        study.tell(self.study, trial, ended)
        folder = self.setting.folder(trial.number)
        clean.drop_state(folder)
        if ended.state == "failed":
            self.say(f"{self._number(trial)}: failed: {ended.error}; log: {folder / 'log'}")
            self._give_up(ended.error, folder)
        elif ended.state == "done":
            assert ended.value is not None
            self.errors.clear()
            same = study.attributes(trial).get("same_as")
            best = study.best(self.study)
            told = f"as trial {same}, with the same values" if same is not None else "the best so far" if best is not None and best.number == trial.number else f"best so far {best.value:.6g}" if best and best.value is not None else ""
            self.say(f"{self._number(trial)}: {self.setting.metric.name} {ended.value:.6g} ({told})")
        else:
            self.errors.clear()
        if self.setting.spec.keep is not None:
            clean.drop_checkpoints(self.setting.registry, results.beyond(self.study, self.setting.spec.keep))
        results.write(self.study, self.setting)

    def _give_up(self, error: str, folder: Any) -> None:
        k = self.setting.spec.give_up
        self.errors.append(error)
        came_to_something = any(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.counted(self.study))
        if not came_to_something and len(self.errors) >= k and jobs.alike(self.errors[-k:]):
            self.stopping = f"{error}\nThe first {k} trials failed alike, so that no other was begun; a log: {folder / 'log'}; once that is mended: {self.again} --retry-failed"

    # ---- how it ends

    def _interrupted(self) -> int:
        self.say(f"the sweep was told to stop; {len(study.unfinished(self.study))} trial(s) are saved and go on; to continue: {self.again}")
        return INTERRUPTED if signal.SIGINT in self.received else REQUEUE

    def _listen(self) -> None:
        """Pass on, once, that we were told to stop; a second Ctrl-C ends everything."""
        if self.received.count(signal.SIGINT) > 1:
            self.end_all()
        if self.received or self.stopping:
            for job in self.running:
                job.tell()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are remembered and acted upon in the loop."""
        handler: Callable[..., None] = lambda number, frame: self.received.append(number)  # noqa: E731
        before = {number: signal.signal(number, handler) for number in FORWARDED}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def end_all(self) -> None:
        """No process outlives the sweep."""
        for job in self.running:
            job.kill()

    def _number(self, trial: Trial | FrozenTrial) -> str:
        total = len(self.study.get_trials(deepcopy=False)) if self.setting.grid else self.setting.spec.trials
        return f"[trial {trial.number}, {len([t for t in study.counted(self.study) if t.state.is_finished()])} of {total} done]"

    def _values(self, trial: Trial) -> str:
        own = "the config's own values: " if trial.number == 0 and self.setting.first() is not None else ""
        return own + overrides_of(self.setting.values(trial.params))

