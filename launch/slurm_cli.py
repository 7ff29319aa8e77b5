"""`align slurm`: writes the sbatch scripts of a chain."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `slurm`."""
    parser = verbs.add_parser(
        "slurm",
        help="write sbatch scripts that run a chain on many nodes",
        description="Writes one sbatch script per stage, each after the one before it, and submit.sh, which submits them.",
    )
    parser.add_argument("chain", metavar="CHAIN.yaml", help="the chain file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file, such as sft.train.epochs=2")
    add_size(parser)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--job-per-stage", action="store_true", help="one job per stage, with dependencies (the default)")
    parts.add_argument("--one-job", action="store_true", help="one job for the whole chain")
    parser.add_argument("--time", metavar="T", help="time limit of a job, such as 24:00:00")
    parser.add_argument("--partition", metavar="NAME", help="partition to submit to")
    parser.add_argument("--account", metavar="NAME", help="account to charge")
    parser.add_argument("--qos", metavar="NAME", help="quality of service")
    parser.add_argument("--mail", metavar="ADDRESS", help="mail when a job ends, fails or is requeued")
    parser.add_argument("--cpus-per-node", type=int, metavar="C", help="CPU cores of a node (default: whole nodes, --exclusive)")
    parser.add_argument("--container", metavar="IMAGE", help="run in a container: FILE.sif with Apptainer, anything else with pyxis")
    parser.add_argument("--signal-before", type=int, default=300, metavar="S", help="seconds before the time limit to stop and requeue: what one step (PPO: a rollout, or an update), an evaluation and a save take together, and 30 more (default: 300)")
    parser.add_argument("--max-requeues", type=int, default=50, metavar="N", help="requeue a job at most this often (default: 50)")
    parser.add_argument("--network-interface", metavar="NAME", help="network interface between the nodes, such as ib0")
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="where logs go (default: logs beside the scripts)")
    parser.add_argument("--activate", metavar="FILE", help="environment to source on every node (default: the one that runs this; none: no file)")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell line for every node, such as 'module load cuda'; may be repeated")
    add_writing(parser)
    parser.set_defaults(handler=run)


def add_size(parser: argparse.ArgumentParser) -> None:
    """The options that every kind of cluster has."""
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="GPUs of a node, one process each; 0: one process on the CPU")
    parser.add_argument("--machine", metavar="X", help="machine file: a name in configs/accelerate or a path (default: gpu_ddp, gpu, cpu_ddp or cpu)")


def add_writing(parser: argparse.ArgumentParser) -> None:
    """The options about the files that are written."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: one in the chain's output)")
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Write the scripts and say where they are."""
    from launch.cluster.job import activation, prepare, write_files
    from launch.cluster.slurm import Slurm, log_folder, slurm_files

    job = prepare(
        args.chain, args.overrides, nodes=args.nodes, gpus_per_node=args.gpus_per_node, machine=args.machine, out=args.out, kind="slurm"
    )
    slurm = Slurm(
        one_job=args.one_job, time=args.time, partition=args.partition, account=args.account, qos=args.qos, mail=args.mail,
        cpus_per_node=args.cpus_per_node, container=args.container, signal_before=args.signal_before, max_requeues=args.max_requeues,
        network_interface=args.network_interface, log_dir=args.log_dir, activate=None if args.activate == "none" else args.activate or activation(),
        setup=tuple(args.setup),
    )  # fmt: skip
    files = slurm_files(job, slurm)
    write_files(files, force=args.force)
    log_folder(job, slurm).mkdir(parents=True, exist_ok=True)
    submit = job.folder / "submit.sh"
    if args.json:
        print(json.dumps({"files": [str(path) for path in files], "submit": str(submit), "stages": list(job.stages), "machine": job.machine_name,
                          "nodes": job.nodes, "processes": job.processes}))  # fmt: skip
    else:
        print("\n".join(str(path) for path in files))
        print(f"{len(job.stages)} step(s) on {job.nodes} node(s) with {job.per_node} process(es) each, {job.machine_name}; to submit: {submit}")
    return 0
