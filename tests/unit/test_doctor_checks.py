"""The doctor's checks against faults: each is made here, and must be told with what to do."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from launch.doctor import (
    child,
    collectives,
    compiler,
    gpus,
    hub,
    interconnect,
    processors,
    self_test,
    storage,
    threads,
    versions,
)
from launch.doctor.check import Check, Findings, Settings, run_check
from launch.doctor.registry import check_registry
from stages.registry import Registry

SETTINGS = Settings(Path("runs/registry"))
GIB = 2**30


def levels(found: Findings) -> list[str]:
    return [problem.level for problem in found.problems]


def told(found: Findings) -> str:
    return "\n".join(f"{problem.level}: {problem.found} → {problem.advice}" for problem in found.problems)


# versions


def test_versions_of_this_environment_are_supported():
    found = versions.check_versions(SETTINGS)
    assert "failed" not in levels(found), told(found)
    assert found.facts["trl"].endswith("(supported: <2,>=1.16)")


@pytest.mark.parametrize(("version", "message"), [(None, "trl is not installed, trl<2,>=1.16 is needed"), ("1.4.0", "trl 1.4.0 is outside of the supported range <2,>=1.16")])
def test_a_missing_or_old_package_fails(monkeypatch, version, message):
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: version if name == "trl" else real(name))
    found = versions.check_versions(SETTINGS)
    assert [problem.found for problem in found.problems if problem.level == "failed"] == [message]
    assert "pip install 'trl<2,>=1.16'" in told(found)


def test_an_optional_package_may_be_missing_but_not_too_old(monkeypatch):
    for version, expected in ((None, []), ("0.10.0", ["warning"])):
        monkeypatch.setattr(versions, "installed", lambda name, version=version: version if name == "deepspeed" else "99" if name == "other" else _real(name))
        assert levels(versions.check_versions(SETTINGS)) == expected


_real = versions.installed


def test_ranges_come_from_the_metadata_where_there_is_no_checkout():
    python, required, optional = versions.requirements(Path("nowhere.toml"))
    assert (python, required, optional) == versions.requirements(), "of the checkout; run `make setup` if pyproject.toml is newer than what is installed"
    assert "transformers" in required
    assert optional["deepspeed"][1] == "deepspeed"
    assert "pytest" not in required | optional


# processors


def test_cgroup_v2_limits_above_us_count(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "b" / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "me").write_text("0::/a/b\n")
    assert processors.cgroup_limits(tmp_path, tmp_path / "me") == (1.5, 4 * GIB)


def test_cgroup_v1_limits_in_a_container_whose_path_is_the_hosts(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # the kernel's "no limit"
    (tmp_path / "me").write_text("4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n")
    assert processors.cgroup_limits(tmp_path, tmp_path / "me") == (2.0, None)
    assert processors.cgroup_limits(tmp_path, tmp_path / "nobody") == (None, None)


def test_a_quota_below_the_affinity_is_warned_of(monkeypatch):
    monkeypatch.setattr(processors, "cgroup_limits", lambda: (0.5, None))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    found = processors.check_processors(SETTINGS)
    assert "the cgroup allows 0.5 cores" in told(found)
    assert "OMP_NUM_THREADS=1" in told(found)
    assert processors.usable_cores() == 0.5


# threads


@pytest.mark.parametrize(("count", "cores", "expected"), [(2, 2.0, []), (8, 2.0, ["warning"]), (2, 1.5, ["warning"]), (1, 0.5, []), (None, 2.0, [])])
def test_oversubscription(monkeypatch, count, cores, expected):
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = Findings()
    threads.judge_threads(found, count, cores)
    assert levels(found) == expected
    assert not expected or f"OMP_NUM_THREADS={max(1, int(cores))}" in told(found)


def test_variables_that_oversubscribe(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "64")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    found = Findings()
    threads.judge_threads(found, 1, 2.0)
    assert "MKL_NUM_THREADS=64" in told(found)
    assert "OMP_WAIT_POLICY=PASSIVE" in told(found)


def test_torch_that_does_not_see_the_drivers_gpus(monkeypatch):
    monkeypatch.setattr(threads, "list_gpus", lambda: [{"index": 0}])
    found = Findings()
    threads._judge_gpus(found, {"cuda works": False, "cuda build": None, "gpus": []})
    assert levels(found) == ["failed"]
    assert "a build without CUDA" in told(found)


# shared memory, limits, disks

Usage = namedtuple("Usage", "f_frsize f_blocks f_bavail f_favail")


@pytest.mark.parametrize(
    ("size", "free", "expected", "says"),
    [(8 * GIB, 8 * GIB, [], ""), (64 * 2**20, 64 * 2**20, ["warning"], "--shm-size"), (8 * GIB, 2**20, ["failed"], "is full"), (2**20, 2**20, ["failed"], "--ipc=host")],
)
def test_shared_memory_tiny_or_full(monkeypatch, tmp_path, size, free, expected, says):
    monkeypatch.setattr(os, "statvfs", lambda _: Usage(1, size, free, 9))
    found = storage.check_shared_memory(SETTINGS, tmp_path)
    assert levels(found) == expected
    assert says in told(found)


def test_no_shared_memory(tmp_path):
    assert levels(storage.check_shared_memory(SETTINGS, tmp_path / "none")) == ["warning"]


@pytest.mark.parametrize(("soft", "expected"), [(128, "failed"), (1024, "warning")])
def test_a_low_limit_of_open_files(soft, expected):
    def lowered(settings):  # in the check's own process: the limit of this one stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return storage.check_limits(settings)

    result = run_check(Check("limits", lowered), SETTINGS)
    assert result.status == expected
    assert f"only {soft} files may be open" in result.problems[0].found
    assert "ulimit -n" in result.problems[0].advice
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != soft


def test_disks_are_written_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    found = storage.check_disks(Settings(tmp_path / "deep" / "registry", quick=True))
    assert "failed" not in levels(found), told(found)
    assert found.facts["registry"]["write [MB/s]"] > 0
    assert found.facts["registry"]["hard links"] is True
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_registry_fails_and_an_unwritable_cache_warns(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/proc/cache")  # nobody, root included, makes files in /proc
    found = storage.check_disks(Settings(Path("/proc/registry"), quick=True))
    assert [problem.level for problem in found.problems if "cannot be written" in problem.found] == ["failed", "warning"]
    assert "--registry" in found.problems[0].advice


def test_a_registry_that_is_a_file_and_one_without_room(monkeypatch, tmp_path):
    (tmp_path / "registry").write_text("")
    assert "is a file" in told(storage.check_disks(Settings(tmp_path / "registry", quick=True)))
    monkeypatch.setattr(os, "statvfs", lambda _: Usage(1, 100 * GIB, 2**20, 9))
    found = storage.check_disks(Settings(tmp_path, quick=True))
    assert "failed: registry: 1 MiB are free" in told(found)


def test_no_folder_for_temporary_files(monkeypatch, tmp_path):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(storage.tempfile, "gettempdir", none)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: none())
    result = run_check(Check("disks", storage.check_disks), Settings(tmp_path, quick=True))
    assert "TMPDIR" in next(problem.advice for problem in result.problems if problem.level == "failed")


def test_a_slow_disk_and_a_disk_without_links(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "write_speed", lambda handle, size: {"write [MB/s]": 3.0, "fsync [ms]": 900.0})
    assert "takes 3 MB/s" in told(storage.check_disks(Settings(tmp_path, quick=True)))

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", none)
    assert "no hard links" in told(storage.check_disks(Settings(tmp_path, quick=True)))


def test_a_registry_in_memory_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "file_system", lambda folder: "tmpfs")
    found = storage.check_disks(Settings(tmp_path, quick=True))
    assert [problem.found for problem in found.problems if "kept in memory" in problem.found and problem.level == "warning"]
    assert found.facts["registry"]["kind"] == "memory"


# registry, hub


def publish(root: Path, text: str) -> None:
    Registry(root).publish("sft", "a", lambda folder: (folder / "config.json").write_text(text) and None, check_weights=False)


def test_a_registry_is_opened_counted_and_its_newest_verified(tmp_path):
    root = tmp_path / "registry"
    for text in ("{}", '{"a": 1}'):
        publish(root, text)
    found = check_registry(Settings(root, named=True))
    assert found.problems == []
    assert (found.facts["checkpoints"], found.facts["newest"]) == ({"sft": 2}, ["sft/a@2", "sft/a@1"])
    newest = Registry(root).resolve("sft/a@2")
    (newest.model_dir / "config.json").write_text("longer than it was")
    found = check_registry(Settings(root, named=True))
    assert levels(found) == ["failed"]
    assert "sft/a@2 is damaged" in told(found)
    (newest.path / "manifest.json").write_text("{")
    assert levels(check_registry(Settings(root, named=True))) == ["warning"]


def test_a_registry_must_be_there_only_when_it_was_named(tmp_path):
    assert levels(check_registry(Settings(tmp_path / "none", named=True))) == ["failed"]
    found = check_registry(Settings(tmp_path / "none"))
    assert found.problems == []
    assert "a stage makes it" in found.summary
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    assert levels(check_registry(Settings(tmp_path / "other"))) == ["failed"]


def test_hub_state_never_shows_the_token(monkeypatch, tmp_path):
    for name in (*hub.OFFLINE, *hub.SHOWN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    found = hub.check_hub(SETTINGS)
    assert found.summary == "online, 1 model(s) and 0 data set(s) cached, a token"
    assert "secret" not in str(found)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert levels(hub.check_hub(SETTINGS)) == ["warning"]


# GPUs, interconnect

TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity
GPU0\t X \tNV12\tSYS\tPXB\t0-31
GPU1\tNV12\t X \tSYS\tPXB\t0-31
GPU2\tSYS\tSYS\t X \tSYS\t32-63
NIC0\tPXB\tPXB\tSYS\t X \t

Legend:
  X    = Self
"""


