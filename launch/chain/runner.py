"""Goes through a chain's steps: decides, runs, records, and stops where one fails."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from configs.exit_codes import REQUEUE, USER_ERROR
from configs.presets import described
from launch.batches import batch_problem
from launch.chain.decide import Decider, Decision, check_files, read_attempt
from launch.chain.progress import Progress
from launch.chain.steps import Step, sections, steps_of
from launch.chain.team import Follower, Leader
from launch.command import Command, check_startable, load_machine, python_command, stage_command
from launch.meeting import connect, versions
from launch.nodes import Nodes, per_node
from launch.process import leaving_when_told, run_child
from launch.stage_cli import died_after_publishing
from stages.claim import Claim

if TYPE_CHECKING:
    from stages.registry import Checkpoint

CommandFor = Callable[[Step, Path, Any], Command]


def run_chain(
    chain_file: str, overrides: list[str], *, only: str | None = None, start: str | None = None,
    dry_run: bool = False, as_json: bool = False, command_for: CommandFor | None = None, nodes: Nodes | None = None,
    allow_changed: Sequence[str] = (),
) -> int:  # fmt: skip
    """Run (or with `dry_run` only show) the steps of a chain file; returns 0 or the exit code of the step that failed.

    `allow_changed`: what may have changed in a stage that was interrupted, which is then continued. `command_for` replaces the commands of the steps, for tests of the chain without its stages. With several `nodes`, each of them calls
    this; node 0 decides and the others follow.
    Raises UserError for a chain that cannot run, before any process is started.
    """
    from configs.allowed import chain_with_allowed
    from configs.load import load

    chain = chain_with_allowed(load(chain_file, "chain", overrides), allow_changed)
    steps = steps_of(chain, only, start)
    check_files(chain, steps)
    nodes = nodes or Nodes()
    command_for = command_for or partial(step_command, nodes=nodes)
    if nodes.rank and not dry_run:
        return Follower(nodes, connect(nodes, about(chain))[0], chain.output / "logs", quiet=as_json).run()
    plan = plan_of(chain, steps) if nodes.count == 1 or dry_run else []
    if dry_run:
        check_steps(chain, plan, nodes, starts=False)
        show_plan(chain, plan, command_for, as_json)
        return 0
    with Claim(chain.output, "align run") as lock, leaving_when_told():
        again = " ".join(["align run", chain_file, *overrides])
        team = Leader(nodes, connect(nodes, about(chain) if nodes.count > 1 else {}))
        code = 1
        try:
            plan = plan or plan_of(chain, steps)  # hashing data and models may take longer than the other nodes wait
            check_steps(chain, plan, nodes)
            code = Runner(chain, plan, command_for, lock, as_json, again, team).run()
        except UserError:
            code = 2
            raise
        except SystemExit:  # told to stop between two steps
            code = REQUEUE
            raise
        finally:
            team.close(code)
        return code


def about(chain: Any) -> dict[str, Any]:
    """What all nodes of a chain must have in common."""
    return {"chain": chain.model_dump(mode="json"), "versions": versions()}


def plan_of(chain: Any, steps: list[Step]) -> list[Decision]:
    """What every step would do now, each taking for granted that those before it succeed."""
    decider = Decider(chain)
    plan = []
    for step in steps:
        plan.append(decider.decide(step))
        decider.assume(plan[-1])
    return plan


def check_steps(chain: Any, plan: list[Decision], nodes: Nodes, *, starts: bool = True) -> None:
    """Make sure that every stage that is about to run can share its batches out, and (`starts`: this machine is to run it) has its devices.

    Asked before the first one starts: the last would say so hours later.

    Raises:
        UserError: with every batch that does not divide, or what the first machine file lacks.
    """
    problems: list[str] = []
    for decision in plan:
        name = decision.step.name
        if decision.step.kind != "stage" or decision.action == "skip":
            continue
        section = sections(chain)[name]
        machine = load_machine(section.machine, section.processes, nodes.count)
        processes = section.processes or machine.processes * nodes.count
        if (problem := batch_problem(decision.step.before, section.train, processes, f"{decision.step.before}.")) is not None:
            problems.append(problem)
        elif starts:
            check_startable(machine, per_node(processes, nodes.count))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def step_command(step: Step, file: Path, chain: Any, nodes: Nodes | None = None) -> Command:
    """The command of a step whose config has been written to `file`; a stage's is that of node 0 of `nodes`."""
    if step.kind == "prepare":
        return python_command("launch.prepare", str(file))
    section = sections(chain)[step.name] if step.kind == "stage" else chain
    machine = load_machine(section.machine, section.processes, nodes.count if nodes and step.kind == "stage" else 1)
    if step.kind == "eval":
        return python_command("stages.evaluation", "--config", str(file), use_cpu=machine.use_cpu)
    return stage_command(f"stages.{step.before}", file, machine, section.processes, nodes)


