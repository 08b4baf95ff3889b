"""Engines' OpenAI servers over HTTP: one pool of connections for all of them.

Whatever goes wrong with an engine is an `EngineFault`, which says whether it can have begun on the
request. What the engine itself answers, errors included, is its answer.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Protocol, Self
from urllib.parse import quote, urlsplit

from runtime.engines.connection import Broken, EngineConnection

CONNECT_TIMEOUT_S: Final = 5.0
IDLE_CONNECTION_S: Final = 4.0  # below the 5 s after which uvicorn closes one, as it is being used
_SILENT_TICKS: Final = 8
_TICK_MAX_S: Final = 1.0

Given = list[tuple[bytes, bytes]]
"""Headers for an engine."""


class Address(Protocol):
    """One of an engine's ranks, behind its OpenAI server."""

    @property
    def url(self) -> str:
        """Without /v1."""
        ...

    @property
    def dp_rank(self) -> int: ...

    @property
    def dp_size(self) -> int: ...


class EngineFault(Exception):
    """An engine did not answer, or broke off. `begun`: it may have worked on the request.

    `is_busy`: it is well, and takes nothing more now.
    """

    def __init__(self, url: str, why: str, *, begun: bool, is_busy: bool = False) -> None:
        self.begun = begun
        self.is_busy = is_busy
        super().__init__(f"{url}: {why}")


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the requests of one URL go."""

    host: str
    port: int
    is_tls: bool
    path: bytes  # before that of each request
    authority: bytes


@dataclass(slots=True)
class _Pool:
    """Connections to one engine."""

    idle: list[tuple[float, EngineConnection]] = field(default_factory=list)  # the latest last
    busy: set[EngineConnection] = field(default_factory=set)


class Answer:
    """An engine's, as it comes. Leaving the context before its end closes the connection, which
    ends the engine's work."""

    __slots__ = ("_connection", "_upstream", "_url", "headers", "status")

    def __init__(self, upstream: Upstream, url: str, connection: EngineConnection) -> None:
        self.status = connection.status
        self.headers: Sequence[tuple[bytes, bytes]] = connection.headers  # names in lower case
        self._upstream = upstream
        self._url = url
        self._connection = connection

    @property
    def is_stream(self) -> bool:
        return any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in self.headers
        )

    async def read(self) -> bytes:
        """All of the body. Raises EngineFault."""
        parts = []
        while part := await self.part():
            parts.append(part)
        return b"".join(parts)

    async def part(self) -> bytes:
        """What has come of the body since; nothing at its end. Raises EngineFault."""
        try:
            return await self._connection.part()
        except Broken as broken:
            raise EngineFault(self._url, str(broken), begun=True) from broken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._upstream.give_back(self._url, self._connection)


class Upstream:
    """Opened and closed in one event loop.

    `silence_s`: an engine that says nothing is gone. `key`: what engines ask for, if they do.
    """

    def __init__(self, silence_s: float, key: str | None = None) -> None:
        self._silence_s = silence_s
        self._own = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
        self._pools: defaultdict[str, _Pool] = defaultdict(_Pool)
        self._tls: ssl.SSLContext | None = None
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._watching = asyncio.create_task(self._watch(), name="upstream")

    async def close(self) -> None:
        """Idempotent."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
        for pool in self._pools.values():
            for connection in [*pool.busy, *(idle for _, idle in pool.idle)]:
                connection.close("this program ends")
        self._pools.clear()
        await asyncio.sleep(0)  # the next turn of the loop closes their sockets

    async def send(
        self,
        method: bytes,
        url: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes,
    ) -> Answer:
        """To a path, maybe with a query, below an engine's `url`. Raises EngineFault."""
        origin = _origin(url)
        first = (method, origin.path, target, origin.authority)
        head = [b"%b %b%b HTTP/1.1\r\nhost: %b" % first]
        head += [b"%b: %b" % header for header in headers]
        head += [b"%b: %b" % header for header in self._own]
        head.append(b"content-length: %d\r\n\r\n" % len(body))
        connection = await self._connection(url, origin)
        try:
            connection.send(b"\r\n".join(head), body, is_answered_whole=method != b"HEAD")
            await connection.head()
        except Broken as broken:
            self.give_back(url, connection)
            raise EngineFault(url, str(broken), begun=True) from broken
        except BaseException:  # the client has gone
            self.give_back(url, connection)
            raise
        return Answer(self, url, connection)

    def give_back(self, url: str, connection: EngineConnection) -> None:
        """Its answer is read, or of no more interest."""
        pool = self._pools[url]
        pool.busy.discard(connection)
        if connection.can_be_kept:
            pool.idle.append((asyncio.get_running_loop().time(), connection))
        else:
            connection.close()

    async def _connection(self, url: str, origin: _Origin) -> EngineConnection:
        pool = self._pools[url]
        loop = asyncio.get_running_loop()
        if pool.idle:
            since_s, connection = pool.idle.pop()
            if loop.time() - since_s < IDLE_CONNECTION_S:
                pool.busy.add(connection)
                return connection
            connection.close()  # those before it are older still, and the next tick's
        if origin.is_tls and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: EngineConnection(lambda lost: self._lost(url, lost)),
                    origin.host,
                    origin.port,
                    ssl=self._tls if origin.is_tls else None,
                )
        except TimeoutError as error:
            why = f"no connection within {CONNECT_TIMEOUT_S:g} s"
            raise EngineFault(url, why, begun=False) from error
        except (OSError, UnicodeError) as error:  # the latter of a host that can be none
            raise EngineFault(url, str(error), begun=False) from error
        self._pools[url].busy.add(connection)
        return connection

    def _lost(self, url: str, connection: EngineConnection) -> None:
        pool = self._pools[url]
        if connection not in pool.busy:
            pool.idle = [one for one in pool.idle if one[1] is not connection]

    async def _watch(self) -> None:
        """Find engines that say nothing, and connections that nobody has used."""
        tick_s = min(self._silence_s / _SILENT_TICKS, _TICK_MAX_S)
        ticks_max = self._silence_s / tick_s
        while True:
            await asyncio.sleep(tick_s)
            unused_since_s = asyncio.get_running_loop().time() - IDLE_CONNECTION_S
            for url, pool in list(self._pools.items()):
                for connection in list(pool.busy):
                    connection.silent_ticks += connection.is_awaited
                    if connection.silent_ticks > ticks_max:
                        connection.close(f"it said nothing for {self._silence_s:g} s")
                for since_s, connection in list(pool.idle):
                    if since_s <= unused_since_s:
                        connection.close()
                if not pool.busy and not pool.idle:
                    del self._pools[url]


def target_of(path: str, query: bytes = b"") -> bytes:
    """As a request's line may have it; `path` is decoded, and may hold what ends a line."""
    quoted = quote(path).encode()
    return quoted + b"?" + query if query else quoted


def to_rank(place: Address, given: Given) -> Given:
    """With what names one of the engine's data-parallel ranks, if it has several."""
    if place.dp_size == 1:
        return given
    return [*given, (b"x-data-parallel-rank", b"%d" % place.dp_rank)]


@lru_cache(maxsize=4096)
def _origin(url: str) -> _Origin:
    found = urlsplit(url)
    is_tls = found.scheme == "https"
    return _Origin(
        found.hostname or "",
        found.port or (443 if is_tls else 80),
        is_tls,
        found.path.rstrip("/").encode(),
        found.netloc.rpartition("@")[2].encode(),
    )
