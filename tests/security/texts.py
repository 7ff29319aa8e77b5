"""Attacks by configs, data, chat templates, job scripts and what is printed."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from tests.security.attack import HARMLESS, REFUSED, Attack, Place

SFT = "name: demo\ninit_from: base\ndata: rows.jsonl\n"
CHAIN = "name: demo\nbase: base\noutput: runs/demo\nsft: {data: rows.jsonl, train: {batch_size: 8, micro_batch_size: 1}}\n"


def config(text: str, *overrides: str, kind: str = "sft") -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from configs.load import load

        made = text.replace("CANARY", str(place.canary))
        load(place.write("config.yaml", made), kind, [word.replace("CANARY", str(place.canary)) for word in overrides])

    return run


def machine(text: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from launch.command import load_machine

        load_machine(str(place.write("machine.yaml", text.replace("CANARY", str(place.canary)))), None)

    return run


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
MERGES = "a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(9)) + "}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


def rows(name: str, content: str | bytes) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from configs.schema.common import Source
        from stages.data import read_demonstrations

        read_demonstrations([Source(path=str(place.write(name, content)))])

    return run


def template(jinja: str, prompt: str = "hello") -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from stages import data, models

        tokenizer = models.load_tokenizer(models.find(str(place.sound), place.folder))
        file = place.write("template.jinja", jinja.replace("CANARY", str(place.canary)))
        data.Formatter(tokenizer, str(file)).prompt_ids(prompt)

    return run


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
WALKS = {
    "__class__.__mro__": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}",
    "cycler's globals": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "lipsum's globals": "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "raise_exception's globals": "{{ raise_exception.__globals__['json'].__builtins__['__import__']('os').mkdir('CANARY') }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) + ''.__class__ }}",
    "map(attribute)": "{{ [messages]|map(attribute='__class__')|first|attr('mro') }}",
    "self": "{{ self.__init__.__globals__['os'].mkdir('CANARY') }}",
    "namespace": "{% set ns = namespace(x=1) %}{{ ns.__init__.__globals__.os.mkdir('CANARY') }}",
    "generator's frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
}


def slurm_in(name: str) -> Callable[[Place], None]:
    """The script's own assignments and submit.sh are run by a real shell, with sbatch and mkdir that do nothing."""

    def run(place: Place) -> None:
        from launch.cluster import job, slurm

        out = place.folder / name
        chain = place.write("chain.yaml", CHAIN)
        made = job.prepare(str(chain), [], nodes=1, gpus_per_node=0, machine="cpu", out=out, kind="slurm", workdir=place.folder)
        files = slurm.slurm_files(made, slurm.Slurm(log_dir=Path(f"logs {name}"), activate=f"env {name}"))
        for file, content in files.items():
            if file.suffix in (".sbatch", ".sh"):
                words = [line for line in content.splitlines() if file.name == "submit.sh" or line.startswith(("CHAIN=", "OUTPUT=", "REGISTRY=", "LOGS="))]
                told = subprocess.run(["bash", "-c", "sbatch() { echo 1; }; mkdir() { :; }; cd() { :; }\n" + "\n".join(words)], cwd=place.folder, capture_output=True, text=True, timeout=20, check=False)
                assert told.returncode == 0, (told, words)

    return run


def slurm_option(**options: Any) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from launch.cluster import slurm

        slurm.Slurm(**options).check()

    return run


def kubernetes(where: str, **options: Any) -> Callable[[Place], None]:
    """The manifest is read back: no document but ours, and no key that we did not write."""

    def run(place: Place) -> None:
        from launch.cluster import job
        from launch.cluster import kubernetes as k8s

        chain = place.write("chain.yaml", CHAIN)
        made = job.prepare(str(chain), [f"registry={json.dumps(where)}"], nodes=1, gpus_per_node=0, machine="cpu", out=place.folder / "out", kind="k8s", workdir=Path("/data"))
        documents = list(yaml.safe_load_all(k8s.manifest(made, k8s.Kubernetes(**({"image": "image", "claim": "claim"} | options)))))
        kinds = [document["kind"] for document in documents]
        assert kinds == ["ConfigMap", "Service", "Job"], kinds

    return run


