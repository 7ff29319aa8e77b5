"""Gives the trained module what it learns with: an optimizer, the store of its saves, and DeepSpeed's engines under ZeRO."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import PPOStage
from stages import models
from stages.ppo import state
from stages.ppo.build import AdapterScorer, PPOModels, check_reproducible
from stages.ppo.gradients import start_alike
from stages.ppo.optimizer import optimizer_of
from stages.ppo.state import Position
from stages.ppo.store import Store
from stages.ppo.zero import saves
from stages.ppo.zero.engines import Zero
from stages.ppo.zero.frozen import ShardedReference, TrunkCalls
from stages.ppo.zero.trained import ShardedPolicyAndValue, engage


class Equipped(NamedTuple):
    """What a run goes on with."""

    optimizer: Any
    position: Position
    store: Store


def equip(cfg: PPOStage, accelerator: Any, built: PPOModels, folder: Path, save_from: Path | None, zero: Zero | None, identity: dict[str, Any]) -> Equipped:
    """The optimizer and where the run stands: at its start, or where the verified save `save_from` was made. Every process calls it.

    `identity` is what this run's saves depend on. Under ZeRO `built` is changed: what is trained, and what shares its backbone, is called through engines from then on.

    Raises:
        UserError: the save is of other weights, another ZeRO stage or another number of processes.
    """
    start = Position(0, cfg.kl_coef)
    if save_from:
        saves.check(save_from, zero.stage if zero is not None else 0)
    if zero is None:
        optimizer = optimizer_of(cfg, built)
        position = state.restore(save_from, built.trained, optimizer) if save_from else start
        start_alike(built.trained, accelerator)
        return Equipped(optimizer, position, Store(folder, built.trained, optimizer, identity, save_from))
    position = saves.restore_weights(save_from, built.trained) if save_from else start
    trained, sharded = engage(built.trained, cfg, zero, partial(models.autocast, accelerator.device, cfg.train.precision))
    if save_from:
        saves.restore_optimizer(save_from, sharded)
    built.trained = trained
    if zero.splits_weights:
        _share_backbone(built, trained)
        check_reproducible(trained, cfg, accelerator.device)
    return Equipped(sharded, position, saves.ShardedStore(folder, trained, sharded, identity, save_from, zero.stage))


def _share_backbone(built: PPOModels, trained: ShardedPolicyAndValue) -> None:
    """Call what shares the trained backbone through the engine that holds it: the reference with adapters off, reward adapters, an ensemble's too."""
    engine = trained.engines["policy"]
    if built.reference.switch is not None:
        built.reference = ShardedReference(trained.policy, engine, temperature=trained.temperature, switch=built.reference.switch)
    for scorers in filter(None, (built.scorer, built.heldout_scorer)):
        for _, scorer in scorers.single():
            if isinstance(scorer, AdapterScorer):
                scorer.model = TrunkCalls(engine, trained.policy)
