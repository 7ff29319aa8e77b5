"""What joins processes: NVLink between GPUs, network interfaces, InfiniBand, and which of them gloo and NCCL would take."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

from launch.doctor.check import Findings, Settings
from launch.doctor.gpus import DriverError, nvidia_smi, topology

NCCL_AVOIDS = ("docker", "lo")  # NCCL takes these only when nothing else is there; it prefers names that begin with ib
NO_TRAINING = re.compile(r"^(?:docker|br-|veth|virbr|cni|flannel|cali|tun|tap|ifb|dummy)")


def interfaces() -> list[dict[str, Any]]:
    """Network interfaces with name, state, speed [Mb/s], MTU [bytes] and families of addresses; the addresses themselves stay here."""
    import psutil

    states, rows = psutil.net_if_stats(), []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        families = sorted({"IPv4" if item.family == socket.AF_INET else "IPv6" for item in addresses if item.family in (socket.AF_INET, socket.AF_INET6)})
        state = states.get(name)
        rows.append({"name": name, "up": bool(state and state.isup), "speed [Mb/s]": (state.speed or None) if state else None, "mtu": state.mtu if state else None, "addresses": families})
    return rows


def chosen_by_gloo() -> tuple[str | None, str]:
    """(interface, why): GLOO_SOCKET_IFNAME, or else the one that carries the address of this machine's own name, or else loopback."""
    import psutil

    asked = os.environ.get("GLOO_SOCKET_IFNAME")
    if asked:
        return asked, "GLOO_SOCKET_IFNAME"
    try:
        own = [str(item[4][0]) for item in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    except OSError:
        return "lo", "the machine's name does not resolve"
    carried = {item.address.partition("%")[0]: name for name, items in psutil.net_if_addrs().items() for item in items}
    name = next((carried[address] for address in own if address in carried), None)  # gloo takes the first it can bind to
    if name is None and any(address.startswith("127.") for address in own):
        name = "lo"
    return name, "the machine's name resolves to its address" if name else "the machine's name resolves to an address that no interface has"


def chosen_by_nccl(rows: list[dict[str, Any]]) -> tuple[str | None, str]:
    """(interface, why): NCCL_SOCKET_IFNAME, or else NCCL's order: ib…, then others, then docker…, then lo."""
    asked = os.environ.get("NCCL_SOCKET_IFNAME")
    if asked:
        return asked, "NCCL_SOCKET_IFNAME"
    able = [row["name"] for row in rows if row["up"] and row["addresses"]]
    order = [name for name in able if name.startswith("ib")]
    order += [name for name in able if not name.startswith(("ib", *NCCL_AVOIDS))]
    order += [name for name in able if name.startswith(NCCL_AVOIDS)]
    return (order[0], "the first in NCCL's order") if order else (None, "no interface is up")


def infiniband(root: Path = Path("/sys/class/infiniband")) -> list[dict[str, str]]:
    """Ports of InfiniBand and RoCE devices: device, port, state, rate, link layer."""
    ports = []
    for port in sorted(root.glob("*/ports/*")):
        facts = {name: _text(port / name) for name in ("state", "rate", "link_layer")}
        ports.append({"device": port.parents[1].name, "port": port.name, **facts})
    return ports


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return "?"


def check_interconnect(_: Settings) -> Findings:
    """Links between GPUs and between machines."""
    found = Findings()
    rows = interfaces()
    gloo, gloo_why = chosen_by_gloo()
    nccl, nccl_why = chosen_by_nccl(rows)
    ports = infiniband()
    found.facts = {
        "interfaces": {row["name"]: _told(row) for row in rows}, "gloo would take": f"{gloo} ({gloo_why})", "NCCL would take": f"{nccl} ({nccl_why})",
        "infiniband": ports, "settings": {key: value for key, value in sorted(os.environ.items()) if key.startswith(("NCCL_", "GLOO_", "TORCH_NCCL"))},
    }  # fmt: skip
    _interfaces(found, rows, gloo, gloo_why)
    _asked_interfaces(found, rows)
    down = [f"{port['device']}/{port['port']}" for port in ports if "ACTIVE" not in port["state"]]
    if down:
        found.warn(f"InfiniBand ports that are not active: {', '.join(down)}", "see ibstat; leave them out with NCCL_IB_HCA=^NAME, or have the cable checked")
    if ports and os.environ.get("NCCL_IB_DISABLE") == "1":
        found.warn("there is InfiniBand and NCCL_IB_DISABLE=1 turns it off", "unset NCCL_IB_DISABLE")
    gpus = _between_gpus(found)
    parts = [gpus, f"{len(ports)} InfiniBand port(s)" if ports else "", f"gloo: {gloo}", f"NCCL: {nccl}" if gpus else ""]
    found.summary = ", ".join(part for part in parts if part)
    return found


def _told(row: dict[str, Any]) -> str:
    speed = f", {row['speed [Mb/s]']} Mb/s" if row["speed [Mb/s]"] else ""
    return f"{'up' if row['up'] else 'down'}{speed}, MTU {row['mtu']}{', ' if row['addresses'] else ''}{' '.join(row['addresses'])}"


def _interfaces(found: Findings, rows: list[dict[str, Any]], gloo: str | None, why: str) -> None:
    others = [row["name"] for row in rows if row["up"] and row["addresses"] and row["name"] != "lo" and not NO_TRAINING.match(row["name"])]
    choice = f"for several machines set GLOO_SOCKET_IFNAME={others[0] if others else 'NAME'} (and NCCL_SOCKET_IFNAME)"
    if gloo is None:
        found.warn(f"gloo finds no interface: {why}", f"mend /etc/hosts, or {choice}")
    elif gloo == "lo" and others:
        found.warn(f"gloo would talk over loopback ({why}): other machines cannot be reached", choice)
    elif NO_TRAINING.match(gloo):
        found.warn(f"gloo would take {gloo}, which does not lead to other machines", choice)


def _asked_interfaces(found: Findings, rows: list[dict[str, Any]]) -> None:
    """What the environment names must exist; NCCL's value is a list of prefixes, `=` before it means exact names, `^` all others."""
    names = [row["name"] for row in rows if row["up"]]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if not value or value.startswith("^"):
            continue
        exact = variable.startswith("GLOO") or value.startswith("=")
        for asked in value.lstrip("=").split(","):
            if not any(name == asked if exact else name.startswith(asked) for name in names):
                found.fail(f"{variable} names {asked!r}; the interfaces that are up are {', '.join(names)}", f"set {variable} to one of these, or unset it")


def _between_gpus(found: Findings) -> str:
    try:
        text = nvidia_smi("topo", "-m")
    except DriverError as error:
        found.warn(f"nvidia-smi topo fails: {error}", "containers may hide it; NCCL_DEBUG=INFO shows what NCCL uses")
        return ""
    pairs = topology(text or "")
    if not pairs:
        return ""
    found.facts["links between GPUs"] = pairs
    linked = sum(kind.startswith("NV") for kind in pairs.values())
    across = [pair for pair, kind in pairs.items() if kind == "SYS"]
    if not linked and across:
        found.warn(f"{len(across)} of {len(pairs)} pairs of GPUs talk across sockets, none over NVLink", "ZeRO-3 will be slow; prefer ZeRO-1 or LoRA with DDP if it fits")
    return f"NVLink joins {linked} of {len(pairs)} pairs"
