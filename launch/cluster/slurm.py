"""The sbatch scripts of a chain: one job per stage, each after the one before, or one job for all; and submit.sh."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import UserError
from configs.exit_codes import HANG, REQUEUE, USER_ERROR
from launch.cluster.job import Job, quote

MEETING = ' --node-rank "$SLURM_NODEID" --main-address "$MASTER_ADDR" --main-port "$MASTER_PORT"'
EVAL_CPUS = 8  # cores of the evaluation's one process, where the node's are not known
HANGS = 3  # that a job is requeued after: a machine or a network that is at fault may be another one next time
SAVING_SECONDS = 30  # what requeuing itself takes, of the time between the warning and the limit


@dataclass(frozen=True)
class Slurm:
    """What `align slurm` is asked for beside the chain: sbatch's own options, and how the jobs run."""

    one_job: bool = False
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mail: str | None = None
    cpus_per_node: int | None = None
    container: str | None = None
    signal_before: int = 300
    max_requeues: int = 50
    network_interface: str | None = None
    log_dir: Path | None = None
    activate: str | None = None
    setup: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise UserError for what sbatch would refuse, or read as two words."""
        for name in ("partition", "account", "qos", "mail", "time", "network_interface"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:@+=/^-]+", value):
                raise UserError(f"--{name.replace('_', '-')} {value!r}: found a character that an sbatch option does not take")
        if self.signal_before < 2 * SAVING_SECONDS:
            raise UserError(f"--signal-before {self.signal_before}: expected {2 * SAVING_SECONDS} seconds or more, in which the stage saves and the job is requeued")


def slurm_files(job: Job, slurm: Slurm) -> dict[Path, str]:
    """Every file of the job: path -> text."""
    slurm.check()
    names = [None] if slurm.one_job else list(job.stages)
    scripts = {job.folder / f"{stage or 'chain'}.sbatch": sbatch_script(job, slurm, stage) for stage in names}
    return {**job.files(), **scripts, job.folder / "submit.sh": submit_script(job, slurm, [path.name for path in scripts])}


def log_folder(job: Job, slurm: Slurm) -> Path:
    """Where the jobs' logs go, absolute."""
    return (job.workdir / slurm.log_dir) if slurm.log_dir else job.folder / "logs"


def sbatch_script(job: Job, slurm: Slurm, stage: str | None) -> str:
    """One job's script: `stage`, or the whole chain for None. The evaluation is one process: its job has one node, and a GPU's share of that."""
    if stage == "eval":
        share = slurm.cpus_per_node // max(1, job.gpus_per_node) if slurm.cpus_per_node else EVAL_CPUS
        slurm = replace(slurm, cpus_per_node=max(1, share))
        job = replace(job, nodes=1, gpus_per_node=min(1, job.gpus_per_node), machine={})
    what = f"stage {stage} of chain {job.chain.name}" if stage else f"chain {job.chain.name}: {', '.join(job.stages)}"
    values = {
        "WHAT": what, "SIZE": f"{job.nodes} node(s) x {job.per_node} process(es)", "HEADER": header(job, slurm, stage),
        "CHAIN_FILE": quote(job.chain_file), "OUTPUT": quote(job.chain.output), "REGISTRY": quote(job.chain.registry), "FOLDER": quote(job.folder),
        "LOGS": quote(log_folder(job, slurm)), "ENVIRONMENT": environment(slurm), "NETWORK": network(slurm), "CONTAINER": container(job, slurm),
        "LAUNCH": job.launch("K", "MASTER_ADDR", "MASTER_PORT"), "MEETING": MEETING if job.nodes > 1 else "",
        "ONLY": f"--only {stage} " if stage else "", "REQUEUE": str(REQUEUE), "HANG": str(HANG), "HANGS": str(HANGS), "USER_ERROR": str(USER_ERROR),
        "MAX": str(slurm.max_requeues), "DEADLINE": str(slurm.signal_before - SAVING_SECONDS), "BEFORE": str(slurm.signal_before),
    }  # fmt: skip
    return fill(SCRIPT, values)


