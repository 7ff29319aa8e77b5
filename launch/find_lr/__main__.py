"""The process (or processes) of `align sft --find-lr`: everything of the SFT stage up to its training, and a range test in its place."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from configs.schema import SFTStage
from stages import sft
from stages.training import entry


def main(cfg: SFTStage) -> None:
    """Test learning rates on an SFT config that `launch.find_lr_cli` has written; the result is OUTPUT/learning_rate.json."""
    from launch.find_lr_cli import RESULT
    from stages.training import rate_search, ready
    from stages.training.ranks import from_rank_0
    from stages.training.saves import write_durably

    folder = ready.output_folder(cfg, "sft")

    def search(trainer: object) -> None:
        found = rate_search.search(trainer, rate_search.Range(lowest, cfg.train.learning_rate, cfg.train.max_steps or 2))

        def write() -> None:
            write_durably(folder / RESULT, json.dumps(found.as_json()))
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            shutil.rmtree(folder / "resume", ignore_errors=True)

        from_rank_0("writing the result", write)

    sft.main(cfg, instead=search)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--from-rate", type=float, required=True, help="the first learning rate; train.learning_rate is the last")
    own, rest = parser.parse_known_args(sys.argv[1:])
    lowest = own.from_rate
    entry.run(main, "sft", rest)
