"""`align registry doctor`: whether a registry can be kept on a file system."""

from __future__ import annotations

import argparse

from launch.registry.output import print_json, table


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
