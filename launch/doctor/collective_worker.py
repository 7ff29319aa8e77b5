"""One of the processes of the doctor's collective test: meets the others, adds up over them, checks the sum, prints JSON."""

from __future__ import annotations

import argparse
import json
import time
from datetime import timedelta

ELEMENTS = 4 * 2**20  # float32, 16 MiB: enough to see a bandwidth, little enough for any network
ROUNDS = 3


def main() -> None:
    """All-reduce ranks over a TCP rendezvous on loopback. Fails loudly when the sum is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="after which a process stops waiting for the others")
    args = parser.parse_args()
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", args.rank) if args.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        args.backend, init_method=f"tcp://127.0.0.1:{args.port}", rank=args.rank, world_size=args.world, timeout=timedelta(seconds=args.seconds)
    )
    values = torch.full((ELEMENTS,), float(args.rank + 1), device=device)
    dist.all_reduce(values)
    expected = args.world * (args.world + 1) / 2  # 1 + 2 + … + world
    assert bool((values == expected).all()), f"the sum over {args.world} processes is {values[0].item()} to {values[-1].item()}, not {expected}"
    values.fill_(1.0)
    _wait(device)
    started = time.monotonic()
    for _ in range(ROUNDS):
        dist.all_reduce(values)
    _wait(device)
    seconds = (time.monotonic() - started) / ROUNDS
    dist.destroy_process_group()
    print(json.dumps({"sum": expected, "MB/s": round(values.nbytes / 1e6 / seconds, 1)}), flush=True)


def _wait(device: object) -> None:
    import torch

    if getattr(device, "type", "") == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