def fill(template: str, values: dict[str, str]) -> str:
    """The template with every @NAME@ replaced; further lines of a value are indented as its first."""
    lines = []
    for line in template.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines.append(re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]].replace("\n", f"\n{indent}"), line))  # noqa: B023  (called at once)
    return "\n".join(lines) + "\n"


def header(job: Job, slurm: Slurm, stage: str | None) -> str:
    """The #SBATCH lines."""
    options = {
        "job-name": f"{job.chain.name}-{stage or 'chain'}", "nodes": job.nodes, "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node or None, "cpus-per-task": slurm.cpus_per_node, "time": slurm.time, "partition": slurm.partition,
        "account": slurm.account, "qos": slurm.qos, "mail-user": slurm.mail, "mail-type": "END,FAIL,REQUEUE" if slurm.mail else None,
        "chdir": quote(job.workdir), "output": quote(log_folder(job, slurm) / "%x-%j.out"), "signal": f"B:USR1@{slurm.signal_before}",
    }  # fmt: skip
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    whole = [] if slurm.cpus_per_node else ["#SBATCH --exclusive", "#SBATCH --mem=0"]
    return "\n".join([*lines, *whole, "#SBATCH --open-mode=append", "#SBATCH --requeue"])


def environment(slurm: Slurm) -> str:
    """The lines that make `python` the project's, in the batch script and on every node."""
    lines = list(slurm.setup)
    if slurm.activate and not slurm.container:
        lines.append(f"source {quote(slurm.activate)}")
    return "\n".join(lines) or "# python is the one on PATH"


def network(slurm: Slurm) -> str:
    """The interface that NCCL and gloo meet on."""
    if slurm.network_interface:
        name = quote(slurm.network_interface)
        return f"export NCCL_SOCKET_IFNAME={name}\nexport GLOO_SOCKET_IFNAME={name}"
    return "# export NCCL_SOCKET_IFNAME=ib0\n# export GLOO_SOCKET_IFNAME=ib0"


def container(job: Job, slurm: Slurm) -> str:
    """Words before `bash` on a node: nothing, Apptainer for an image file, or srun's options of the pyxis plugin."""
    if slurm.container is None:
        return "container=() image=()"
    folders = dict.fromkeys(str(path) for path in (job.workdir, job.chain.output, job.chain.registry, job.folder, log_folder(job, slurm)))
    if slurm.container.endswith(".sif"):
        gpus = "--nv " if job.gpus_per_node else ""
        return f"container=() image=(apptainer exec {gpus}{' '.join(f'--bind {quote(path)}' for path in folders)} {quote(slurm.container)})"
    mounts = ",".join(f"{path}:{path}" for path in folders)
    return f"container=({quote(f'--container-image={slurm.container}')} {quote(f'--container-mounts={mounts}')}) image=()"


def submit_script(job: Job, slurm: Slurm, scripts: list[str]) -> str:
    """submit.sh: every script after the one before it has succeeded; what stands on its command line goes to each sbatch."""
    lines = [
        "#!/usr/bin/env bash",
        f"# Submits chain {job.chain.name}: {', '.join(scripts)}. Written by `align slurm`. Options given to it go to every sbatch.",
        "# A job starts once the one before it has succeeded: stages share one working folder and build on one another. A job that",
        "# fails leaves those after it pending (DependencyNeverSatisfied): scancel them, mend it, and run this again: what is done is skipped.",
        "set -euo pipefail",
        f"mkdir -p {quote(log_folder(job, slurm))}  # sbatch does not make it, and a job without its log folder fails",
        f"cd {quote(job.folder)}",
        "after=()",
    ]
    for script in scripts:
        lines += [f'id=$(sbatch --parsable "${{after[@]}}" "$@" {script})', 'id=${id%%;*}  # on a federation sbatch prints id;cluster', f'echo "{script} $id"']
        lines += ['after=("--dependency=afterok:$id")'] if script != scripts[-1] else []
    return "\n".join(lines) + "\n"


SCRIPT = Path(__file__).with_name("job.sbatch").read_text(encoding="utf-8")
