"""The request plane over TCP, with TLS where it is set: the default.

One connection carries all streams between a client and a server. Without TLS anyone who reaches
the port may send requests, so it listens on loopback unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final, cast

from runtime.requests.base import RequestClient, RequestServer
from runtime.requests.client import SessionClient
from runtime.requests.client_session import ClientSession
from runtime.requests.errors import ConnectionLost
from runtime.requests.server import Accept, SessionServer
from runtime.requests.session import Link, Session
from runtime.requests.settings import RequestPlaneSettings
from runtime.tls import client_context, server_context

SCHEME: Final = "tcp://"
CLOSE_TIMEOUT_S: Final = 1.0  # for what is still to be sent when a connection is closed
_WRITE_BUFFER_BYTES: Final = 256 << 10
_BACKLOG: Final = 256


class TcpPlane:
    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._name = name

    def server(self) -> RequestServer:
        return SessionServer(self._settings, self._name, _TcpListener(self._settings))

    def client(self) -> RequestClient:
        return SessionClient(self._settings, self._name, _TcpConnector(self._settings))


class _TcpLink(asyncio.Protocol):
    frame_bytes_max = None

    def __init__(self, accept: Accept) -> None:
        self._accept = accept
        self._session: Session | None = None
        self._transport: asyncio.Transport | None = None
        self.peer = "the other side"

    def write(self, data: bytes | bytearray) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def close(self) -> None:
        transport = self._transport
        if transport is not None:
            transport.close()
            # A peer that reads nothing would keep it open.
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, transport.abort)

    # -- asyncio.Protocol -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = transport.get_extra_info("peername")
        self.peer = authority(name[0], name[1]) if name else "a peer that is gone"
        self._session = self._accept(self)

    def data_received(self, data: bytes) -> None:
        assert self._session is not None
        self._session.received(data)

    def pause_writing(self) -> None:
        assert self._session is not None
        self._session.pause()

    def resume_writing(self) -> None:
        assert self._session is not None
        self._session.resume()

    def connection_lost(self, error: Exception | None) -> None:
        if self._session is not None:
            self._session.lost(f"{self.peer}: {error or 'it closed the connection'}")


class _TcpListener:
    kind = "tcp"

    def __init__(self, settings: RequestPlaneSettings) -> None:
        self._settings = settings
        self._server: asyncio.Server | None = None

    async def start(self, accept: Accept) -> str:
        settings = self._settings
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _TcpLink(accept),
            settings.host,
            settings.port,
            backlog=_BACKLOG,
            ssl=server_context(settings.tls) if settings.tls is not None else None,
            ssl_handshake_timeout=settings.connect_timeout if settings.tls is not None else None,
        )
        port = self._server.sockets[0].getsockname()[1]
        return SCHEME + authority(settings.advertise_host or settings.host, port)

    async def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * CLOSE_TIMEOUT_S):
                    await server.wait_closed()


class _TcpConnector:
    kind = "tcp"

    def __init__(self, settings: RequestPlaneSettings) -> None:
        self._settings = settings

    async def connect(self, address: str, make: Callable[[Link], ClientSession]) -> ClientSession:
        host, port = split(address, SCHEME)
        tls = self._settings.tls
        made: list[ClientSession] = []

        def accept(link: Link) -> Session:
            made.append(make(link))
            return made[0]

        await asyncio.get_running_loop().create_connection(
            lambda: _TcpLink(accept),
            host,
            port,
            ssl=client_context(tls) if tls is not None else None,
            server_hostname=(tls.server_name or host) if tls is not None else None,
            ssl_handshake_timeout=self._settings.connect_timeout if tls is not None else None,
        )
        return made[0]

    async def close(self) -> None:
        pass


def authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(address: str, scheme: str) -> tuple[str, int]:
    """Host and port; raises ConnectionLost where it is no such address."""
    host, colon, port = address.removeprefix(scheme).rpartition(":")
    if not address.startswith(scheme) or not colon or not port.isascii() or not port.isdigit():
        raise ConnectionLost(f"{address!r} is no address of this plane ({scheme}HOST:PORT)")
    return host.strip("[]"), int(port)
