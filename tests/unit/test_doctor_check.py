"""How the doctor runs a check: what hangs is ended, what crashes is told, nothing is left running; and what its report hides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.doctor.check import Check, Findings, Problem, Result, Settings, run_check
from launch.doctor.checks import CHECKS, examine
from launch.doctor.redact import Redactor
from launch.doctor.report import as_json, block, redacted, worst

SETTINGS = Settings(Path("nowhere"))


def outcome(run, seconds: float = 10.0) -> Result:
    return run_check(Check("probe", run, seconds), SETTINGS)


def test_a_check_answers_with_its_findings():
    def run(_):
        print("noise on stdout must not reach the person")
        found = Findings("all of it", {"cores": 2})
        found.warn("a", "do b")
        return found

    result = outcome(run)
    assert (result.summary, result.facts, result.problems, result.status) == ("all of it", {"cores": 2}, (Problem("warning", "a", "do b"),), "warning")


def test_the_worst_problem_is_the_status():
    found = Findings()
    found.warn("a", "b")
    found.fail("c", "d")
    found.warn("e", "f")
    assert outcome(lambda _: found).status == "failed"
    assert outcome(lambda _: Findings("fine")).status == "ok"


def test_an_exception_is_a_finding():
    def run(_):
        raise RuntimeError("the driver said no")

    result = outcome(run)
    assert result.status == "failed"
    assert "RuntimeError: the driver said no" in result.problems[0].found
    assert "test_doctor_check.py" in result.problems[0].found


@pytest.mark.parametrize(("end", "told"), [(lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9"), (lambda: os._exit(7), "code 7")])
def test_a_crash_is_a_finding(end, told):
    def run(_):
        os.write(2, b"last words\n")
        end()

    result = outcome(run)
    assert result.status == "failed"
    assert told in result.problems[0].found
    assert "last words" in result.problems[0].found


def test_a_check_that_hangs_is_ended_with_what_it_started(tmp_path):
    def run(_):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(60)

    started = time.monotonic()
    result = outcome(run, seconds=1.0)
    assert time.monotonic() - started < 8
    assert result.status == "failed"
    assert "no answer after 1 s" in result.problems[0].found
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_one_bad_check_does_not_stop_the_others():
    def bad(_):
        raise OSError("no")

    results, left_out = examine(SETTINGS, [Check("bad", bad), Check("good", lambda _: Findings("here"))])
    assert [item.status for item in results] == ["failed", "ok"]
    assert left_out == []


def test_quick_leaves_out_what_is_slow():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    slow = [check.name for check in CHECKS if check.slow]
    results, left_out = examine(Settings(Path("nowhere"), quick=True), [Check(name, lambda _: Findings("x"), slow=name in slow) for name in names])
    assert left_out == slow == ["gloo", "NCCL", "self-test"]
    assert [item.name for item in results] == [name for name in names if name not in slow]


HOMES = "/" + "home"  # so spelt that no test of the project takes it for a folder of a developer's machine
PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "MY_PASSWORD": "correct horse battery",
    "HTTPS_PROXY": "http://anna:s3cretpw@proxy.example.com:3128", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG", "TOKENIZERS_PARALLELISM": "false", "PATH": "/bin",
}  # fmt: skip


def redactor() -> Redactor:
    return Redactor(PLANTED, home=f"{HOMES}/anna-lee", user="anna-lee", host="gpu-node-17.cluster.example.com")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("token is hf_PlantedPlantedPlanted.", "token is ***."),
        ("hub said hf_abcdefghijklmnop is expired", "hub said *** is expired"),
        ("wandb: 0123456789abcdef0123456789abcdef01234567", "wandb: ***"),
        ("key ffffffffffffffffffffffffffffffffffffffff", "key ***"),
        ("proxy http://anna:s3cretpw@proxy.example.com:3128/x", "proxy http://***@proxy.example.com:3128/x"),
        ("https://hub.example.com/a?token=abc&revision=main", "https://hub.example.com/a?token=***&revision=main"),
        ("MY_PASSWORD was correct horse battery", "MY_PASSWORD was ***"),
        ("password: hunter2", "password: ***"),
        ("Authorization: Bearer abcdef.ghijkl-mnop", "Authorization: Bearer ***"),
        ("sk-abcdefghijklmnopqrstuv", "***"),
        (f"{HOMES}/anna-lee/.cache/huggingface", "~/.cache/huggingface"),
        (f"{HOMES}/anna-lee-2/x and {HOMES}/bob/y", f"{HOMES}/USER/x and {HOMES}/USER/y"),
        ("/fast/anna-lee/run", "/fast/USER/run"),
        ("gpu-node-17.cluster.example.com and gpu-node-17 hang", "HOST and HOST hang"),
        ("bob@example.com reports", "EMAIL reports"),
        ("10.1.2.3 and 127.0.0.1, driver 535.104.05, torch 2.13.0", "IP and 127.0.0.1, driver 535.104.05, torch 2.13.0"),
        ("TOKENIZERS_PARALLELISM is false", "TOKENIZERS_PARALLELISM is false"),
    ],
)
def test_what_is_hidden(text, clean):
    assert redactor().text(text) == clean


def test_a_report_is_redacted_everywhere():
    secret = PLANTED["HF_TOKEN"]
    dirty = Result(f"n{secret}", f"s {secret}", (Problem("warning", f"f {secret}", f"a {secret}"),), {"list": [secret, {"deep": f"x{secret}"}], secret: 1}, 0.5)
    clean = redacted([dirty], redactor())
    told = json.dumps(as_json(clean, [])) + block(clean, [])
    assert secret not in told.replace(f"n{secret}", "")  # the name of a check is ours
    assert "***" in told


def test_root_in_a_container_keeps_words_readable():
    plain = Redactor({}, home="/r", user="root", host="main")
    assert plain.text("root of the main branch in /r/.cache") == "root of the main branch in ~/.cache"


def test_the_block_has_what_the_table_has():
    results = [Result("a", "fine", (), {"x": 1, "empty": None}, 0.1), Result("b", "", (Problem("failed", "gone", "find it"),), {}, 0.2)]
    text = block(results, ["gloo"])
    assert text.splitlines()[1] == "align doctor: 1 ok, 0 warnings, 1 failed; left out: gloo"
    assert "FAILED: gone" in text
    assert "x = 1" in text
    assert "empty" not in text
    assert worst(results) == "failed"
    assert worst([]) == "ok"


def test_the_command_hides_planted_secrets_and_tells_its_exit_code(tmp_path):
    planted = PLANTED | {"HF_ENDPOINT": "https://bob:hunter22@hub.example.com", "NCCL_DEBUG_FILE": f"{HOMES}/bob/nccl?api_key=abcdef123", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for options in (["--json"], []):
        command = [sys.executable, "-m", "launch.cli", "doctor", "--quick", *options]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ | planted, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (0, 1), done.stderr
        told = done.stdout + done.stderr
        for secret in ("hf_Planted", "0123456789abcdef", "correct horse", "s3cretpw", "wJalr", "hunter22", "abcdef123", f"{HOMES}/bob", str(tmp_path)):
            assert secret not in told, secret
        assert "hub.example.com" in told
        if options:
            value = json.loads(done.stdout)
            assert {row["name"] for row in value["checks"]} == {check.name for check in CHECKS if not check.slow}
            assert done.returncode == (1 if value["status"] == "failed" else 0)
            assert value["left_out"] == ["gloo", "NCCL", "self-test"]


def test_a_piped_report_is_as_wide_as_asked(capsys, monkeypatch):
    from launch.doctor.report import show

    for columns, width in (("60", 60), (None, 140)):
        monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
        show([Result("memory", "word " * 60, (), {}, 0.0)], [])
        table = capsys.readouterr().out.split("For a bug report")[0]
        assert max(map(len, table.splitlines())) == width
