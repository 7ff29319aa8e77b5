"""What a stage makes sure of before it trains for hours: that what it starts from fits and is whole, and that it can publish."""

from __future__ import annotations

from configs.schema import StageConfig
from stages import models
from stages.data import Splitter
from stages.registry import Registry, contract
from stages.training.ranks import from_rank_0


def check(cfg: StageConfig, stage: str, *origins: models.Origin) -> None:
    """Verify `origins` deeply and the place to publish to, on rank 0; every rank calls this and learns the outcome.

    Raises:
        UserError: on every rank: a damaged checkpoint, an adapter whose base has changed, one that was trained under another split, a
            registry that can't be written.
    """

    def on_rank_0() -> None:
        Registry(cfg.registry).check_publishable(f"{stage}/{cfg.name}")
        split = Splitter(cfg.split).facts()
        for origin in origins if "split" not in cfg.allow_changed else ():
            contract.check_split(origin.ancestors(), split, "allow it with allow_changed: [split] if these prompts are new to it")
        models.verify(*origins)

    from_rank_0("verifying what the stage starts from", on_rank_0)
