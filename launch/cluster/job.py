"""What a cluster's job needs beside its script: the resolved chain, the machine file, and the numbers of nodes and processes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.batches import check_batches

STAGES = ("sft", "reward", "dpo", "ppo", "eval")


@dataclass(frozen=True)
class Job:
    """A chain on `nodes` machines with `per_node` processes each (one per GPU, or one where there is none)."""

    chain: Any
    nodes: int
    gpus_per_node: int
    machine: dict[str, Any]
    machine_name: str
    folder: Path  # where the files are written, absolute
    workdir: Path  # what relative paths of the chain start at
    stages: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def per_node(self) -> int:
        """Processes on a node."""
        return max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.per_node

    def launch(self, node: str, address: str, port: str) -> str:
        """What `accelerate launch` is told on one node, for a reader of the script; `align run` composes it."""
        meeting = f" --num_machines {self.nodes} --machine_rank {node} --main_process_ip {address} --main_process_port {port}" if self.nodes > 1 else ""
        return f"--config_file {self.machine_file.name} --num_processes {self.processes}{meeting}"

    @property
    def chain_file(self) -> Path:
        """The resolved chain."""
        return self.folder / "chain.yaml"

    @property
    def machine_file(self) -> Path:
        """The Accelerate config of all nodes; what differs between nodes is on the command line."""
        return self.folder / "machine.yaml"

    def files(self) -> dict[Path, str]:
        """The chain and the machine file: path -> text."""
        import yaml

        from configs.load import dump

        head = f"# Written by `align`: chain {self.chain.name} with all defaults and overrides, as its jobs run it.\n"
        machine = f"# Written by `align`: {self.machine_name} for {self.nodes} node(s) with {self.per_node} process(es) each.\n"
        return {self.chain_file: head + dump(self.chain), self.machine_file: machine + yaml.safe_dump(self.machine, sort_keys=False)}


def prepare(
    chain_file: str, overrides: Sequence[str], *, nodes: int, gpus_per_node: int, machine: str | None, out: Path | None, kind: str,
    workdir: Path | None = None, machine_file: Path | None = None,
) -> Job:  # fmt: skip
    """Resolve the chain for `nodes` x `gpus_per_node`; `kind` names the folder in OUTPUT that files go to unless `out` is given.

    `workdir` is where the job's relative paths start (default: here), `machine_file` where it finds the machine file (default: beside the chain).

    Raises UserError for a chain, a machine file or a batch size that does not fit.
    """
    from configs.load import load

    first = load(chain_file, "chain", list(overrides))
    folder = (out or first.output / kind).absolute()
    workdir = workdir or Path.cwd()
    output, registry = workdir / first.output, workdir / first.registry
    for name, number, least in (("--nodes", nodes, 1), ("--gpus-per-node", gpus_per_node, 0)):
        if number < least:
            raise UserError(f"{name} {number}: expected {least} or more")
    processes = nodes * max(1, gpus_per_node)
    paths = {"output": output, "registry": registry, "machine": machine_file or folder / "machine.yaml"}
    stages = tuple(stage for stage in STAGES if getattr(first, stage) is not None)
    places = [*(f"{key}={json.dumps(str(path))}" for key, path in paths.items()), f"processes={processes}"]
    for stage in stages:  # whatever a section says of its own machine
        places += [f"{stage}.machine={json.dumps(str(paths['machine']))}", f"{stage}.processes={processes}"] if stage != "eval" else []
    chain = load(chain_file, "chain", [*overrides, *places])
    check_batches({stage: getattr(chain, stage) for stage in stages if stage != "eval"}, processes)
    name, settings = machine_settings(machine, nodes, gpus_per_node)
    return Job(chain, nodes, gpus_per_node, settings, name, folder, workdir, stages)


def machine_settings(machine: str | None, nodes: int, gpus_per_node: int) -> tuple[str, dict[str, Any]]:
    """The machine file's name and its settings for this many nodes; its engine need not be installed here, where nothing runs."""
    from configs.machines import machine_file, pick_machine, read_machine
    from launch.command import FSDP_REFUSED

    name = machine or pick_machine(gpus_per_node, None, nodes)
    path = machine_file(name, nodes * max(1, gpus_per_node), nodes)
    found = read_machine(path)
    if str(found.get("distributed_type")).upper() == "FSDP":
        raise UserError(f"--machine {name}: {FSDP_REFUSED}; choose zero3, which splits a model over the processes as well")
    if bool(found.get("use_cpu")) == bool(gpus_per_node):
        what = "runs on CPUs" if gpus_per_node else "runs on GPUs"
        raise UserError(f"--machine {name}: {what}, but --gpus-per-node is {gpus_per_node}; choose a machine file that fits")
    processes = nodes * max(1, gpus_per_node)
    found = {key: value for key, value in found.items() if key not in ("main_process_ip", "main_process_port")}  # on the command line
    settings = {**found, "num_machines": nodes, "num_processes": processes, "machine_rank": 0, "rdzv_backend": "static"}
    if str(found.get("distributed_type")).upper() == "NO" and processes > 1:
        raise UserError(f"--machine {name}: is for one process, and {nodes} node(s) x {max(1, gpus_per_node)} are asked for; choose gpu_ddp or a ZeRO file")
    if nodes > 1 and "deepspeed_config" in found:  # DeepSpeed's own way between nodes is pdsh, which needs ssh
        settings["deepspeed_config"] = {**found["deepspeed_config"], "deepspeed_multinode_launcher": "standard"}
    return name, settings


def write_files(files: dict[Path, str], *, force: bool) -> None:
    """Write all files, scripts executable. Raises UserError naming those that exist with other content, unless `force`."""
    changed = [path for path, text in files.items() if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text]
    if changed and not force:
        raise UserError(f"{', '.join(map(str, changed))} exist(s) with other content; --force overwrites, --out DIR writes elsewhere")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            if text.startswith("#!"):
                path.chmod(0o755)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; give another folder with --out DIR") from error


def activation() -> str | None:
    """The activate script of the environment that runs this; None outside of a virtual environment."""
    script = Path(sys.prefix) / "bin" / "activate"
    return str(script) if sys.prefix != sys.base_prefix and script.is_file() else None


def quote(value: Any) -> str:
    """A value as one word of a shell, and of an #SBATCH line, which knows the same quotes."""
    text = str(value)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):  # a line break would end an #SBATCH line, and the rest be run
        raise UserError(f"{text!r}: found a control character, such as a line break; expected a name or path without")
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII) else '"' + re.sub(r'([\\$"`])', r"\\\1", text) + '"'
