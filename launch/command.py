"""Composes the command of one stage: `accelerate launch … -m stages.NAME --config FILE`, and what its process finds around it.

One process on one machine without DeepSpeed or FSDP is started as `python -m stages.NAME --config FILE`: `accelerate launch`
would only import itself, set the same variables and start that, which took 2.5 s instead of 1.3 s for a module that imports
torch and ends (two cores). `Command.typed` is in both cases the `accelerate launch` line that a person can type.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.nodes import Nodes, per_node

FSDP_REFUSED = "the stages refuse FSDP: on the CPU Accelerate runs it as plain DDP, so that none of them has been shown to train, save and resume with it"


@dataclass(frozen=True)
class Machine:
    """What a machine file says, as far as composing a command needs it."""

    path: Path
    settings: dict[str, Any]

    @property
    def ships(self) -> bool:
        """Whether the file is one of ours."""
        from configs.machines import FOLDER

        return self.path.resolve().parent == FOLDER.resolve()

    @property
    def nodes(self) -> int:
        """Nodes that the file is for."""
        return int(self.settings.get("num_machines") or 1)

    @property
    def processes(self) -> int:
        """Processes of one node: what the file says; of a file that ships for several GPUs, the GPUs there are."""
        from configs.machines import count_gpus

        stated = per_node(int(self.settings.get("num_processes") or 1), self.nodes)
        return count_gpus() or stated if self.ships and not self.use_cpu and stated > 1 else stated

    @property
    def use_cpu(self) -> bool:
        return bool(self.settings.get("use_cpu"))

    @property
    def fsdp(self) -> bool:
        """Whether weights are split by PyTorch's FSDP, with which no stage starts."""
        return str(self.settings.get("distributed_type", "NO")).upper() == "FSDP"

    @property
    def deepspeed_launcher(self) -> str | None:
        """How DeepSpeed would start several nodes with this file; None without DeepSpeed."""
        if str(self.settings.get("distributed_type", "NO")).upper() != "DEEPSPEED":
            return None
        return str((self.settings.get("deepspeed_config") or {}).get("deepspeed_multinode_launcher") or "pdsh")

    @property
    def plain(self) -> bool:
        """One process of this machine needs no launcher."""
        return str(self.settings.get("distributed_type", "NO")).upper() in ("NO", "MULTI_CPU", "MULTI_GPU") and self.nodes == 1


@dataclass(frozen=True)
class Command:
    """What is started on this node (`argv`, with `extra_env` over ours), the line that a person could type instead, and all nodes' processes."""

    argv: tuple[str, ...]
    typed: str
    extra_env: dict[str, str]
    processes: int = 1

    def environment(self, **more: str) -> dict[str, str]:
        """The whole environment of the child."""
        return {**os.environ, **self.extra_env, **more}


def load_machine(machine: str, processes: int | None, nodes: int = 1) -> Machine:
    """The machine file that `machine` names: auto, a name in configs/accelerate, or a path. Raises UserError if there is none."""
    from configs.extras import check_machine_packages
    from configs.machines import machine_file, read_machine

    path = Path(machine_file(machine, processes, nodes))
    settings = read_machine(path)
    check_machine_packages(settings, str(path))
    here = os.path.relpath(path)
    return Machine(path if here.startswith("..") else Path(here), settings)


def check_startable(machine: Machine, processes: int) -> None:
    """Make sure that this node's `processes` of a stage can run with the machine file: that each has a GPU where it is for GPUs, and no FSDP.

    Raises:
        UserError: there is no GPU, or there are fewer than processes; the file says FSDP.
    """
    from configs.machines import count_gpus, other_accelerators

    if machine.fsdp:
        raise UserError(f"{machine.path}: {FSDP_REFUSED}; take zero3, which splits a model over the processes as well")
    if machine.use_cpu:
        return
    gpus = count_gpus()
    if not gpus and not other_accelerators():
        hidden = f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides what there may be)" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        raise UserError(f"{machine.path} is for GPUs, and none is found here{hidden}; on the CPU take cpu, cpu_ddp or cpu_zero1 to cpu_zero3 (align launch show)")
    if gpus and processes > gpus:
        raise UserError(
            f"{machine.path} is for GPUs, and this node has {gpus} for {processes} process(es): lower --processes (it counts all nodes), "
            "look at CUDA_VISIBLE_DEVICES, or take a machine file for the CPU (align launch show)"
        )


def stage_command(module: str, config_file: Path, machine: Machine, processes: int | None = None, nodes: Nodes | None = None) -> Command:
    """The command that runs `python -m module --config config_file` in `processes` processes of all nodes (None: the machine file's).

    Without `nodes`, on the one node of a machine file for one.

    Raises:
        UserError: the nodes can't have equally many processes, or the file is for several nodes and `nodes` does not say which this is.
    """
    nodes = nodes or Nodes()
    if nodes.count == 1 and machine.nodes > 1:
        raise UserError(f"{machine.path} is for {machine.nodes} nodes; give --nodes, --node-rank and --main-address, or a machine file for one node")
    number = processes or machine.processes * nodes.count
    here = per_node(number, nodes.count)
    stage = ["-m", module, "--config", str(config_file)]
    options = ["--config_file", str(machine.path), "--num_processes", str(number), *nodes.options()]
    if nodes.count > 1 and machine.deepspeed_launcher not in (None, "standard"):
        options += ["--deepspeed_multinode_launcher", "standard"]  # the default, pdsh, would log in to the other nodes and start there itself
    if number > 1 and nodes.count == 1:
        options += ["--main_process_port", "0"]  # 0: accelerate takes a free port, so that two runs do not meet on 29500
    if "ALIGN_RANK_LOGS" in os.environ:  # a cluster's job: a folder per process beside the common log
        options += ["--tee", "3", "--log_dir", os.environ["ALIGN_RANK_LOGS"]]
    typed = shlex.join(["accelerate", "launch", *options, *stage])
    env = child_environment(here)
    if machine.use_cpu and machine.deepspeed_launcher is None:  # told so, Accelerate leaves DeepSpeed out without a word
        env["ACCELERATE_USE_CPU"] = "True"  # accelerate launch itself tells a single process only
    if number == 1 and machine.plain:
        env["ACCELERATE_USE_CPU"] = str(machine.use_cpu)
        env["ACCELERATE_MIXED_PRECISION"] = str(machine.settings.get("mixed_precision") or "no")
        return Command((sys.executable, *stage), typed, env, 1)
    argv = (sys.executable, "-m", "accelerate.commands.launch", *options, *stage)
    return Command(argv, typed, env, number)


def python_command(module: str, *arguments: str, use_cpu: bool = False) -> Command:
    """The command that runs `python -m module arguments`, one process without a launcher."""
    env = child_environment(1) | ({"ACCELERATE_USE_CPU": "True"} if use_cpu else {})
    return Command((sys.executable, "-m", module, *arguments), shlex.join(["python", "-m", module, *arguments]), env)


def child_environment(processes: int) -> dict[str, str]:
    """Variables of a stage's process; what the person has set already stays as it is."""
    # Threads that spin while they wait take the cores from the other processes; on a CPU that costs far more than waking up.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {
        "ALIGN_LAUNCHED": "1",  # a stage ends with what started it
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",  # torchrun kills 30 s after SIGTERM, too soon for a large model's save
        # torchrun passes these on to the processes and waits for them; of any other it dies, and they with it. SIGUSR1 warns of a time limit.
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        # Of lines that torchrun copies to a log per process: empty is not allowed, and what stands before a carriage return is dropped by our reader.
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "\r",
    }
    return {key: value for key, value in wanted.items() if key not in os.environ}