def launched(value: str) -> Callable[[Place], None]:
    """A variable of the environment that becomes a word of the command."""

    def run(place: Place) -> None:
        from launch.command import load_machine, stage_command

        with environment_with(ALIGN_RANK_LOGS=value.replace("CANARY", str(place.canary))):
            made = stage_command("stages.sft", place.folder / "$(mkdir CANARY).yaml", load_machine("cpu", None), 2)
        assert value.replace("CANARY", str(place.canary)) in made.argv
        import shlex

        assert shlex.split(made.typed)[2:] == list(made.argv[3:])

    return run


@contextlib.contextmanager
def environment_with(**values: str) -> Any:
    import os

    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def aligned(*words: str) -> tuple[int, str]:
    """Exit code, and all that an `align` command prints."""
    from launch.cli import main

    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(list(words))
    return code, told.getvalue()


ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def shown(text: str) -> None:
    assert not any(character in text for character in "\x1b\x07\x9b\u202e"), ascii(text)


def printed_by_data(*words: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        file = place.write("rows.jsonl", json.dumps({"prompt": ESCAPE + "q", "completion": "a" + ESCAPE}) + "\n" + json.dumps({"prompt": "{{ " + "x" + " }}" + ESCAPE, "completion": "b"}) + "\n")
        code, told = aligned("data", *(word.replace("FILE", str(file)).replace("MODEL", str(place.sound)) for word in words))
        assert code == 0, told
        shown(told)

    return run


def printed_in_an_error(place: Place) -> None:
    file = place.write("rows.jsonl", json.dumps({ESCAPE: "q", "completion": "a"}) + "\n")
    code, told = aligned("data", "check", str(file))
    shown(told)
    assert code == 2
    raise UserError(told)


def printed_by_a_stage(place: Place) -> None:
    from stages.training.ranks import say

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        say(f"prompt {ESCAPE}")
    shown(told.getvalue())


def printed_by_the_evaluation(place: Place) -> None:
    from stages.evaluation.table import show

    figures = {"prompts": 1, "score": {"mean": 1.0, "se": None}, "win_rate": 0.5, "win_rate_ci": [0, 1], "kl": None, "length": 1.0, "eos_rate": 1.0, "perplexity": None}
    result = {
        "models": {f"[red]{ESCAPE}": figures}, "against": "a", "reference": "a", "too_long": 0, "eval_set": "x", "eval_set_detail": {"subset": "test", "samples_per_prompt": 1},
        "samples": [{"prompt": ESCAPE + "[blink]", "completions": {"a": ESCAPE + "[/]"}, "scores": {"a": 1.0}}],
    }  # fmt: skip
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        show(result)
    shown(told.getvalue())
    assert "[blink]" in told.getvalue()


def printed_by_the_registry(place: Place) -> None:
    from stages.registry import Registry

    registry = Registry(place.folder / "registry")
    info = {"config": {"note": ESCAPE}, "metrics": {ESCAPE: 1.0}}
    registry.publish("sft", "demo", lambda folder: (folder / "config.json").write_text("{}"), info=info)
    for command in (["list"], ["show", "sft/demo"], ["lineage", "sft/demo"]):
        code, told = aligned("registry", *command, "--registry", str(registry.root))
        assert code == 0
        shown(told)


def token_on_the_command_line(place: Place) -> None:
    from configs.load import load

    with pytest.raises(UserError) as told:
        load(place.write("config.yaml", SFT), "sft", ["trainer.hub_token=hf_secretsecret"])
    assert "hf_secretsecret" not in str(told.value)
    raise told.value


def said_by_a_stranger(content: bytes) -> Callable[[Place], None]:
    """Whoever reaches the port where nodes meet may say anything; node 0 sends it away and goes on waiting."""

    def run(place: Place) -> None:
        import socket

        from launch.meeting import _admit
        from launch.nodes import Nodes

        ours, theirs = socket.socketpair()
        arrived: dict[int, Any] = {}
        with ours, theirs:
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                theirs.send(content)
            theirs.shutdown(socket.SHUT_WR)
            _admit(ours, "stranger", Nodes(count=2), {}, arrived)
        assert not arrived

    return run


ATTACKS = [
    Attack("!!python/object/apply", "a config", REFUSED, config(SFT + "seed: !!python/object/apply:os.mkdir [CANARY]\n")),
    Attack("!!python/object/apply as a key", "a config", REFUSED, config(SFT + "? !!python/object/apply:os.mkdir [CANARY]\n: 1\n")),
    Attack("!!python/name", "a config", REFUSED, config(SFT + "seed: !!python/name:os.system\n"), "python/name"),
    Attack("!!python/module", "a config", REFUSED, config(SFT + "seed: !!python/module:antigravity\n"), "python/module"),
    Attack("!!python/object/new in an override", "the command line", REFUSED, config(SFT, "seed=!!python/object/new:os.mkdir [CANARY]")),
    Attack("override of __class__", "the command line", REFUSED, config(SFT, "__class__.__init__.__globals__=1"), "__class__"),
    Attack("override that adds a line", "the command line", REFUSED, config(SFT, "seed=1\nregistry: /tmp/x")),
    Attack("unknown key", "a config", REFUSED, config(SFT + "trust_remote_code: true\n"), "trust_remote_code"),
    Attack("trainer.trust_remote_code", "a config", REFUSED, config(SFT + "trainer: {trust_remote_code: true}\n"), "remote code is off"),
    Attack("trainer.hub_token", "a config (it would be kept with the checkpoint)", REFUSED, config(SFT + "trainer: {hub_token: hf_x}\n"), "hf auth login"),
    Attack("trainer.push_to_hub", "a config", REFUSED, config(SFT + "trainer: {push_to_hub: true}\n"), "registry"),
    Attack("token in an override", "the error's text", REFUSED, token_on_the_command_line, "***"),
    *(Attack(f"name: {name!r}", "a config", REFUSED, config(SFT.replace("demo", json.dumps(name))), "name") for name in ("../../evil", "$(mkdir CANARY)", "a b", "a\nb", "-rf", "")),
    Attack("keys that stand twice", "a config", REFUSED, config(SFT + "name: other\n"), "stands twice"),
    Attack("billion laughs", "a config", REFUSED, config(LAUGHS)),
    Attack("billion laughs of merges", "a config", REFUSED, config(MERGES)),
    Attack("anchor in itself", "a config", REFUSED, config(SFT + "data: &a [*a]\n")),
    Attack("brackets without end", "a config", REFUSED, config(SFT + "data: " + "[" * 20_000)),
    Attack("mappings without end", "a config", REFUSED, config(SFT + "data: " + "{a: " * 20_000)),
    Attack("integer of 100,000 digits", "a config", REFUSED, config(SFT + "seed: 1" + "0" * 100_000 + "\n")),
    Attack("1e999", "a config", REFUSED, config(SFT + "train: {learning_rate: 1e999}\n")),
    Attack("null byte", "a config", REFUSED, config(SFT + "output: \0\n")),
    Attack("!!python/object/apply", "a machine file", REFUSED, machine("use_cpu: !!python/object/apply:os.mkdir [CANARY]\n")),
    Attack("keys that stand twice", "a machine file", REFUSED, machine("use_cpu: true\nuse_cpu: false\n"), "stands twice"),
    Attack("billion laughs", "a machine file", REFUSED, machine(LAUGHS)),
    Attack("a list", "a machine file", REFUSED, machine("[1, 2]\n"), "Accelerate config"),
    Attack("brackets without end", "rows.jsonl", REFUSED, rows("rows.jsonl", '{"prompt": ' + "[" * 100_000 + "\n")),
    Attack("integer of 10,000 digits", "rows.jsonl", REFUSED, rows("rows.jsonl", '{"prompt": 1' + "0" * 10_000 + "}\n")),
    Attack("brackets without end", "rows.json", REFUSED, rows("rows.json", "[" * 100_000)),
    Attack("integer of 10,000 digits", "rows.json", REFUSED, rows("rows.json", '[{"prompt": 1' + "0" * 10_000 + "}]")),
    Attack("brackets without end in a cell", "rows.csv", HARMLESS, rows("rows.csv", 'prompt,completion\n"[{' + "[" * 100_000 + '",b\n')),
    Attack("a line of 640 MiB in 640 KiB", "rows.jsonl.gz", REFUSED, rows("rows.jsonl.gz", b"".join([gzip.compress(b'{"prompt": "'), gzip.compress(b"a" * 2**26) * 10])), "unpacks"),
    *(Attack(f"template: {name}", "the sandbox of chat templates", REFUSED, template(PLAIN + walk), "cannot render") for name, walk in WALKS.items()),
    Attack("template: range(10**9)", "a chat template", REFUSED, template(PLAIN + "{% for i in range(10**9) %}{% endfor %}")),
    Attack("template: loops in loops", "a chat template", REFUSED, template(PLAIN + LOOPS), "takes more than"),
    Attack("template: one long call", "a chat template", REFUSED, template(PLAIN + "{{ 10 ** (10 ** 9) }}"), "takes more than"),
    Attack("template: loops for one prompt only", "a chat template", REFUSED, template(PLAIN + "{% if 'boom' in messages[0].content %}" + LOOPS + "{% endif %}", "boom"), "takes more than"),
    Attack("template: a text of 100 GB", "a chat template", REFUSED, template(PLAIN + "{{ 'a' * 10**11 }}"), "takes more than"),
    Attack("template: padding of 100 GB", "a chat template", REFUSED, template(PLAIN + "{{ '%099999999999d' % 1 }}")),
    Attack("template: a text that doubles", "a chat template", REFUSED, template("{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}" + PLAIN), "takes more than"),
    Attack("template: a macro that calls itself", "a chat template", REFUSED, template(PLAIN + "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "cannot render"),
    Attack("template: division by zero", "a chat template", REFUSED, template(PLAIN + "{{ 1 / 0 }}"), "cannot render"),
    Attack("(control) a plain template", "a chat template", HARMLESS, template(PLAIN)),
    *(Attack(f"folder {name}", "SLURM scripts", HARMLESS, slurm_in(name)) for name in ("$(touch CANARY)", "`touch CANARY`", '";touch CANARY;"', "';touch CANARY;'", "a b", "\\")),
    Attack("folder ${HOME}", "SLURM scripts", REFUSED, slurm_in("${HOME}"), "HOME"),
    Attack("folder with a line break", "SLURM scripts", REFUSED, slurm_in("a\ntouch CANARY"), "line break"),
    *(Attack(f"--{key} {value!r}", "SLURM options", REFUSED, slurm_option(**{key: value}), "sbatch option") for key, value in (("partition", "gpu --wrap=x"), ("account", "a;mkdir"), ("qos", "$(mkdir)"), ("time", "1\n#SBATCH --x"), ("network_interface", '"; mkdir'))),
    Attack("registry with a line break", "Kubernetes manifests", HARMLESS, kubernetes("r\n---\nkind: Evil\napiVersion: v1\n---\n#")),
    Attack("image with a line break", "Kubernetes manifests", HARMLESS, kubernetes("r", image="x\n---\nkind: Evil\n")),
    Attack("mount with a line break", "Kubernetes manifests", REFUSED, kubernetes("r", mount="/d\n---\nkind: Evil\n"), "--mount"),
    Attack("claim with a line break", "Kubernetes manifests", REFUSED, kubernetes("r", claim="c\n---"), "--claim"),
    *(Attack(f"ALIGN_RANK_LOGS {value}", "the launcher's command", HARMLESS, launched(value)) for value in ("$(mkdir CANARY)", "; mkdir CANARY", "a b")),
    *(Attack(f"stranger says {name}", "the port where nodes meet", HARMLESS, said_by_a_stranger(content)) for name, content in (("brackets without end", b"[" * 100_000 + b"\n"), ("a pickle", b"cos\nsystem\n."), ("nothing", b""), ("a list", b"[1]\n"))),
    Attack("escape sequences in rows", "align data check", HARMLESS, printed_by_data("check", "FILE")),
    Attack("escape sequences in rows", "align data show", HARMLESS, printed_by_data("show", "FILE", "--tokenizer", "MODEL")),
    Attack("escape sequences in a row's names", "an error", REFUSED, printed_in_an_error),
    Attack("escape sequences in a text", "a stage's log", HARMLESS, printed_by_a_stage),
    Attack("escape sequences and markup in samples", "the evaluation's table", HARMLESS, printed_by_the_evaluation),
    Attack("escape sequences in a manifest", "align registry", HARMLESS, printed_by_the_registry),
]
