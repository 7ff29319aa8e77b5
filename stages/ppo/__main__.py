"""python -m stages.ppo --config FILE, also under accelerate launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.training.entry import run

if TYPE_CHECKING:
    from configs.schema import PPOStage


def main(cfg: PPOStage) -> None:
    """Train a policy with PPO against a scorer, starting from an SFT checkpoint."""
    from stages.ppo.train import main as train  # seconds of imports, in which signals are heard already

    train(cfg)


if __name__ == "__main__":
    run(main, "ppo")
