"""Hosts by name or address: whether one is this machine, and by which others reach it."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final, Literal

_ELSEWHERE: Final = "192.0.2.1"  # for documentation: nobody has it (RFC 5737)
_ELSEWHERE_6: Final = "2001:db8::1"  # likewise (RFC 3849)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address leads nowhere but to this machine; asks no resolver."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def without_wildcard(host: str) -> str:
    """The host, or this machine's own address if it stands for all of them; sends nothing."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return own_address(address.version) if address.is_unspecified else host


def own_address(version: Literal[4, 6] = 4) -> str:
    """This machine's address on the way to others, else loopback; sends nothing."""
    family, elsewhere, loopback = (
        (socket.AF_INET6, _ELSEWHERE_6, "::1")
        if version == 6
        else (socket.AF_INET, _ELSEWHERE, "127.0.0.1")
    )
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect((elsewhere, 9))
            return str(way.getsockname()[0])
    except OSError:
        return loopback
