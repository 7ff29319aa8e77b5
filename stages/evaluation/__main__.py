"""Entry point: python -m stages.evaluation --config FILE [key=value ...]."""

from __future__ import annotations

import os

from configs.schema import EvalConfig
from stages.training import entry


def main(cfg: EvalConfig) -> None:
    """Evaluate checkpoints on held-out prompts and compare them."""
    from stages.evaluation.evaluate import evaluate
    from stages.evaluation.table import show

    result = evaluate(cfg, say=entry.say)
    if "ALIGN_INPUTS_KEY" not in os.environ:  # a chain shows the table at its end
        show(result)


if __name__ == "__main__":
    entry.run(main, "eval")
