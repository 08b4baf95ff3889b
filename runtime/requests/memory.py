"""The request plane within one process: sessions as over TCP, bytes handed over in memory.

Servers and clients of one `MemoryPlane` find each other by their addresses, `memory://NUMBER`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import Final

from runtime.requests.base import RequestClient, RequestServer
from runtime.requests.client import SessionClient
from runtime.requests.client_session import ClientSession
from runtime.requests.errors import ConnectionLost
from runtime.requests.server import Accept, SessionServer
from runtime.requests.session import Link, Session
from runtime.requests.settings import RequestPlaneSettings

SCHEME: Final = "memory://"


class MemoryPlane:
    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._numbers = itertools.count(1)
        self._accepting: dict[str, Accept] = {}

    def server(self) -> RequestServer:
        address = f"{SCHEME}{next(self._numbers)}"
        listener = _MemoryListener(address, self._accepting)
        return SessionServer(self._settings, self._name, listener)

    def client(self) -> RequestClient:
        return SessionClient(self._settings, self._name, _MemoryConnector(self._accepting))


class _MemoryLink:
    """One end; what it writes reaches the other in a later turn of the event loop."""

    frame_bytes_max = None

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.other: _MemoryLink | None = None
        self.session: Session | None = None
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[bytes | bytearray] = deque()

    def write(self, data: bytes | bytearray) -> None:
        if not self._pieces:
            self._loop.call_soon(self._hand_over)
        self._pieces.append(data)

    def unsent_bytes(self) -> int:
        return sum(len(piece) for piece in self._pieces)

    def close(self) -> None:
        self._loop.call_soon(self._end)

    def _hand_over(self) -> None:
        other = self.other
        while self._pieces:
            data = self._pieces.popleft()
            if other is not None and other.session is not None:
                other.session.received(bytes(data))

    def _end(self) -> None:
        self._hand_over()
        other, self.other = self.other, None
        if other is not None and other.session is not None:
            other.session.lost(f"{other.peer} closed it")


class _MemoryListener:
    kind = "memory"

    def __init__(self, address: str, accepting: dict[str, Accept]) -> None:
        self._address = address
        self._accepting = accepting

    async def start(self, accept: Accept) -> str:
        self._accepting[self._address] = accept
        return self._address

    async def close(self) -> None:
        self._accepting.pop(self._address, None)
        await asyncio.sleep(0)  # what sessions said last is handed over


class _MemoryConnector:
    kind = "memory"

    def __init__(self, accepting: dict[str, Accept]) -> None:
        self._accepting = accepting

    async def connect(self, address: str, make: Callable[[Link], ClientSession]) -> ClientSession:
        accept = self._accepting.get(address)
        if accept is None:
            raise ConnectionLost(f"nothing listens at {address}")
        here, there = _MemoryLink(address), _MemoryLink("a client in this process")
        here.other, there.other = there, here
        there.session = accept(there)
        here.session = session = make(here)
        return session

    async def close(self) -> None:
        await asyncio.sleep(0)
