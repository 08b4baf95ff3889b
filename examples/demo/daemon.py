"""The daemon of the demo: its settings file, its process, and what its own counters say.

Everything known about the admin API is here; the rest of the demo asks in its own words.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.demo.process import Process, ProcessError, free_port
from kvbm.cli.client import AdminClient, Failure

START_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 120.0
SETTLE_QUIET_S = 0.5


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Where the daemon keeps what, and the servers it talks to."""

    folder: Path
    socket: Path
    logs: Path
    records: Path
    s3: Mapping[str, Any] | None = None
    events: Mapping[str, Any] | None = None
    peers: Mapping[str, Any] | None = None
    discovery: Mapping[str, Any] | None = None
    dram: str = "2GiB"
    ssd: str | None = "4GiB"
    node: str = "demo"
    governor: str = "always_load"  # each tier is to be seen at work, however small the model

    @property
    def ssd_folder(self) -> Path:
        return self.folder / "ssd"


class Daemon:
    """One kvbm-daemon, restarted at will; its port and its socket stay the same."""

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        self._port = free_port()
        self.settings = config.folder / "kvbm.yaml"
        self.url = f"http://127.0.0.1:{self._port}"
        self._admin = AdminClient(self.url, None)
        self.socket = config.socket
        self.ssd_folder = config.ssd_folder
        program = Path(sys.executable).parent / "kvbm-daemon"
        self.process = Process(
            "kvbm-daemon",
            [str(program), "serve", "--config", str(self.settings)],
            log=config.logs / "kvbm-daemon.log",
            record=config.records / "kvbm-daemon.pid",
        )

    def start(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Seconds until it was ready."""
        self._write_settings()
        self.process.start()
        return self.process.wait_until(self.ready, timeout_s)

    def stop(self) -> None:
        """SIGTERM and a clean end; raises ProcessError when it ends with an error."""
        if not self.process.running:
            return
        status = self.process.stop()
        if status != 0:
            tail = self.process.tail()
            raise ProcessError(f"kvbm-daemon ended with status {status} on SIGTERM.\n{tail}")

    def empty_ssd(self) -> None:
        assert not self.process.running, "the SSD belongs to a running daemon"
        shutil.rmtree(self.ssd_folder, ignore_errors=True)

    def ready(self) -> bool:
        try:
            self._admin.get("/readyz")
        except Failure:
            return False
        return True

    def loaded_bytes(self) -> dict[str, int]:
        """Bytes read from each tier: from G2 by engines, from the others into G2."""
        return {tier["tier"]: tier["loaded_bytes"] for tier in self.tiers()}

    def kept_chunks(self) -> dict[str, int]:
        """Chunks in each tier."""
        return {tier["tier"]: tier["chunks"] for tier in self.tiers()}

    def engines(self) -> int:
        """Engines whose scheduler and worker are both connected."""
        roles: dict[str, set[str]] = {}
        for session in self._get("/v1/sessions")["sessions"]:
            roles.setdefault(session["engine"], set()).add(session["role"])
        return sum({"scheduler", "worker"} <= seen for seen in roles.values())

    def claims(self) -> int:
        """Chunks that engines hold against eviction."""
        return sum(session["claims"] for session in self._get("/v1/sessions")["sessions"])

    def leased_bytes(self) -> int:
        """Host memory lent to engines."""
        return sum(session["leased_bytes"] for session in self._get("/v1/sessions")["sessions"])

    def settle(self) -> None:
        """Wait until every chunk in host memory has reached every lower tier."""
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
        last, since_s = self.kept_chunks(), time.monotonic()
        while time.monotonic() < deadline_s:
            time.sleep(0.1)
            kept = self.kept_chunks()
            if kept != last:
                last, since_s = kept, time.monotonic()
            is_level = min(kept.values()) >= kept["G2"]
            if is_level and time.monotonic() - since_s >= SETTLE_QUIET_S:
                return
        raise ProcessError(
            f"the tiers were not level after {SETTLE_TIMEOUT_S:.0f} s: {last}.\n"
            f"{self.process.tail()}"
        )

    def tiers(self) -> list[dict[str, Any]]:
        """What the daemon reports of each tier."""
        tiers: list[dict[str, Any]] = self._get("/v1/tiers")["tiers"]
        return tiers

    def _get(self, path: str) -> dict[str, Any]:
        try:
            return self._admin.get(path)
        except Failure as failure:
            self.process.check()
            raise ProcessError(f"kvbm-daemon did not answer {path}: {failure}") from failure

    def _write_settings(self) -> None:
        config = self._config
        settings = {
            "socket": str(config.socket),
            "node": config.node,
            "dram": {"capacity": config.dram},
            "ssd": {"path": str(config.ssd_folder), "capacity": config.ssd} if config.ssd else None,
            "s3": dict(config.s3) if config.s3 else None,
            "events": dict(config.events or {}),
            "discovery": dict(config.discovery or {}),
            "peers": dict(config.peers) if config.peers else None,
            "governor": {"mode": config.governor},
            "admin": {"host": "127.0.0.1", "port": self._port},
        }
        config.folder.mkdir(parents=True, exist_ok=True)
        # Holds the credentials of the demo's servers.
        descriptor = os.open(self.settings, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            yaml.safe_dump(settings, file, sort_keys=False)
