"""The `align` command: light to start, exact exit codes, children that end as they should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from launch import cli
from launch.command import Machine, child_environment, stage_command
from launch.process import run_child

HEAVY = ("torch", "transformers", "trl", "datasets", "numpy", "pydantic", "rich", "yaml", "pandas", "accelerate")


@pytest.mark.parametrize("argv", [["--help"], ["sft", "--help"], ["ppo", "--help"], ["run", "--help"]])
def test_help_loads_nothing_heavy(argv):
    code = (
        "import sys; from launch.cli import main\n"
        f"try: main({argv!r})\nexcept SystemExit: pass\n"
        f"sys.exit(' '.join(sorted(set(sys.modules) & set({HEAVY!r}))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"imported at --help: {done.stderr}"
    assert "usage: align" in done.stdout


def test_every_verb_is_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"    {verb} " in out for verb in cli.VERBS)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.split()[0] == "align"


def test_no_verb_and_unknown_verb_exit_2(capsys):
    for argv in ([], ["trian"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_overrides_may_stand_anywhere():
    args = cli.parse(["sft", "a=1", "--config", "f.yaml", "b=2", "--dry-run", "c=3"])
    assert (args.overrides, args.config, args.dry_run) == (["a=1", "b=2", "c=3"], "f.yaml", True)
    assert cli.parse(["run", "--only", "sft", "chain.yaml", "--json", "x=1"]).overrides == ["x=1"]


def test_an_unknown_option_exits_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(["sft", "--config", "f.yaml", "--epochs", "2"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --epochs" in capsys.readouterr().err


def _verb(monkeypatch, error: BaseException | None = None, result: int | None = None):
    class Module:
        @staticmethod
        def add_parser(verbs):
            def handler(_args):
                if error is not None:
                    raise error
                return result

            verbs.add_parser("probe").set_defaults(handler=handler)

    monkeypatch.setitem(cli.VERBS, "probe", ("probe_module", "a probe"))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Module)


def test_user_error_is_printed_without_traceback_and_exits_2(monkeypatch, capsys):
    _verb(monkeypatch, UserError("data.jsonl:3: no prompt"))
    assert cli.main(["probe"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: data.jsonl:3: no prompt\n"
    assert captured.out == ""


def test_interrupt_exits_130_and_results_pass_through(monkeypatch, capsys):
    _verb(monkeypatch, KeyboardInterrupt())
    assert cli.main(["probe"]) == 130
    _verb(monkeypatch, result=7)
    assert cli.main(["probe"]) == 7
    _verb(monkeypatch, result=None)
    assert cli.main(["probe"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    _verb(monkeypatch, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_a_reader_that_has_gone_is_no_error():
    code = "from launch import cli\nimport sys\ndef big(_):\n    for _ in range(100000): print('x' * 80)\n" \
        "import types\nm = types.SimpleNamespace(add_parser=lambda v: v.add_parser('probe').set_defaults(handler=big))\n" \
        "cli.VERBS['probe'] = ('m', ''); cli.importlib.import_module = lambda n: m\nsys.exit(cli.main(['probe']))"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -c \"$CODE\" | head -1"],
                          env={**os.environ, "CODE": code}, capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def _machine(**settings) -> Machine:
    return Machine(Path("m.yaml"), settings)


def test_one_process_starts_without_the_launcher_but_prints_its_line():
    command = stage_command("stages.sft", Path("a b.yaml"), _machine(distributed_type="NO", use_cpu=True, num_processes=1))
    assert command.argv == (sys.executable, "-m", "stages.sft", "--config", "a b.yaml")
    assert command.typed == "accelerate launch --config_file m.yaml --num_processes 1 -m stages.sft --config 'a b.yaml'"
    assert command.extra_env["ACCELERATE_USE_CPU"] == "True"


@pytest.mark.parametrize(
    ("environment", "tied"),
    [
        ({"ACCELERATE_LOG_LEVEL": "info", "ACCELERATE_USE_CPU": "True"}, False),  # a person's own: under nohup it outlives the shell
        ({"TORCHELASTIC_RUN_ID": "1"}, True),
        (child_environment(1), True),
    ],
)
def test_a_stage_ends_with_its_launcher_and_with_nothing_else(environment, tied):
    code = (
        "import ctypes, types; from stages.training.entry import end_with_the_launcher as end; calls = []\n"
        "ctypes.CDLL = lambda name: types.SimpleNamespace(prctl=lambda *given: calls.append(given))\n"
        "end(); print(len(calls))"
    )
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "TORCHELASTIC", "ALIGN_"))}
    done = subprocess.run([sys.executable, "-c", code], env=plain | environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("1" if tied else "0")


def test_several_processes_start_under_accelerate_on_a_free_port():
    command = stage_command("stages.ppo", Path("c.yaml"), _machine(distributed_type="MULTI_CPU", use_cpu=True, num_processes=2))
    assert command.argv[:3] == (sys.executable, "-m", "accelerate.commands.launch")
    assert command.argv[3:] == (
        "--config_file", "m.yaml", "--num_processes", "2", "--main_process_port", "0", "-m", "stages.ppo", "--config", "c.yaml",
    )  # fmt: skip


def test_deepspeed_keeps_the_launcher_for_one_process_and_processes_override_the_file():
    command = stage_command("stages.sft", Path("c.yaml"), _machine(distributed_type="DEEPSPEED", num_processes=8), 1)
    assert "accelerate.commands.launch" in command.argv
    assert command.processes == 1


def test_threads_are_shared_out_and_the_users_settings_win(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(6)), raising=False)
    assert child_environment(2)["OMP_NUM_THREADS"] == "3"
    assert child_environment(8)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in child_environment(2)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    assert child_environment(1)["HF_HUB_DISABLE_TELEMETRY"] == "1"


def _child(code: str, tmp_path: Path, **options):
    return run_child([sys.executable, "-c", code], dict(os.environ), tmp_path / "logs" / "x.log", **options)


def test_output_is_prefixed_and_logged(tmp_path, capfdbinary):
    outcome = _child("print('one'); print('10%\\r20%')", tmp_path, prefix="sft")
    assert outcome.code == 0
    assert capfdbinary.readouterr().out == b"[sft] one\n[sft] 20%\n"
    assert (tmp_path / "logs" / "x.log").read_bytes().splitlines()[1:] == [b"one", b"20%"]


def test_a_log_on_a_full_disk_costs_lines_and_stops_no_child(tmp_path, capfdbinary):
    """More than a pipe holds: the child would wait for ever for somebody to read."""
    code = "for i in range(3000): print('x' * 100)\nprint('done')"
    outcome = run_child([sys.executable, "-c", code], dict(os.environ), Path("/dev/full"), prefix="sft")
    out = capfdbinary.readouterr().out
    assert outcome.code == 0
    assert b"[sft] done" in out
    assert out.count(b"the log can't be written (No space left on device)") == 1


def test_a_stages_user_error_is_shown_once_and_its_exit_code_passed_on(tmp_path, capfdbinary):
    outcome = _child("import sys; print('error: no such file', file=sys.stderr); sys.exit(2)", tmp_path, prefix="sft")
    assert outcome.code == 2
    captured = capfdbinary.readouterr()
    assert captured.err == b"error: no such file\n"
    assert captured.out == b""


def test_an_error_of_two_workers_is_one_error_and_exit_code_2(tmp_path, capfdbinary):
    """What torch's agent prints after its workers have exited with 2, shortened."""
    code = (
        "import sys\n"
        "print('error: batch_size 3 does not divide\\n  by 2 processes')\n"
        "print('error: batch_size 3 does not divide\\n  by 2 processes')\n"
        "print('E1122 16:00:00 torch/elastic failed (exitcode: 2) local_rank: 0')\n"
        "print('Traceback (most recent call last):\\n  ...\\n  exitcode  : 2 (pid: 1)'); sys.exit(1)"
    )
    outcome = _child(code, tmp_path)
    assert outcome.code == 2
    assert capfdbinary.readouterr().err == b"error: batch_size 3 does not divide\n  by 2 processes\n"


