"""A cluster on this machine: `sbatch`, `srun` and `scontrol` as far as the scripts use them, and a scheduler that a test drives.

Every node is this machine. As SLURM with cgroups does, srun passes a signal on to the task it started and to nothing below that.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {
    "sbatch": {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "partition", "account", "qos", "mail-user", "mail-type",
               "chdir", "output", "signal", "exclusive", "mem", "open-mode", "requeue", "parsable", "dependency"},
    "srun": {"export", "nodes", "ntasks-per-node", "cpu-bind", "cpus-per-task", "kill-on-bad-exit", "wait", "container-image", "container-mounts"},
}  # fmt: skip


def options_of(command: str, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """--name=value words up to the first other word, and the rest; a name that the real command does not have is an error."""
    options: dict[str, str] = {}
    while words and words[0].startswith("--"):
        name, _, value = words[0][2:].partition("=")
        if name not in KNOWN[command]:
            sys.exit(f"{command}: unrecognized option '--{name}'")
        options[name] = value
        words = words[1:]
    return options, words


def state() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def sbatch(words: list[str]) -> int:
    """Queue a script and print its id."""
    options, rest = options_of("sbatch", words)
    script = Path(rest[0]).resolve()
    header = [word for line in script.read_text().splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line.removeprefix("#SBATCH "))]
    written, left = options_of("sbatch", header)
    assert not left, left
    number = 1000 + len(list(state().glob("job-*.json")))
    (state() / f"job-{number}.json").write_text(json.dumps({"id": number, "script": str(script), "options": written | options}))
    print(number)
    return 0


def scontrol(words: list[str]) -> int:
    """`show hostnames LIST` and `requeue ID`."""
    if words[:2] == ["show", "hostnames"]:
        first, last = re.fullmatch(r"node\[(\d+)-(\d+)\]", words[2]).groups()  # type: ignore[union-attr]
        print("\n".join(f"127.0.0.{number}" for number in range(int(first), int(last) + 1)))
        return 0
    assert words[0] == "requeue", words
    with (state() / "requeued").open("a") as file:
        file.write(f"{words[1]}\n")
    return 0


def srun(words: list[str]) -> int:
    """Run a command once per node; signals go to the tasks; the highest exit code comes back."""
    options, command = options_of("srun", words)
    nodes = int(options["nodes"])
    assert nodes <= int(os.environ["SLURM_NNODES"])
    tasks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        for task in tasks:
            task.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, forward)
    for node in range(nodes):
        local = state() / f"local-{node}"
        local.mkdir(exist_ok=True)
        env = {**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_TMPDIR": str(local)}
        tasks.append(subprocess.Popen(command, env=env))
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


class Cluster:
    """What a test drives: the queue, and running a job the way slurmd would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name in ("sbatch", "scontrol", "srun"):
            file = programs / name
            file.write_text(
                f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.launch.fake_slurm import {name}\nsys.exit({name}(sys.argv[1:]))\n"
            )
            file.chmod(0o755)
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "FAKE_SLURM": str(folder), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
        self.codes: dict[int, int] = {}

    def queue(self) -> list[dict]:
        """The jobs in the order of their submission."""
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("job-*.json"))]

    def requeued(self) -> list[int]:
        """The jobs that scontrol was asked to requeue."""
        file = self.folder / "requeued"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def start(self, job: dict, restarts: int = 0) -> subprocess.Popen[bytes]:
        """Start a job whose dependency has succeeded."""
        dependency = job["options"].get("dependency")
        assert dependency is None or self.codes.get(int(dependency.removeprefix("afterok:"))) == 0, "afterok is not met"
        nodes, output = job["options"]["nodes"], job["options"]["output"]
        log = Path(output.replace("%x", job["options"]["job-name"]).replace("%j", str(job["id"])))
        env = {"SLURM_JOB_ID": str(job["id"]), "SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": f"node[1-{nodes}]", "SLURM_NODEID": "0"}
        env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        job["log"] = log
        with log.open("ab") as out:
            return subprocess.Popen(["bash", job["script"]], env=self.env | env, cwd=job["options"]["chdir"], stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def finish(self, job: dict, process: subprocess.Popen[bytes], seconds: float = 180) -> int:
        """Wait for a job and note how it ended."""
        try:
            self.codes[job["id"]] = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise AssertionError(f"the job has not ended in {seconds} s:\n{job['log'].read_text()}") from None
        return self.codes[job["id"]]
