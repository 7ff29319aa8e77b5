"""`align registry doctor`: whether a registry can be kept on a file system. Of `align registry show`: how a checkpoint with two models in it is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from configs.printable import printable
from launch.registry.output import print_json, table

if TYPE_CHECKING:
    from stages.registry import Checkpoint, Registry


def run_doctor(args: argparse.Namespace) -> int:
    """Probe the file system; 1 when it lacks what a registry needs."""
    from launch.doctor.storage import existing
    from stages.mounts import file_system
    from stages.registry.probe import examine

    folder = args.folder or args.registry
    probes = examine(folder)
    sound = all(probe.works for probe in probes if probe.needed)
    kind = file_system(existing(folder))
    if args.json:
        print_json({"folder": str(folder), "file_system": kind, "fit": sound, "probes": [probe.to_json() for probe in probes]})
    else:
        print(f"{folder} ({kind})")
        rows = [(f"  {probe.name}", "works" if probe.works else "FAILS" if probe.needed else "no", f"{probe.milliseconds:.1f} ms", probe.means + (f" ({probe.problem})" if probe.problem else "")) for probe in probes]
        print("\n".join(table(rows)))
        print("a registry can be kept here" if sound else "a registry can not be kept here")
    return 0 if sound else 1


def loading(registry: Registry, checkpoint: Checkpoint) -> list[str]:
    """The lines that load a model whose weights lie under a soft prompt, with the paths of this machine; [] of any other."""
    from stages.registry.loading import is_stacked, stacked_lines

    if not is_stacked(checkpoint):
        return []
    adapter = checkpoint.info("stage_info", {}).get("adapter", {})
    outside = Path(str(adapter.get("base")))
    if adapter.get("base_id"):
        outside = registry.resolve(adapter["base_id"]).model_dir.absolute() / adapter.get("inside", "")
    lines = stacked_lines(checkpoint, str(checkpoint.model_dir.absolute()), str(outside))
    return ["", "to load it, as AutoPeftModelForCausalLM can't find the weights under its soft prompt by the folder's path:", *map(printable, lines)]
