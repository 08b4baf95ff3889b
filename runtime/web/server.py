"""Serving an app with uvicorn inside a program's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 2
CONCURRENCY_MAX: Final = 64
_POLL_S: Final = 0.005

Asgi = Callable[[Any, Any, Any], Awaitable[None]]
"""An application: of a scope, a way to receive and one to send."""


class ListenError(Exception):
    """The HTTP server cannot listen; the message says where, why, and which setting to change."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files in PEM. With `client_ca` clients must show a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


class _Uvicorn(uvicorn.Server):
    """Leaves the process's signals to the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class WebServer:
    """Serves an app in the running event loop, between `start` and `stop`."""

    def __init__(
        self,
        app: Asgi,
        host: str,
        port: int,
        *,
        section: str,
        concurrency_max: int | None = CONCURRENCY_MAX,
        stop_timeout_s: int = STOP_TIMEOUT_S,
        tls: ServerTls | None = None,
    ) -> None:
        """`section` names the settings that `host` and `port` came from.

        More requests than `concurrency_max` at a time are answered with 503; None: the app counts
        itself. Raises ListenError if the files of `tls` cannot be used.
        """
        self._section = section
        self._host = host
        self._port = port
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._scheme = "http" if tls is None else "https"
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nothing here asks who the client is
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=concurrency_max,
            timeout_graceful_shutdown=stop_timeout_s,
            **_options(tls),
        )
        self._server = _Uvicorn(config)
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ListenError(f"the TLS files of {section} cannot be used: {error}") from error

    @property
    def port(self) -> int:
        """The port it listens on, also when any free one was asked for."""
        return self._port

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self._scheme}://{host}:{self._port}"

    async def start(self) -> None:
        """Return when requests are answered; raises ListenError."""
        assert self._task is None, "started already"
        self._socket = await _listen(self._host, self._port, self._section)
        self._port = self._socket.getsockname()[1]
        self._task = asyncio.create_task(
            self._server.serve(sockets=[self._socket]), name=f"{self._section}-server"
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                while not self._server.started and not self._task.done():
                    await asyncio.sleep(_POLL_S)
        if not self._server.started and not self._task.done():
            self._task.cancel()
            raise ListenError(
                f"the {self._section} server on {self.url} did not start in {START_TIMEOUT_S} s"
            )
        if self._task.done():
            await self._task
            raise ListenError(f"the {self._section} server on {self.url} ended as it started")

    async def stop(self) -> None:
        """Answer what was asked already, briefly, and end. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        self._server.should_exit = True
        try:
            await task
        finally:
            if self._socket is not None:
                self._socket.close()


def _options(tls: ServerTls | None) -> dict[str, Any]:
    if tls is None:
        return {}
    found: dict[str, Any] = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    if tls.client_ca is not None:
        found |= {"ssl_ca_certs": str(tls.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return found


async def _listen(host: str, port: int, section: str) -> socket.socket:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, address = found[0]
        listener = socket.create_server(address, family=family)
        # Connections inherit it. Without it a second answer waits 40 ms for the first one's ACK;
        # asyncio sets it only on sockets that were made with a protocol number.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise ListenError(
            f"the {section} server cannot listen on {host} port {port}: {error.strerror or error}; "
            f"change {section}.host or {section}.port (0 takes any free port)"
        ) from error
