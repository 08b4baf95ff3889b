"""The request plane over NATS: sessions as over TCP, their bytes in messages.

A server listens on a subject of its own. A client's first message goes there, with an inbox; each
answer carries the subject that the server keeps for this session. Every message begins with a
number that rises by one, so a message that NATS lost ends the session instead of corrupting it.
A frame must fit a message, so payloads are bounded by the NATS server's `max_payload`. When the
connection to NATS breaks all its sessions end; a server connects again for as long as it is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from runtime.nats_client import CLOSE_TIMEOUT_S, connect, shut
from runtime.requests.base import RequestClient, RequestServer
from runtime.requests.client import SessionClient
from runtime.requests.client_session import ClientSession
from runtime.requests.errors import ConnectionLost
from runtime.requests.server import Accept, SessionServer
from runtime.requests.session import Link, Session
from runtime.requests.settings import RequestPlaneSettings
from runtime.requests.wire import LENGTH_BYTES
from runtime.tasks import end

SCHEME: Final = "nats://"
NUMBER_BYTES: Final = 8
RETRY_S: Final = 0.1  # doubles up to
RETRY_S_MAX: Final = 2.0
QUEUE_HIGH_BYTES: Final = 1 << 20  # sessions wait above it
QUEUE_LOW_BYTES: Final = 256 << 10  # and go on below it
_NO_RESPONDERS: Final = "503"

_log = structlog.get_logger()


class NatsPlane:
    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._name = name

    def server(self) -> RequestServer:
        listener = _NatsListener(self._settings, self._name)
        return SessionServer(self._settings, self._name, listener)

    def client(self) -> RequestClient:
        connector = _NatsConnector(self._settings, self._name)
        return SessionClient(self._settings, self._name, connector)


class _Connection:
    """One connection to NATS, with the links on it and what they have to say."""

    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._client = Client()
        self._queue: deque[tuple[str, str, bytes]] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self.links: set[_NatsLink] = set()
        self.broken = asyncio.Event()

    @property
    def max_payload(self) -> int:
        return int(self._client.max_payload)

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    async def open(self) -> None:
        """Raises OSError where NATS cannot be reached."""
        settings = self._settings

        async def broke() -> None:
            self.broken.set()
            self._wake.set()

        try:
            self._client = await connect(settings, self._name, settings.connect_timeout, broke)
        except OSError as error:
            raise OSError(f"NATS at {settings.nats_url}: {error}") from error
        self._writer = asyncio.create_task(self._write(), name="request-plane-nats")

    async def close(self) -> None:
        """Send what is queued if that is quick. Idempotent."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    while self._queue and not self.broken.is_set():
                        await asyncio.sleep(0.01)
            await end(writer)
        for link in list(self.links):
            link.lost("the connection to NATS is closed")
        await asyncio.gather(*self._leaving)
        await shut(self._client)
        self.broken.set()

    async def subscribe(self, subject: str, heard: Callable[[Msg], Awaitable[None]]) -> Any:
        try:
            subscription = await self._client.subscribe(subject, cb=heard)
            await self._client.flush(timeout=self._settings.connect_timeout)
        except (NatsError, TimeoutError) as error:
            raise OSError(f"NATS: {error or type(error).__name__}") from error
        return subscription

    def unsubscribe(self, subscription: Any) -> None:
        """Without waiting for it."""
        task = asyncio.create_task(_unsubscribe(subscription), name="unsubscribe")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def say(self, subject: str, reply: str, data: bytes) -> None:
        self._queue.append((subject, reply, data))
        self._queued_bytes += len(data)
        self._wake.set()
        if self._queued_bytes > QUEUE_HIGH_BYTES:
            for link in self.links:
                link.pause()

    async def _write(self) -> None:
        """Sends in order what is queued; the only one that publishes."""
        try:
            while not self.broken.is_set():
                self._wake.clear()
                while self._queue:
                    subject, reply, data = self._queue[0]
                    await self._client.publish(subject, data, reply=reply)
                    self._queue.popleft()
                    self._queued_bytes -= len(data)
                    if self._queued_bytes <= QUEUE_LOW_BYTES:
                        for link in self.links:
                            link.resume()
                await self._wake.wait()
            reason = "it was closed"
        except (NatsError, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
        self.broken.set()
        for link in list(self.links):
            link.lost(f"the connection to NATS was lost: {reason}")


class _NatsLink:
    """Bytes of one session: `here` is the subject we hear on, `there` the other side's."""

    def __init__(self, connection: _Connection, here: str, there: str, peer: str) -> None:
        self.peer = peer
        self.frame_bytes_max = connection.max_payload - NUMBER_BYTES - LENGTH_BYTES
        self.session: Session | None = None
        self.subscription: Any = None
        self._connection = connection
        self._here = here
        self._there = there
        self._said = 0
        self._heard = 0
        connection.links.add(self)

    def write(self, data: bytes | bytearray) -> None:
        most = self._connection.max_payload - NUMBER_BYTES
        for at in range(0, len(data), most):
            number = self._said.to_bytes(NUMBER_BYTES, "little")
            self._said += 1
            self._connection.say(self._there, self._here, number + data[at : at + most])

    def unsent_bytes(self) -> int:
        return self._connection.queued_bytes  # of all links, which are paused before it is much

    def close(self) -> None:
        self._connection.links.discard(self)
        subscription, self.subscription = self.subscription, None
        if subscription is not None:
            self._connection.unsubscribe(subscription)

    async def heard(self, message: Msg) -> None:
        session = self.session
        if session is None:
            return
        if message.headers and message.headers.get("Status") == _NO_RESPONDERS:
            self.lost("nobody listens there")
            return
        number = int.from_bytes(message.data[:NUMBER_BYTES], "little")
        if len(message.data) <= NUMBER_BYTES or number != self._heard:
            self.lost(f"message {self._heard} from {self.peer} is missing")
            return
        self._heard += 1
        if message.reply:
            self._there = message.reply
        session.received(message.data[NUMBER_BYTES:])

    def lost(self, reason: str) -> None:
        if self.session is not None:
            self.session.lost(reason)
        self.close()

    def pause(self) -> None:
        if self.session is not None:
            self.session.pause()

    def resume(self) -> None:
        if self.session is not None:
            self.session.resume()


class _NatsListener:
    kind = "nats"

    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._subject = f"kvbm.{settings.namespace}.requests.{secrets.token_hex(8)}"
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, accept: Accept) -> str:
        """The address is its own from now on; NATS may come later."""
        tried = asyncio.Event()
        self._task = asyncio.create_task(self._keep(accept, tried), name="request-listener")
        waiting = asyncio.create_task(tried.wait())
        await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done():
            self._task.result()  # which is no fault of NATS's
        return SCHEME + self._subject

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await end(task)
        if self._connection is not None:
            await self._connection.close()

    async def _listen(self, accept: Accept) -> _Connection:
        """Raises OSError where NATS cannot be reached."""
        connection = _Connection(self._settings, self._name)
        await connection.open()
        self._connection = connection

        async def greeted(message: Msg) -> None:
            if not message.reply:
                return
            here = f"{self._subject}.{secrets.token_hex(8)}"
            link = _NatsLink(connection, here, message.reply, f"client {message.reply}")
            with contextlib.suppress(OSError):  # broken: the client will not be answered
                link.subscription = await connection.subscribe(here, link.heard)
                link.session = accept(link)
                await link.heard(Msg(connection, data=message.data))

        try:
            await connection.subscribe(self._subject, greeted)
        except OSError:
            await connection.close()
            raise
        return connection

    async def _keep(self, accept: Accept, tried: asyncio.Event) -> None:
        """Connect, and again whenever the connection is gone."""
        url, retry_s, said, was_away = self._settings.nats_url, RETRY_S, "", False
        while True:
            try:
                connection = await self._listen(accept)
            except OSError as error:
                if str(error) != said:
                    said = str(error)
                    _log.warning("request_plane_waits", url=url, reason=said)
                was_away = True
                tried.set()
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_S_MAX)
                continue
            if was_away:
                _log.info("request_plane_connected", url=url)
            tried.set()
            retry_s, said, was_away = RETRY_S, "", True
            await connection.broken.wait()
            await connection.close()
            _log.warning("request_plane_disconnected", url=url)
            await asyncio.sleep(retry_s)


class _NatsConnector:
    kind = "nats"

    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._connection: _Connection | None = None
        self._opening = asyncio.Lock()

    async def connect(self, address: str, make: Callable[[Link], ClientSession]) -> ClientSession:
        subject = address.removeprefix(SCHEME)
        if subject == address or not _is_subject(subject):
            raise ConnectionLost(f"{address!r} is no address of this plane ({SCHEME}SUBJECT)")
        connection = await self._connected()
        inbox = f"_INBOX.{secrets.token_hex(12)}"
        link = _NatsLink(connection, inbox, subject, address)
        try:
            link.subscription = await connection.subscribe(inbox, link.heard)
        except BaseException:
            link.close()
            raise
        link.session = session = make(link)
        return session

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connected(self) -> _Connection:
        async with self._opening:
            if self._connection is not None and not self._connection.broken.is_set():
                return self._connection
            await self.close()
            connection = _Connection(self._settings, self._name)
            await connection.open()
            self._connection = connection
            return connection


def _is_subject(text: str) -> bool:
    return all(
        token and token.isprintable() and not set(token) & set(" *>") for token in text.split(".")
    )


async def _unsubscribe(subscription: Any) -> None:
    with contextlib.suppress(NatsError, OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await subscription.unsubscribe()
