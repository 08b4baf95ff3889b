"""From the settings of a node to a supervised engine; what every engine's launch program calls.

A launch program knows its engine's arguments and nothing of settings, logs and exit statuses: those
are here. Exit status: the engine's own; 0 after an ordered stop; 1 if it cannot run; 2 for settings
or arguments that cannot be used.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from kvbm.address import WORKER_ID_VARIABLE
from kvbm.daemon.settings import DaemonSettings
from kvbm.engine.child import NoProgram
from kvbm.engine.settings import EngineSettings
from kvbm.engine.supervise import FAILED, Launch, supervise
from runtime import telemetry
from runtime.instances import new_instance_id
from runtime.names import NameRefused, parse_instance_id
from runtime.server_process import ServerError, free_port_run
from runtime.settings import SettingsError, parse_assignments

UNUSABLE: Final = 2
_WILDCARDS: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 (named, not bound)

_log = structlog.get_logger("kvbm.engine")


class ArgumentsRefused(Exception):
    """The engine's arguments cannot be used; the message says which and what is accepted."""


class CannotLaunch(Exception):
    """The engine could be started with the same arguments at another time or place."""


@dataclass(frozen=True, slots=True)
class Node:
    """What a launch program is told."""

    engine: EngineSettings
    socket: Path | None  # of the daemon, if the settings name one
    environ: Mapping[str, str]

    def worker_id(self, given: object = None) -> int:
        """`given` with the engine's arguments, else set, else random. Raises ArgumentsRefused."""
        try:
            ids = [parse_instance_id(given)] if given is not None else []
            if self.engine.worker_id is not None:
                ids.append(self.engine.worker_id)
            elif named := self.environ.get(WORKER_ID_VARIABLE):
                ids.append(parse_instance_id(named))
        except NameRefused as error:
            raise ArgumentsRefused(str(error)) from error
        if len(set(ids)) > 1:
            raise ArgumentsRefused(
                f"two worker ids are given, {ids[0]:#x} with the engine's arguments and {ids[1]:#x}"
            )
        return ids[0] if ids else new_instance_id()

    def free_ports(self, count: int) -> int:
        """The first of so many loopback ports in a row. Raises CannotLaunch."""
        try:
            return free_port_run(count)
        except ServerError as error:
            raise CannotLaunch(str(error)) from error

    def advertised_host(self, listens_on: str | None) -> str:
        """Set, else where it listens, else this host's name, if that means anything."""
        if self.engine.host is not None:
            return self.engine.host
        if listens_on is not None and listens_on not in _WILDCARDS:
            return listens_on
        name = socket.gethostname()
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            _log.warning("host_name_unknown", name=name, meant="set engine.host or --host")
            return "127.0.0.1"
        return name


MakeLaunch = Callable[[Sequence[str], Node], Launch]
"""Of the engine's arguments. Raises ArgumentsRefused or CannotLaunch."""


def start(
    make_launch: MakeLaunch,
    arguments: Sequence[str],
    config: Path | None,
    assignments: Sequence[str],
) -> int:
    """Run an engine to its end; the exit status."""
    try:
        loaded = DaemonSettings.load(config, overrides=parse_assignments(assignments))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return UNUSABLE
    settings = loaded.value
    telemetry.configure(settings.log.format, settings.log.level, sys.stderr, os.environ)
    socket_path = settings.socket if "socket" in loaded.origins else None
    node = Node(settings.engine, socket_path, os.environ)
    try:
        launch = make_launch(arguments, node)
        endpoint = settings.engine.endpoint(settings.events.namespace)
        return asyncio.run(supervise(launch, endpoint, settings.engine, settings.discovery))
    except ArgumentsRefused as error:
        _log.error("arguments_refused", why=str(error))
        return UNUSABLE
    except (CannotLaunch, NoProgram) as error:
        _log.error("cannot_launch", why=str(error))
        return FAILED
