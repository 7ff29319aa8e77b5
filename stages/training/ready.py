"""What a stage makes sure of before it trains for hours: that what it starts from fits and is whole, and that it can publish."""

from __future__ import annotations

import tempfile
from pathlib import Path

from configs.errors import UserError
from configs.schema import StageConfig
from stages import models, soft
from stages.data import Splitter
from stages.nodes import agree
from stages.nodes.fetch import fetch
from stages.registry import Registry, contract
from stages.training.ranks import from_rank_0


def output_folder(cfg: StageConfig, stage: str) -> Path:
    """The working folder of a stage."""
    return cfg.output or Path("runs") / f"{stage}-{cfg.name}"


def check_writable(folder: Path) -> None:
    """Make sure that a working folder can be written to, and make it if it is missing.

    Raises:
        UserError: it can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"a page" * 1000)
            probe.flush()
    except OSError as error:
        raise UserError(f"output: {folder} can't be written ({error.strerror}); make room, check its owner, or name another folder") from error


def check(cfg: StageConfig, stage: str, *origins: models.Origin) -> None:
    """Verify `origins` deeply and the places to work in and to publish to, on rank 0; every rank calls this and learns the outcome.

    Raises:
        UserError: on every rank: a damaged checkpoint, an adapter whose base has changed, one that was trained under another split, a
            registry or working folder that can't be written.
    """

    def on_rank_0() -> None:
        check_writable(output_folder(cfg, stage))
        Registry(cfg.registry).check_publishable(f"{stage}/{cfg.name}")
        for origin in {origin.identity: origin for origin in origins}.values():
            origin.lease(f"{stage}/{cfg.name} trains from it")  # given back when this process ends
        split = Splitter(cfg.split).facts()
        for origin in origins if "split" not in cfg.allow_changed else ():
            contract.check_split(origin.ancestors(), split, "allow it with allow_changed: [split] if these prompts are new to it")
        models.verify(*origins)

    soft.check(cfg, *origins)
    from_rank_0("verifying what the stage starts from", on_rank_0)
    agree.check_shared({"registry": cfg.registry, "output": output_folder(cfg, stage)})
    folders = [origin.folder for origin in models.with_bases(*origins)]
    agree.check_same_models(folders)
    fetch(folders)