def config_file(decision: Decision, folder: Path | None = None) -> Path:
    """Where a step's resolved config is written: in its working folder, or in `folder` for a dry run."""
    step = decision.step
    if step.kind == "prepare":
        return (folder or Path(decision.config["record"]).parent) / f"{step.name}.json"
    return folder / f"{step.name}.yaml" if folder else decision.config.output / "config.yaml"


def write_config(decision: Decision, file: Path) -> None:
    """Write a step's resolved config."""
    from configs.load import save

    file.parent.mkdir(parents=True, exist_ok=True)
    if decision.step.kind == "prepare":
        file.write_text(json.dumps(decision.config, indent=1, default=str), encoding="utf-8")
    else:
        save(decision.config, file)


def show_plan(chain: Any, plan: list[Decision], command_for: CommandFor, as_json: bool) -> None:
    """Print what each step would do and its command; configs go to OUTPUT/plan, so that the commands can be typed."""
    rows = []
    for decision in plan:
        row = {"step": decision.step.name, "kind": decision.step.kind, "action": decision.action, "why": decision.why, "command": None}
        if decision.action != "skip":
            file = config_file(decision, chain.output / "plan")
            write_config(decision, file)
            row["command"] = command_for(decision.step, file, chain).typed
        rows.append(row)
    if as_json:
        print(json.dumps({"chain": chain.name, "output": str(chain.output), "steps": rows}, indent=1))
        return
    for number, row in enumerate(rows, 1):
        print(f"[{number}/{len(rows)}] {row['step']}: {row['action']} ({row['why']})")
        for line in described(chain) if row["step"] == "ppo" and row["command"] else []:
            print(f"    {line}")
        if row["command"]:
            print(f"    {row['command']}")