def fake_smi(monkeypatch, folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_gpus_are_read_from_the_driver(monkeypatch, tmp_path):
    fake_smi(monkeypatch, tmp_path, "echo '0, NVIDIA A100-SXM4-80GB, 535.104.05, 81920, 40000, 8.0'; echo '1, NVIDIA A10G, 535.104.05, 23028, 3, [N/A]'")
    found = gpus.check_gpus(SETTINGS)
    assert found.summary.startswith("2 × NVIDIA A100-SXM4-80GB / NVIDIA A10G")
    assert levels(found) == ["warning", "warning"]  # of several kinds; one is busy
    assert "GPU 0 (40000 MiB)" in told(found)


def test_a_broken_driver_fails(monkeypatch, tmp_path):
    fake_smi(monkeypatch, tmp_path, "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9")
    found = gpus.check_gpus(SETTINGS)
    assert levels(found) == ["failed"]
    assert "could not communicate" in told(found)


def test_topology_gives_each_pair_once():
    assert gpus.topology(TOPOLOGY) == {"GPU0-GPU1": "NV12", "GPU0-GPU2": "SYS", "GPU1-GPU2": "SYS"}
    assert gpus.topology("") == {}


def test_an_interface_that_is_not_there_fails(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    found = interconnect.check_interconnect(SETTINGS)
    assert "GLOO_SOCKET_IFNAME names 'eth99'" in told(found)
    assert levels(found).count("failed") == 1


def test_nccl_prefers_infiniband_and_avoids_docker(monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    rows = [{"name": name, "up": name != "eth1", "addresses": ["IPv4"]} for name in ("docker0", "eth1", "eth2", "ib0", "lo")]
    assert interconnect.chosen_by_nccl(rows)[0] == "ib0"
    assert interconnect.chosen_by_nccl(rows[:3])[0] == "eth2"
    assert interconnect.chosen_by_nccl(rows[:1])[0] == "docker0"
    assert interconnect.chosen_by_nccl([])[0] is None


def test_infiniband_ports(tmp_path):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("1: DOWN\n")
    (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    assert interconnect.infiniband(tmp_path) == [{"device": "mlx5_0", "port": "1", "state": "1: DOWN", "rate": "200 Gb/sec (4X HDR)", "link_layer": "?"}]


# collectives, compiler, self-test


@pytest.mark.parametrize(
    ("silent", "said"),
    [("import time; time.sleep(60)", "process 1: no answer in time"), ("raise SystemExit('connection refused')", "process 1: connection refused (exit code 1)")],
)
def test_a_worker_that_never_answers_or_dies(silent, said):
    def starter(rank):
        return [sys.executable, "-c", silent if rank else "print('{\"sum\": 3.0, \"MB/s\": 1}')"]

    found = collectives.collective("gloo", 2, starter, seconds=1.0, grace=0.5)
    assert levels(found) == ["failed"]
    assert said in told(found)


def test_one_process_per_gpu_up_to_eight(monkeypatch):
    asked = []
    monkeypatch.setattr(collectives, "collective", lambda backend, world: asked.append((backend, world)) or Findings())
    for gpus_there in (0, 2, 16):
        monkeypatch.setattr(collectives, "list_gpus", lambda count=gpus_there: [{}] * count)
        collectives.check_nccl(SETTINGS)
    assert asked == [("nccl", 2), ("nccl", 8)]


def test_children_are_processes_of_their_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert not {"WORLD_SIZE", "RANK"} & set(child.environment())
    assert (self_test.first_gpu(None), self_test.first_gpu("3,4"), self_test.first_gpu("")) == ("0", "3", "")


def test_no_compiler_and_a_broken_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in told(compiler.check_compiler(SETTINGS))
    (tmp_path / "g++").write_text("#!/bin/sh\necho 'fatal error: string: No such file' >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    found = compiler.check_compiler(SETTINGS)
    assert "does not compile a shared library: fatal error: string" in told(found)


@pytest.mark.parametrize(
    ("loss", "count", "sound", "failures"),
    [([5.0, 3.0], 100, True, 0), ([5.0, 4.9], 100, True, 1), ([5.0, float("nan")], 100, True, 1), ([5.0, 3.0], 0, True, 1), ([5.0, 4.9], 9, False, 2)],
)
def test_the_self_test_is_judged(loss, count, sound, failures):
    found = self_test.judge(Findings(), {"loss": loss, "sampled tokens": count, "sound": sound, "device": "cpu", "seconds": 1.0})
    assert levels(found) == ["failed"] * failures


def test_a_self_test_that_cannot_run_is_told(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(self_test, "ask", _no_answer)
    found = self_test.check_self_test(SETTINGS)
    assert "could not be trained and sampled: ImportError" in told(found)


def _no_answer(*_, **__):
    from launch.doctor.child import ChildError

    raise ChildError("ImportError: no module named torch (exit code 1)")
