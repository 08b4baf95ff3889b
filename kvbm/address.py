"""Where the daemon's control socket is when nobody says otherwise, and who is at its other end.

The daemon and its clients derive the place with the same rules, so that an engine on the same node
and of the same user finds the daemon without configuration; both check that the other is theirs.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

SOCKET_NAME: Final = "kvbm.sock"
# What the `kvbm` command reads; they begin like settings of the daemon and are none.
ADMIN_URL_VARIABLE: Final = "KVBM_ADMIN_URL"
ADMIN_TOKEN_VARIABLE: Final = "KVBM_ADMIN_TOKEN"  # noqa: S105 (a name, not a token)
WORKER_ID_VARIABLE: Final = "KVBM_WORKER_ID"  # the engine's instance in discovery, for connectors
_PEER = struct.Struct("3i")
SYSTEM_SOCKET: Final = Path("/run/kvbm") / SOCKET_NAME  # of a daemon that systemd started


def default_socket(environ: Mapping[str, str], uid: int) -> Path:
    """The daemon's choice: systemd's runtime directory, else the user's, else one in /tmp."""
    runtime_directory = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if runtime_directory:
        return Path(runtime_directory) / SOCKET_NAME
    return _user_socket(uid)


def find_socket(uid: int) -> Path:
    """A client's choice: the user's own daemon if it has a socket, else the system's, if any."""
    own = _user_socket(uid)
    return SYSTEM_SOCKET if not own.exists() and SYSTEM_SOCKET.exists() else own


def _user_socket(uid: int) -> Path:
    run = Path(f"/run/user/{uid}")
    if run.is_dir():
        return run / "kvbm" / SOCKET_NAME
    return Path(f"/tmp/kvbm-{uid}") / SOCKET_NAME  # noqa: S108 (the daemon makes it 0700)


class Peer(NamedTuple):
    """Who is at the other end of a Unix socket, as the kernel says."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    return Peer(*_PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)))
