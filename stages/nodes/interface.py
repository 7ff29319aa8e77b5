"""The network interface through which another machine is reached."""

from __future__ import annotations

import ipaddress
import socket


def own_address(host: str) -> str | None:
    """The address of this machine that packets to `host` would carry; None where there is no way there. Sends nothing."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def is_loopback(address: str) -> bool:
    """Whether an address is reached from its own machine only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address of this machine, such as eth0; all of 127.0.0.0/8 is the loopback's."""
    import psutil

    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            have = ipaddress.ip_address(entry.address.partition("%")[0])
            if have == wanted or (have.is_loopback and wanted.is_loopback and have.version == wanted.version):
                return name
    return None
