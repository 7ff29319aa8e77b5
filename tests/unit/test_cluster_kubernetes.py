"""The Kubernetes manifests against Kubernetes' own schemas, and what their pods run."""

from __future__ import annotations

import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from configs.exit_codes import REQUEUE
from configs.load import load_text
from launch.cli import main
from tests.unit.test_cluster_slurm import CHAIN, shellcheck

VERSIONS = ("1.31", "1.37")  # successPolicy is on by default from 1.31
BASE = ["--image", "registry.example.org/align:1", "--claim", "shared"]
VARIANTS = {
    "plain": [],
    "all": ["--cpu", "64", "--memory", "512Gi", "--shm", "64Gi", "--namespace", "ml", "--name", "mine", "--network-interface", "eth0", "--service-account", "trainer"],
}
# The custom resource of Kubeflow's training operator, v1: every field that may stand there, and nothing else; templates are checked as pods.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "namespace", "labels"},
    "spec": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
    "spec.runPolicy": {"activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy", "suspend", "ttlSecondsAfterFinished"},
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.*": {"replicas", "restartPolicy", "template"},
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(options) -> the manifest's documents by kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain.yaml").write_text(CHAIN)

    def write(*options: str, nodes: int = 2, gpus: int = 4) -> dict[str, Any]:
        assert main(["k8s", "chain.yaml", "--nodes", str(nodes), "--gpus-per-node", str(gpus), *BASE, "--out", "out", "--force", *options]) == 0
        (file,) = (tmp_path / "out").iterdir()
        text = file.read_text()
        assert text.startswith("# Chain tiny (sft, reward, ppo, eval) on ")
        return {document["kind"]: document for document in yaml.safe_load_all(text)}

    return write


def strict(document: dict[str, Any]) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_schemas_of_kubernetes_take_it(written, variant):
    documents = written(*VARIANTS[variant])
    assert list(documents) == ["ConfigMap", "Service", "Job"]
    for document in documents.values():
        strict(document)


def test_the_schemas_would_refuse_a_wrong_field(written):
    job = written()["Job"]
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        strict(job)


def test_the_job_says_how_it_ends_and_starts_again(written):
    job, service = (written()[kind] for kind in ("Job", "Service"))
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    assert spec["podFailurePolicy"]["rules"][1]["onExitCodes"] == {"containerName": "align", "operator": "In", "values": [REQUEUE, 143]}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod["subdomain"] == service["metadata"]["name"] == "align-tiny"  # pod 0 is then called align-tiny-0.align-tiny
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    (container,) = pod["containers"]
    assert container["name"] == "align"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "4"}}
    assert pod["terminationGracePeriodSeconds"] > 300
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_chain_in_the_manifest_stands_on_its_own(written):
    data = written("sft.train.epochs=7")["ConfigMap"]["data"]
    chain = load_text(data["chain.yaml"], "chain")
    assert (chain.sft.train.epochs, str(chain.registry), chain.sft.machine, chain.sft.processes) == (7, "/data/runs/tiny/registry", "/etc/align/machine.yaml", 8)
    assert yaml.safe_load(data["machine.yaml"])["num_machines"] == 2


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pytorchjob_has_the_fields_that_kubeflow_knows(written, nodes, variant):
    job = written("--kind", "pytorchjob", *VARIANTS[variant], "sft.train.batch_size=24", "reward.train.batch_size=24", "ppo.train.rollout_batch_size=24", nodes=nodes)["PyTorchJob"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    found = {"": job, "metadata": job["metadata"], "spec": job["spec"], "spec.runPolicy": job["spec"]["runPolicy"]}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    for place, value in (found | {"spec.pytorchReplicaSpecs": replicas}).items():
        assert set(value) <= FIELDS[place], place
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    assert {key: replica["replicas"] for key, replica in replicas.items()} == ({"Master": 1, "Worker": 2} if nodes == 3 else {"Master": 1})
    for replica in replicas.values():
        assert set(replica) == FIELDS["spec.pytorchReplicaSpecs.*"]
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        assert [container["name"] for container in replica["template"]["spec"]["containers"]] == ["pytorch"]  # the operator looks for this name
        strict({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one", **replica["template"]["metadata"]}, "spec": replica["template"]["spec"]})


@pytest.mark.parametrize(("kind", "env"), [("job", {"JOB_COMPLETION_INDEX": "1"}), ("pytorchjob", {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "align-tiny-0.align-tiny", "MASTER_PORT": "29500"})])
def test_what_a_pod_runs(written, tmp_path, kind, env):
    documents = written("--kind", kind)
    spec = documents["Job"]["spec"] if kind == "job" else documents["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]
    container = spec["template"]["spec"]["containers"][0]
    assert container["command"] == ["bash", "-c"]
    script = tmp_path / "pod.sh"
    script.write_text("#!/usr/bin/env bash\n" + container["args"][0])
    done = subprocess.run([shellcheck(), str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (tmp_path / "align").write_text('#!/bin/sh\necho "$@" "rank=$RANK"\n')
    (tmp_path / "align").chmod(0o755)
    done = subprocess.run([*container["command"], *container["args"]], env={"PATH": f"{tmp_path}:/usr/bin:/bin", **env}, capture_output=True, text=True, check=False)
    said = "run /etc/align/chain.yaml --nodes 2 --node-rank 1 --main-address align-tiny-0.align-tiny --main-port 29500 --rendezvous-timeout 1800 rank="
    assert done.stdout.splitlines()[-1] == said


def test_the_command_of_a_pod_is_one_that_align_takes(written):
    from launch import cli

    words = written()["Job"]["spec"]["template"]["spec"]["containers"][0]["args"][0].splitlines()[-1].removeprefix("exec align ").replace('"', "").replace("$index", "1")
    args = cli.parse(words.replace("$address", "here").replace("$port", "29500").split())
    assert (args.nodes, args.node_rank, args.main_port) == (2, 1, 29500)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--name", "Not_A_Name"], "--name 'Not_A_Name'"), (["--memory", "lots"], "--memory 'lots'"), (["--mount", "data"], "--mount 'data'")],
)
def test_names_and_amounts_that_kubernetes_refuses(written, capsys, options, said):
    assert main(["k8s", "chain.yaml", "--nodes", "2", "--gpus-per-node", "4", *BASE, *options]) == 2
    assert said in capsys.readouterr().err
