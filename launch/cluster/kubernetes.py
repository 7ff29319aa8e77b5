"""The Kubernetes manifest of a chain: an indexed Job with a headless Service, or a Kubeflow PyTorchJob; every pod is a node."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from configs.exit_codes import REQUEUE
from configs.printable import printable
from launch.cluster.job import Job

CONFIG_FOLDER = Path("/etc/align")
CACHE_FOLDER = "/cache"
PORT = 29500
GRACE_SECONDS = 330  # a little more than a stage's processes get to save after SIGTERM (TORCH_ELASTIC_SHUTDOWN_TIMEOUT)
TOLD_TO_STOP = [REQUEUE, 143]  # 143: SIGTERM, as before a pod is evicted or its node is shut down
TRIES = 3  # failures of a pod that count before the job has failed
QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?"


@dataclass(frozen=True)
class Kubernetes:
    """What `align k8s` is asked for beside the chain."""

    image: str
    claim: str
    kind: str = "job"
    name: str | None = None
    namespace: str | None = None
    mount: str = "/data"
    cpu: str | None = None
    memory: str | None = None
    shm: str = "16Gi"
    network_interface: str | None = None
    service_account: str | None = None

    def check(self) -> None:
        """Raise UserError for a name or an amount that Kubernetes would refuse."""
        for option, value in (("--claim", self.claim), ("--name", self.name), ("--namespace", self.namespace), ("--service-account", self.service_account)):
            if value is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", value):
                raise UserError(f"{option} {value!r}: expected lower-case letters, digits and hyphens, at most 52")
        for option, value in (("--cpu", self.cpu), ("--memory", self.memory), ("--shm", self.shm)):
            if value is not None and not re.fullmatch(QUANTITY, value):
                raise UserError(f"{option} {value!r}: expected an amount such as 64, 500m, 512Gi")
        if not re.fullmatch(r"/[\w@%+=:,./-]*", self.mount):
            raise UserError(f"--mount {self.mount!r}: expected a path from the root, such as /data, without spaces and signs of a shell")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, no anchors: a manifest is read by people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))


def manifest(job: Job, asked: Kubernetes) -> str:
    """The whole manifest as text: header, ConfigMap, and Service and Job or PyTorchJob."""
    asked.check()
    name = asked.name or re.sub(r"[^a-z0-9-]+", "-", f"align-{job.chain.name}".lower())[:52].strip("-")
    documents = [config_map(job, name)]
    documents += [service(name), indexed_job(job, asked, name)] if asked.kind == "job" else [pytorch_job(job, asked, name)]
    for document in documents:
        document["metadata"] |= {"labels": {"app.kubernetes.io/name": "align", "app.kubernetes.io/instance": name}}
        document["metadata"] |= {"namespace": asked.namespace} if asked.namespace else {}
    texts = [yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=150) for document in documents]
    return header(job, asked, name) + "---\n".join(texts)


def header(job: Job, asked: Kubernetes, name: str) -> str:
    """What a reader has to know, as comments."""
    kind = "job" if asked.kind == "job" else "pytorchjob"
    again = (
        f"The exit codes {TOLD_TO_STOP} (told to stop; a stage continues from its newest save) and disruptions do not count as failures."
        if asked.kind == "job"
        else "A container that ends with an error is started again in its pod; a stage continues from its newest save."
    )
    lines = [
        f"Chain {job.chain.name} ({', '.join(job.stages)}) on {job.nodes} pod(s) x {job.per_node} process(es), {job.machine_name}. Written by `align k8s`.",
        f"Start: kubectl apply -f FILE. Logs: kubectl logs -f -l app.kubernetes.io/instance={name} --prefix. End: kubectl delete -f FILE. Applied again, it",
        f"skips what is published: delete the {kind} first, for Kubernetes does not start a finished one again.",
        f"It needs: a PersistentVolumeClaim {asked.claim!r} that all pods mount at {asked.mount} (ReadWriteMany). Relative paths in the chain start there: base model,",
        f"data, registry ({job.chain.registry}). And an image that has `align` on its PATH and bash.",
        "Pod 0 prepares, decides, publishes and evaluates; the others start each stage's processes with it. All of them must be placed at once: on a busy",
        "cluster use a queue that does so (Kueue, Volcano), else pods may wait for one another until the rendezvous time-out.",
        again,
        "/dev/shm is memory: data loaders and NCCL use it, and the 64 MiB of a container are too few. /cache is the node's own disk: compiled kernels.",
        "NCCL_DEBUG=INFO shows the network interfaces and adapters that NCCL chose. With RDMA, add its device to the resources (such as rdma/ib: 1).",
    ]  # fmt: skip
    return "".join(f"# {printable(line).replace(chr(10), ' ')}\n" for line in lines)  # a line break in a path would end the comment


def config_map(job: Job, name: str) -> dict[str, Any]:
    """The resolved chain and the machine file."""
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{name}-config"}, "data": {path.name: text for path, text in job.files().items()},
    }  # fmt: skip


def service(name: str) -> dict[str, Any]:
    """Gives the pods names: NAME-0.NAME is pod 0. Not ready ones too, for none is before it has found the others."""
    selector = {"batch.kubernetes.io/job-name": name}
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector, "ports": [{"name": "rendezvous", "port": PORT}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def indexed_job(job: Job, asked: Kubernetes, name: str) -> dict[str, Any]:
    """One pod per node; pod 0 decides about success."""
    template = pod_template(job, asked, name, "align", 'index="$JOB_COMPLETION_INDEX" address=' + f"{name}-0.{name} port={PORT}", restart="Never")
    template["spec"]["subdomain"] = name
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"containerName": "align", "operator": "In", "values": TOLD_TO_STOP}},
    ]
    spec = {
        "completions": job.nodes, "parallelism": job.nodes, "completionMode": "Indexed",
        "backoffLimit": TRIES * job.nodes,  # where one pod fails, all do
        "podReplacementPolicy": "Failed",  # not while the old pod is still saving
        "podFailurePolicy": {"rules": rules}, "successPolicy": {"rules": [{"succeededIndexes": "0"}]}, "template": template,
    }  # fmt: skip
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def pytorch_job(job: Job, asked: Kubernetes, name: str) -> dict[str, Any]:
    """A master and workers; Kubeflow's operator numbers them and makes their Service."""
    # RANK and WORLD_SIZE count pods; a step that is one process must not take itself for a rank of many.
    facts = 'index="$RANK" address="$MASTER_ADDR" port="$MASTER_PORT"\nunset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT'
    template = pod_template(job, asked, name, "pytorch", facts, restart=None)
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": template}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, "restartPolicy": "OnFailure", "template": template}
    spec = {"runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": TRIES * job.nodes}, "pytorchReplicaSpecs": replicas}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": name}, "spec": spec}


