"""A feature whose package is not installed names the extra that brings it."""

import pytest

from configs import extras
from configs.errors import MissingExtra


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda package: None)


@pytest.mark.parametrize(
    ("trainer", "extra"),
    [({"report_to": "wandb"}, "trackers"), ({"report_to": ["tensorboard"]}, "trackers"), ({"optim": "paged_adamw_8bit"}, "quantization")],
)
def test_trainer_argument_names_its_extra(nothing_installed, trainer, extra):
    with pytest.raises(MissingExtra, match=rf"trainer\.\w+.*align-stack\[{extra}\]"):
        extras.check_trainer_packages(trainer)


def test_machine_file_names_its_extra(nothing_installed):
    with pytest.raises(MissingExtra, match=r"zero3\.yaml.*align-stack\[deepspeed\]"):
        extras.check_machine_packages({"distributed_type": "DEEPSPEED"}, "zero3.yaml")


def test_what_needs_nothing_passes(nothing_installed):
    assert extras.check_trainer_packages({"report_to": "none", "optim": "adamw_torch"}) is None
    assert extras.check_machine_packages({"distributed_type": "NO"}, "cpu.yaml") is None


def test_either_writer_of_event_files_will_do(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda package: package if package == "tensorboardX" else None)
    extras.check_trainer_packages({"report_to": ["tensorboard"]})  # raises nothing
    with pytest.raises(MissingExtra, match="wandb"):
        extras.check_trainer_packages({"report_to": ["tensorboard", "wandb"]})


def test_an_installed_package_passes():
    assert extras.find_spec("json") is not None
    extras.need("json", "anything", "nothing")  # raises nothing


def test_the_extras_exist():
    import tomllib
    from pathlib import Path

    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"deepspeed", "trackers", "quantization"} <= set(declared)
