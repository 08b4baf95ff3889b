"""A node served from its settings until a signal; imported once there are settings to serve.

What it imports takes as long as all else of a start: `hold`, `check-config` and whoever is told
that settings are of no use need none of it.
"""

from __future__ import annotations

import os
from typing import Final

from kvbm.daemon.ipc import SocketError
from kvbm.daemon.node import Node, kernels_of
from kvbm.daemon.server import Server
from kvbm.daemon.settings import DaemonSettings
from kvbm.peers.owner import PeerSocketError
from runtime import program
from runtime.kernels import WHY, compiled
from runtime.server_process import ServerError
from runtime.systemd import Notifier, take_inherited
from runtime.web.server import ListenError, WebServer
from runtime.web.starting import Starting
from storage_tiers.arena import ArenaError
from storage_tiers.base import TierError

CANNOT_RUN: Final = (
    ArenaError,
    TierError,
    SocketError,
    PeerSocketError,
    ListenError,
    ServerError,
)


async def serve(settings: DaemonSettings) -> None:
    """Raises one of `CANNOT_RUN`."""
    stop = program.stop_signal()
    notifier = Notifier.from_environ(os.environ)
    inherited, page, admin = take_inherited(os.environ), Starting(WHY), settings.admin
    web = WebServer(page, admin.host, admin.port, section="admin")
    await web.start()
    try:
        if kernels := kernels_of(settings):
            notifier.status(WHY)
            if not await program.unless_stopped(stop, compiled(kernels)):
                return
        page.why = "starting"
        node = Node(settings, program.version(), notifier, inherited)
        await Server(node, notifier, web, page).run(stop)
    finally:
        await web.stop()