def test_a_crash_is_not_taken_for_a_user_error(tmp_path):
    assert _child("import sys; print('error: x'); print('exitcode : 1'); sys.exit(1)", tmp_path).code == 1
    assert _child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path).code == 137


def test_a_signal_that_ended_the_process_or_its_first_worker_is_told_apart_from_an_error(tmp_path):
    agent = "import sys; print('api.py:1002] failed (exitcode: {}) local_rank: 0'); print('[1]: exitcode  : -15'); sys.exit(1)"
    assert _child(agent.format(-6), tmp_path).died
    assert not _child(agent.format(1), tmp_path).died
    assert not _child("print('error: x'); " + agent.format(-6), tmp_path).died
    assert _child("import os; os.abort()", tmp_path).died


def test_the_traceback_of_an_interrupt_is_for_the_log(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom launch.process import run_child\n"
        "child = 'import os, time\\nprint(\\'ready\\', flush=True)\\ntime.sleep(60)'\n"
        "print(run_child([sys.executable, '-c', child], dict(os.environ), Path(sys.argv[1])).code)"
    )
    log = tmp_path / "x.log"
    parent = subprocess.Popen([sys.executable, "-c", code, str(log)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGINT)
    assert parent.communicate(timeout=20) == ("130\n", "")
    assert "KeyboardInterrupt" in log.read_text()


PARENT = """
import os, sys
from pathlib import Path
from launch.process import run_child
child = '''
import os, signal, sys, time, subprocess
grandchild = subprocess.Popen(["sleep", "60"])
def stop(number, frame):
    print("saved on", number, flush=True); sys.exit(3)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
print("ready", os.getpid(), grandchild.pid, flush=True)
time.sleep(60)
'''
outcome = run_child([sys.executable, "-c", child], dict(os.environ), Path(sys.argv[1]))
print("outcome", outcome.code, outcome.interrupted, flush=True)
"""


def _start_parent(tmp_path: Path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "x.log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()[1:]]
    return parent, pids


def _gone(pid: int, within: float = 5.0) -> bool:
    from stages.processes import start_time

    until = time.monotonic() + within
    while start_time(pid) is not None and time.monotonic() < until:
        time.sleep(0.02)
    return start_time(pid) is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 3), (signal.SIGINT, 130)])
def test_signals_reach_the_child_and_nothing_is_left(tmp_path, number, code):
    parent, pids = _start_parent(tmp_path)
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=20)
    assert out.splitlines() == [f"saved on {int(number)}", f"outcome {code} True"]
    assert all(_gone(pid) for pid in pids)


def test_the_child_dies_with_a_killed_parent(tmp_path):
    parent, (child, grandchild) = _start_parent(tmp_path)
    parent.kill()
    parent.wait()
    assert _gone(child)
    os.kill(grandchild, signal.SIGKILL)  # a process that the stage itself started is the stage's to end
    parent.stdout.close()
