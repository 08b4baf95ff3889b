"""What `kvbm engine attach` does, and how it finds out which instance a server is."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from kvbm.cli.client import AdminClient, Failure, Json, Unreachable
from kvbm.daemon.settings import DaemonSettings
from kvbm.engine.attach import AttachRefused, attach
from kvbm.engine.life import Said
from kvbm.engine.settings import EngineSettings
from runtime import telemetry
from runtime.hosts import is_loopback
from runtime.instances import new_instance_id
from runtime.settings import SettingsError, parse_assignments

_log = structlog.get_logger("kvbm.engine")


def attach_until_stopped(
    engine_url: str, config: Path | None, assignments: Sequence[str], url: str, token: str | None
) -> None:
    """Raises Failure."""
    try:
        settings = DaemonSettings.load(config, overrides=parse_assignments(assignments)).value
    except SettingsError as error:
        raise Failure(str(error)) from error
    telemetry.configure(settings.log.format, settings.log.level, sys.stderr, os.environ)
    engine = settings.engine
    said = Said(_advertised(engine_url, engine))
    if is_loopback(urlsplit(said.url).hostname or "") and settings.discovery.discovery != "file":
        _log.warning("only_this_host_reaches_it", url=said.url, meant="give --host")
    chosen = Chosen(engine.worker_id, url, token)
    endpoint = engine.endpoint(settings.events.namespace)
    try:
        asyncio.run(attach(engine_url, said, chosen, endpoint, engine, settings.discovery))
    except AttachRefused as error:
        raise Failure(str(error)) from error


class Chosen:
    """The instance that is set, or else the daemon's only engine that is not registered."""

    def __init__(self, worker_id: int | None, url: str, token: str | None) -> None:
        self._worker_id = worker_id
        self._url = url
        self._token = token

    def __call__(self, taken: AbstractSet[int]) -> int:
        """Raises AttachRefused."""
        if self._worker_id is not None:
            if self._worker_id in taken:
                raise AttachRefused(f"the instance {self._worker_id:#x} is registered already")
            return self._worker_id
        try:
            with AdminClient(self._url, self._token) as client:
                sessions = client.get("/v1/sessions")["sessions"]
        except Unreachable as error:
            return self._unknown(str(error))
        except Failure as error:
            raise AttachRefused(str(error)) from error
        return self._among(sessions, taken)

    def _among(self, sessions: list[Json], taken: AbstractSet[int]) -> int:
        engines: dict[int, list[Json]] = {}
        for session in sessions:
            if session.get("worker_id") is not None:
                engines.setdefault(int(session["worker_id"], 16), []).append(session)
        free = [worker_id for worker_id in engines if worker_id not in taken]
        if not free:
            return self._unknown(f"the daemon at {self._url} has no engine that is not registered")
        if len(free) > 1:
            candidates = "; ".join(f"{one:#x} ({_whose(engines[one])})" for one in sorted(free))
            raise AttachRefused(
                f"the daemon at {self._url} has {len(free)} engines that are not registered; say "
                f"which one this is with --worker-id: {candidates}"
            )
        return free[0]

    @staticmethod
    def _unknown(why: str) -> int:
        worker_id = new_instance_id()
        _log.warning(
            "routed_by_load_only",
            why=f"which of the daemon's engines it is cannot be known: {why}",
            worker_id=f"{worker_id:#x}",
        )
        return worker_id


def _whose(sessions: list[Json]) -> str:
    ranks = ", ".join(str(session["dp_rank"]) for session in sessions)
    pids = ", ".join(str(session["pid"]) for session in sessions)
    return f"pid {pids}, rank {ranks}"


def _advertised(engine_url: str, engine: EngineSettings) -> str:
    """Raises Failure for what is no server's address."""
    try:
        place = urlsplit(engine_url)
        port = place.port
    except ValueError as error:
        raise Failure(f"{engine_url!r} is no address: {error}") from error
    if place.scheme not in {"http", "https"} or not place.hostname:
        raise Failure(f"{engine_url!r} is no address like http://10.0.0.7:8000")
    if place.path.rstrip("/") == "/v1":
        raise Failure(f"{engine_url!r}: the address of the server is meant, without /v1")
    if engine.host is None:
        return engine_url.rstrip("/")
    host = f"[{engine.host}]" if ":" in engine.host else engine.host
    return place._replace(netloc=host if port is None else f"{host}:{port}").geturl().rstrip("/")
