"""Finds the network interface that leads to rank 0, for use by both gloo and NCCL."""

import contextlib
import socket
from collections.abc import Mapping

import psutil

from spectral_scale.errors import ConfigError

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
OUTSIDE = "192.0.2.1"
"""An address of documentation (RFC 5737), to ask which way leads out."""


def addresses() -> dict[str, list[str]]:
    """Interface -> its IPv4 and IPv6 addresses, of those that are up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [a.address.partition("%")[0] for a in found if a.family in families]
        for name, found in psutil.net_if_addrs().items()
        if name in up
    }


def address_of(interface: str) -> str:
    """The first address of an interface. Raises ConfigError if there is no such one."""
    found = addresses()
    if not found.get(interface):
        able = ", ".join(name for name, own in found.items() if own)
        raise ConfigError(
            f"network interface {interface!r} is not up or has no address on "
            f"{socket.gethostname()}; those with one: {able}"
        )
    return found[interface][0]


def local_address_towards(address: str, port: int) -> str:
    """This host's address on the way to `address`; no packet is sent. Raises OSError."""
    family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_towards(address: str, port: int) -> str | None:
    """The interface on the way to `address`; None where the system does not tell.

    A host's own name often stands for 127.0.1.1, where no other host can reach it: unless a
    loopback address was meant, the way out is taken then.
    """
    try:
        local = local_address_towards(address, port)
        if _is_loopback(local) and not _is_loopback(address):
            with contextlib.suppress(OSError):
                local = local_address_towards(OUTSIDE, port)
    except OSError:
        return None
    return next((name for name, own in addresses().items() if local in own), None)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("localhost", "::1")


def interface_settings(
    address: str, port: int, given: str | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables to set, besides those already set. Raises ConfigError for a wrong `given`.

    NCCL takes a plain name for a prefix, so it gets `=name`.
    """
    if given is not None:
        address_of(given)
    name = given or interface_towards(address, port)
    if name is None:
        return {}
    values = dict(zip(VARIABLES, (name, f"={name}"), strict=True))
    return {k: v for k, v in values.items() if given is not None or k not in environment}