def pod_template(job: Job, asked: Kubernetes, name: str, container: str, facts: str, restart: str | None) -> dict[str, Any]:
    """One node's pod: shared folder, own cache, shared memory, the configs, and `align run`."""
    amounts = {"cpu": asked.cpu, "memory": asked.memory, "nvidia.com/gpu": str(job.gpus_per_node) if job.gpus_per_node else None}
    amounts = {key: amount for key, amount in amounts.items() if amount}
    mounts = {"shared": asked.mount, "config": str(CONFIG_FOLDER), "cache": CACHE_FOLDER, "shm": "/dev/shm"}
    volumes: list[dict[str, Any]] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": asked.claim}},
        {"name": "config", "configMap": {"name": f"{name}-config"}},
        {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": asked.shm}},
    ]
    main = {
        "name": container, "image": asked.image, "workingDir": asked.mount, "command": ["bash", "-c"], "args": [pod_script(job, facts)], "env": environment(asked),
        "volumeMounts": [{"name": key, "mountPath": path} for key, path in mounts.items()], **({"resources": {"limits": amounts}} if amounts else {}),
    }  # fmt: skip
    spec: dict[str, Any] = {"terminationGracePeriodSeconds": GRACE_SECONDS, "containers": [main], "volumes": volumes}
    spec |= {"restartPolicy": restart} if restart else {}
    spec |= {"serviceAccountName": asked.service_account} if asked.service_account else {}
    return {"metadata": {"labels": {"app.kubernetes.io/name": "align", "app.kubernetes.io/instance": name}}, "spec": spec}


def pod_script(job: Job, facts: str) -> str:
    """What a pod runs; `facts` sets index, address and port."""
    meeting = ' --node-rank "$index" --main-address "$address" --main-port "$port" --rendezvous-timeout 1800' if job.nodes > 1 else ""
    return (
        f"set -euo pipefail\n{facts}\n"
        + 'echo "node $index; node 0 is $address:$port"\n'
        + "# align becomes process 1, which Kubernetes sends SIGTERM\n"
        + f"exec align run {CONFIG_FOLDER / 'chain.yaml'} --nodes {job.nodes}{meeting}\n"
    )


def environment(asked: Kubernetes) -> list[dict[str, Any]]:
    """Variables of the container."""
    owner = "batch.kubernetes.io/controller-uid" if asked.kind == "job" else "training.kubeflow.org/job-name"
    interface = {"NCCL_SOCKET_IFNAME": asked.network_interface, "GLOO_SOCKET_IFNAME": asked.network_interface} if asked.network_interface else {}
    plain = {
        "HF_HOME": f"{asked.mount}/huggingface", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NCCL_DEBUG": "WARN", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TRITON_CACHE_DIR": f"{CACHE_FOLDER}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{CACHE_FOLDER}/inductor", "TORCH_EXTENSIONS_DIR": f"{CACHE_FOLDER}/extensions",
        **interface,
    }  # fmt: skip
    # Which job a pod belongs to: a pod that replaces another one takes over the chain's working folder.
    job = {"name": "ALIGN_JOB", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{owner}']"}}}
    return [job, *({"name": key, "value": value} for key, value in plain.items())]