class Runner:
    """One `align run` under its lock."""

    def __init__(
        self, chain: Any, plan: list[Decision], command_for: CommandFor, lock: Claim, as_json: bool, again: str, team: Leader | None = None
    ) -> None:
        self.chain, self.plan, self.command_for, self.lock, self.again = chain, plan, command_for, lock, again
        self.as_json, self.told = as_json, False
        self.team = team or Leader(Nodes(), {})
        self.decider = Decider(chain)
        self.progress = Progress(chain.output / "chain.json", plan, sys.stderr if as_json else sys.stdout)

    def run(self) -> int:
        """Every step in order; 0, or the exit code of the one that failed."""
        from configs.load import save

        save(self.chain, self.chain.output / "chain.yaml")
        for number, planned in enumerate(self.plan):
            decision = self.decider.decide(planned.step)
            self.progress.header(number, decision)
            if decision.action == "skip":
                self.decider.done(decision.step, self.decider.resolve(decision.ref) if decision.ref else None)
                continue
            code = self._run_step(decision)
            if code:
                return code
            if self.told and number + 1 < len(self.plan):
                print(f"{decision.step.name} is done, and nothing else is begun, for the chain was told to stop; to continue: {self.again}", file=sys.stderr)
                return REQUEUE
        return self._finish()

    def _run_step(self, decision: Decision) -> int:
        step = decision.step
        folder = None if step.kind == "prepare" else decision.config.output
        if folder is not None:
            if step.kind == "stage":
                with Claim(folder, "align run", here_only=True):  # its processes claim it next; nobody may be at work in what is moved away here
                    pass
            begin_attempt(decision, folder, self.chain.output / "previous")
        file = config_file(decision)
        write_config(decision, file)
        command = self.command_for(step, file, self.chain)
        self.progress.say(f"    {command.typed}")
        log = self.chain.output / "logs" / f"{step.name}.log"
        env = command.environment(ALIGN_INPUTS_KEY=decision.key or "", ALIGN_RENDEZVOUS_TIMEOUT=str(self.team.nodes.timeout))
        before = {checkpoint.id for checkpoint in self._made(decision)} if step.kind == "stage" else set()
        if step.kind == "stage":
            self.team.start(step.name, file, decision.config, decision.key or "")
        with self.team.watching() if step.kind == "stage" else nullcontext():
            outcome = run_child(
                command.argv, env, log, prefix=step.name, to_stderr=self.as_json, on_line=self.progress.line, on_start=self.lock.record_child
            )  # fmt: skip
        if step.kind == "stage":
            self.team.ended(step.name)
        self.told = outcome.told
        made = self._made(decision) if step.kind == "stage" else []
        new = [checkpoint for checkpoint in made if checkpoint.id not in before]
        if outcome.died and new and not outcome.interrupted:
            print(died_after_publishing(step.name, new[-1].ref, log), file=sys.stderr)
        elif outcome.code or (outcome.interrupted and not outcome.told):
            return self._failed(step, outcome.code or 130, outcome.interrupted, log)
        checkpoint = self._published(decision, made, log) if step.kind == "stage" else None
        self.decider.done(step, checkpoint)
        if folder is not None:
            write_attempt(folder, decision, finished=True)
        self.progress.finished(step.name, outcome.seconds, checkpoint.ref if checkpoint else None)
        return 0

    def _failed(self, step: Step, code: int, interrupted: bool, log: Path) -> int:
        if interrupted:
            print(f"{step.name} was interrupted; to continue: {self.again}", file=sys.stderr)
        elif code == REQUEUE:
            print(f"{step.name} stopped because it was told to; its log: {log}; to continue: {self.again}", file=sys.stderr)
        elif code == USER_ERROR:  # the step has said what is wrong
            print(f"{step.name} did not finish, for the reason above; its log: {log}; to go on: {self.again}", file=sys.stderr)
        else:
            how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
            print(f"error: {step.name} {how}; its log: {log}; to continue once that is mended: {self.again}", file=sys.stderr)
        return code

    def _made(self, decision: Decision) -> list[Checkpoint]:
        """What has been published by this step from these inputs, oldest first."""
        registry = self.decider.registry()
        found = registry.list(stage=decision.step.before, name=sections(self.chain)[decision.step.name].name) if registry else []
        return [checkpoint for checkpoint in found if checkpoint.info("inputs_key") == decision.key]

    def _published(self, decision: Decision, made: list[Checkpoint], log: Path) -> Checkpoint:
        if not made:
            name = f"{decision.step.before}/{sections(self.chain)[decision.step.name].name}"
            raise UserError(f"{decision.step.name} ended without publishing {name} in {self.chain.registry}; its log: {log}")
        return made[-1]

    def _finish(self) -> int:
        from launch.chain.summary import finish

        report = finish(self.chain, self.decider, self.progress.total_seconds(), quiet=self.as_json)
        if self.as_json:
            print(json.dumps({"steps": self.progress.rows(), "summary": report}))
        return 0


def begin_attempt(decision: Decision, folder: Path, previous: Path) -> None:
    """Make the working folder ready: as it was for a continued step, else new; what an earlier run left is kept once, in `previous`."""
    if decision.action != "continue" and read_attempt(folder):
        import shutil

        old = previous / decision.step.name
        shutil.rmtree(old, ignore_errors=True)
        previous.mkdir(parents=True, exist_ok=True)
        os.replace(folder, old)
    folder.mkdir(parents=True, exist_ok=True)
    write_attempt(folder, decision, finished=False)


def write_attempt(folder: Path, decision: Decision, finished: bool) -> None:
    """Record in the working folder which inputs it is for."""
    part = folder / f".inputs.{os.getpid()}"
    content = {"key": decision.key, "parts": decision.parts, "finished": finished, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, folder / "inputs.json")


