"""Attacks on what is carried into a registry and out of it: imports, exports and their model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.security.attack import HARMLESS, REFUSED, Attack, Place
from tests.security.folders import AUTO_MAP, copied


def imported(change: Callable[[Place, Path], Any], family: str = "sft/demo") -> Callable[[Place], None]:
    """`align registry import` of a folder that was changed; what it publishes must hold nothing of the change."""

    def run(place: Place) -> None:
        from stages.registry import Registry
        from stages.registry.importing import import_model

        folder = place.model()
        (folder / "evil.py").write_text(place.code)
        place.write("secret.txt", "the secret")
        change(place, folder)
        checkpoint = import_model(Registry(place.folder / "registry"), str(folder), family)
        assert not list(checkpoint.model_dir.glob("*.py"))
        assert not any(path.is_symlink() or b"the secret" in path.read_bytes() or b"evil" in path.read_bytes() for path in checkpoint.model_dir.iterdir())

    return run


def linked_weights(place: Place, folder: Path) -> None:
    (folder / "model.safetensors").rename(place.folder / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(place.folder / "elsewhere.safetensors")


def linked_notes(place: Place, folder: Path) -> None:
    (folder / "notes.json").symlink_to(place.folder / "secret.txt")


def pickled_only(place: Place, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    place.torch_save(folder / "pytorch_model.bin")


def licence_with_escapes(place: Place, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: \x1b[2Jevil\n---\n")


def pushed(name: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from stages.registry.pushing import check_repo

        check_repo(name)

    return run


def exported(info: dict[str, Any], samples: list[dict[str, Any]] | str | None = None, evaluation: dict[str, Any] | None = None, link: bool = False) -> Callable[[Place], None]:
    """The card of an export of a checkpoint that records `info`: no HTML, link or escape sequence of the attacker's lives in it."""

    def run(place: Place) -> None:
        from stages.registry import Registry
        from stages.registry.exporting import Options, export

        registry = Registry(place.folder / "registry")
        checkpoint = registry.publish("sft", "demo", lambda folder: copied(place.sound, folder), info=info)
        if evaluation:
            registry.add_evaluation(checkpoint, evaluation)
        file = None
        if samples is not None:
            file = place.write("samples.jsonl", samples if isinstance(samples, str) else "".join(json.dumps(row) + "\n" for row in samples))
        target = place.folder / "export"
        if link:
            target.symlink_to(place.folder / "registry")
        export(registry, "sft/demo", target, Options(samples=file))
        card = (target / "README.md").read_text()
        assert "\x1b" not in card
        outside, fence = [], ""
        for line in card.split("\n"):  # what stands in a code block is text
            if fence:
                fence = "" if line == fence else fence
            elif line.startswith("```"):
                fence = line.rstrip("abcdefghijklmnopqrstuvwxyz")
            else:
                outside.append(line)
        assert not fence
        body = "\n".join(outside).split("\n---\n", 1)[1]  # the first lines are YAML
        assert "<script" not in body, body
        assert "[x](" not in body, body

    return run


SCRIPT = "<script>alert(1)</script> [x](javascript:y) ![x](http://tracker) | \x1b[2J"


ATTACKS = [
    Attack("HTML in metrics", "the model card", HARMLESS, exported({"metrics": {SCRIPT: 1.0}})),
    Attack("HTML in the data's facts", "the model card", HARMLESS, exported({"data": {"rows": {SCRIPT: 1}, "dropped": {SCRIPT: 2}, "split": {"seed": SCRIPT}}})),
    Attack("HTML in a config", "the model card", HARMLESS, exported({"config": {"note": "```\n" + SCRIPT}})),
    Attack("HTML in an evaluation", "the model card", HARMLESS, exported({}, evaluation={"eval_set": "abc", "against": SCRIPT, "metrics": {SCRIPT: {"mean": 1.0, "se": 0.1}}})),
    Attack("code fences and HTML in samples", "the model card", HARMLESS, exported({}, [{"prompt": "```\n" + SCRIPT, "completion": "`````\n" + SCRIPT}])),
    Attack("samples without end", "align registry export", REFUSED, exported({}, "[" * 100_000 + "\n"), "--samples"),
    Attack("target is a link", "align registry export", REFUSED, exported({}, link=True), "link"),
    *(Attack(f"push to {name!r}", "align registry push", REFUSED, pushed(name), "no name on the hub") for name in ("../x", "a/b/c", "a/..", "org/x --all", "org/x\ny")),
    Attack("weights are a link out of the folder", "align registry import", REFUSED, imported(linked_weights), "link"),
    Attack("a link to a secret", "align registry import", HARMLESS, imported(linked_notes)),
    Attack("weights are a pickle", "align registry import", REFUSED, imported(pickled_only), "pickle"),
    Attack("auto_map", "align registry import", HARMLESS, imported(lambda place, folder: place.settings(folder / "config.json", auto_map=AUTO_MAP))),
    Attack("attn_implementation of a hub", "align registry import", REFUSED, imported(lambda place, folder: place.settings(folder / "config.json", attn_implementation="evil/kernel")), "download and run"),
    Attack("licence with an escape sequence", "align registry import", HARMLESS, imported(licence_with_escapes)),
    Attack("as ../../x", "align registry import", REFUSED, imported(lambda place, folder: None, "sft/../../x")),
    Attack("template that loops", "align registry import", REFUSED, imported(lambda place, folder: (folder / "chat_template.jinja").write_text("{{ messages }}" + "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3)), "takes more than"),
]
