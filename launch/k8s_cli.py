"""`align k8s`: writes the Kubernetes manifest of a chain."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Add the verb `k8s`."""
    from launch.slurm_cli import add_size, add_writing

    parser = verbs.add_parser(
        "k8s",
        help="write a Kubernetes manifest that runs a chain on many nodes",
        description="Writes one manifest: the chain and the machine file, and an indexed Job with its Service, or a Kubeflow PyTorchJob.",
    )
    parser.add_argument("chain", metavar="CHAIN.yaml", help="the chain file; its relative paths start at --mount")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file, such as sft.train.epochs=2")
    add_size(parser)
    parser.add_argument("--image", required=True, metavar="IMAGE", help="container image with this project installed")
    parser.add_argument("--claim", required=True, metavar="NAME", help="PersistentVolumeClaim that all pods share (ReadWriteMany)")
    parser.add_argument("--kind", choices=["job", "pytorchjob"], default="job", help="indexed Job (default) or Kubeflow PyTorchJob")
    parser.add_argument("--mount", default="/data", metavar="PATH", help="where pods see the claim (default: /data)")
    parser.add_argument("--name", metavar="NAME", help="name of the objects (default: align-CHAIN)")
    parser.add_argument("--namespace", metavar="NAME", help="namespace (default: kubectl's)")
    parser.add_argument("--cpu", metavar="N", help="CPU cores of a pod")
    parser.add_argument("--memory", metavar="AMOUNT", help="memory of a pod, such as 512Gi")
    parser.add_argument("--shm", default="16Gi", metavar="AMOUNT", help="size of /dev/shm, part of the pod's memory (default: 16Gi)")
    parser.add_argument("--network-interface", metavar="NAME", help="network interface between the pods, such as eth0")
    parser.add_argument("--service-account", metavar="NAME", help="service account of the pods")
    add_writing(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Write the manifest and say where it is."""
    from launch.cluster.job import prepare, write_files
    from launch.cluster.kubernetes import CONFIG_FOLDER, Kubernetes, manifest

    asked = Kubernetes(
        image=args.image, claim=args.claim, kind=args.kind, name=args.name, namespace=args.namespace, mount=args.mount, cpu=args.cpu, memory=args.memory,
        shm=args.shm, network_interface=args.network_interface, service_account=args.service_account,
    )  # fmt: skip
    job = prepare(
        args.chain, args.overrides, nodes=args.nodes, gpus_per_node=args.gpus_per_node, machine=args.machine, out=args.out, kind="k8s",
        workdir=Path(args.mount), machine_file=CONFIG_FOLDER / "machine.yaml",
    )  # fmt: skip
    file = job.folder / f"{args.kind}.yaml"
    write_files({file: manifest(job, asked)}, force=args.force)
    if args.json:
        print(json.dumps({"files": [str(file)], "stages": list(job.stages), "machine": job.machine_name, "nodes": job.nodes, "processes": job.processes}))
    else:
        print(f"{file}: {len(job.stages)} step(s) on {job.nodes} pod(s) with {job.per_node} process(es) each, {job.machine_name}; to start: kubectl apply -f {file}")
    return 0
