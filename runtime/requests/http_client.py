"""A request client over HTTP: one task a request reads its answer as fast as the caller does."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final
from urllib.parse import quote, urlsplit

import aiohttp
from yarl import URL

from runtime.requests.base import REQUEST_ID, ClientStatus, with_request_id
from runtime.requests.errors import (
    ConnectionLost,
    Overloaded,
    PayloadTooLarge,
    RequestError,
    error_of,
)
from runtime.requests.http import MEDIA_TYPE, REQUESTS, STOPS, STREAM, TIMEOUT, to_wire
from runtime.requests.settings import RequestPlaneSettings
from runtime.requests.stream import Call, ResponseStream
from runtime.requests.wire import (
    HEADERS_MAX,
    ITEM_COST_BYTES,
    End,
    FrameError,
    FrameReader,
    Item,
    Open,
    Ping,
    encode,
)
from runtime.tls import client_context

_NOT_SENT: Final = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_NOT_ADDED: Final = frozenset({"accept", "accept-encoding", "content-type"})
_BUSY: Final = {429, 503}


class HttpClient:
    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._exchanges: set[_Exchange] = set()
        self._closed = False
        self._lost_total = 0
        self._violations_total = 0
        self._made: aiohttp.ClientSession | None = None

    @property
    def _http(self) -> aiohttp.ClientSession:
        """Made with the first request: it belongs to the loop that runs then."""
        if self._made is None:
            settings = self._settings
            # A second connection of each request may be needed to stop it.
            connector = aiohttp.TCPConnector(
                limit=2 * settings.in_flight_max,
                ssl=client_context(settings.tls) if settings.tls is not None else True,
            )
            self._made = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(
                    total=None, connect=settings.connect_timeout, sock_read=settings.silence_max
                ),
                headers={"user-agent": self._name},
                skip_auto_headers=_NOT_ADDED,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._made

    def stream(
        self,
        address: str,
        endpoint: str,
        payload: bytes,
        *,
        deadline_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ResponseStream:
        found = with_request_id(headers)
        most_s = self._settings.timeout_max
        timeout_s = most_s if deadline_s is None else min(deadline_s, most_s)
        call = Call(f"{endpoint} at {address}", self._settings.window)

        async def send(call: Call) -> None:
            if self._closed:
                raise ConnectionLost("the client is closed")
            if len(self._exchanges) >= self._settings.in_flight_max:
                raise Overloaded(f"this client has {len(self._exchanges)} streams")
            if not _is_address(address):
                raise ConnectionLost(f"{address!r} is no address of this plane (http://HOST:PORT)")
            self._check(endpoint, payload, found)
            exchange = _Exchange(call, self._http, address, self._settings)
            self._exchanges.add(exchange)
            sent = {**to_wire(found), TIMEOUT: repr(timeout_s), STREAM: exchange.name}
            exchange.start(endpoint, payload, sent)
            assert exchange.task is not None
            exchange.task.add_done_callback(lambda _: self._ended(exchange))

        return ResponseStream(found[REQUEST_ID], call, send, timeout_s)

    async def close(self) -> None:
        self._closed = True
        for exchange in list(self._exchanges):
            exchange.call.cancel(ConnectionLost("the client was closed"))
        tasks = [exchange.task for exchange in self._exchanges if exchange.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._made is not None:
            await self._made.close()

    def status(self) -> ClientStatus:
        return ClientStatus(
            kind="http",
            connections=len(self._exchanges),
            in_flight=len(self._exchanges),
            in_flight_max=self._settings.in_flight_max,
            lost_total=self._lost_total,
            violations_total=self._violations_total,
        )

    def _check(self, endpoint: str, payload: bytes, headers: dict[str, str]) -> None:
        """The same limit as over TCP, where a request is one frame."""
        assert len(headers) <= HEADERS_MAX
        empty = encode(Open(1, endpoint, b"", headers, 0.0, 1))
        most_bytes = self._settings.frame_max - len(empty) - ITEM_COST_BYTES
        if len(payload) > most_bytes:
            raise PayloadTooLarge(
                f"a request of {len(payload)} bytes; at most {max(0, most_bytes)} may be"
            )

    def _ended(self, exchange: _Exchange) -> None:
        self._exchanges.discard(exchange)
        self._lost_total += exchange.was_lost
        self._violations_total += exchange.broke_rules


class _Exchange:
    """One request and its answer; the call's driver."""

    def __init__(
        self, call: Call, http: aiohttp.ClientSession, address: str, settings: RequestPlaneSettings
    ) -> None:
        self.call = call
        self.name = secrets.token_hex(8)
        self.task: asyncio.Task[None] | None = None
        self.was_lost = False
        self.broke_rules = False
        self._http = http
        self._settings = settings
        self._address = address.rstrip("/")
        self._room = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    def start(self, endpoint: str, payload: bytes, headers: dict[str, str]) -> None:
        self.call.driver = self
        run = self._run(REQUESTS + quote(endpoint, safe=""), payload, headers)
        self.task = asyncio.create_task(run, name=f"request {endpoint}")

    # -- Driver ---------------------------------------------------------------------------

    def taken(self, size_bytes: int) -> None:
        self.call.ungranted_bytes -= size_bytes
        self._room.set()

    def stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="request-stop")

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    # -- within ---------------------------------------------------------------------------

    def _post(
        self, path: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        tls = self._settings.tls
        return self._http.post(
            URL(self._address + path, encoded=True),
            data=payload,
            headers=headers,
            allow_redirects=False,
            server_hostname=tls.server_name if tls is not None else None,
        )

    async def _stop(self) -> None:
        # Where this fails, what becomes of the request itself tells the same.
        with contextlib.suppress(aiohttp.ClientError):
            async with self._post(STOPS + self.name):
                pass

    async def _run(self, path: str, payload: bytes, headers: dict[str, str]) -> None:
        call = self.call
        try:
            async with self._post(path, payload, headers) as response:
                if response.headers.get("content-type") != MEDIA_TYPE:
                    call.finish(_foreign(response.status))
                    return
                reader = FrameReader(self._settings.frame_max)
                async for data in response.content.iter_any():
                    await self._read(reader, data)  # also past the end: the connection is kept
            if not call.ended:
                raise aiohttp.ClientPayloadError("the answer has no end")
        except FrameError as error:
            self.broke_rules = True
            call.finish(ConnectionLost(f"{self._address} broke the rules: {error}"))
        except aiohttp.ClientError as error:
            self.was_lost = True
            call.finish(self._lost(error))
        finally:
            if self._stopping is not None:
                self._stopping.cancel()

    async def _read(self, reader: FrameReader, data: bytes) -> None:
        call = self.call
        for frame in reader.feed(data):
            match frame:
                case Item(_, payload):
                    while call.ungranted_bytes >= call.window_bytes:
                        self._room.clear()
                        await self._room.wait()
                    call.deliver(payload)
                case End(_, outcome, message):
                    call.finish(error_of(outcome, message))
                case Ping():
                    pass
                case _:
                    raise FrameError(f"{type(frame).__name__} from a server")

    def _lost(self, error: aiohttp.ClientError) -> ConnectionLost:
        if isinstance(error, _NOT_SENT):
            self.call.driver = None
        if isinstance(error, aiohttp.SocketTimeoutError):
            silent_s = self._settings.silence_max
            return ConnectionLost(f"{self._address} said nothing for {silent_s:g} s")
        return ConnectionLost(str(error) or type(error).__name__)


def _foreign(status: int) -> RequestError:
    """An answer that is not the request plane's: of uvicorn itself, or of a proxy."""
    detail = f"the answer was HTTP {status}"
    return Overloaded(detail) if status in _BUSY else ConnectionLost(detail)


def _is_address(address: str) -> bool:
    try:
        found = urlsplit(address)
        return found.scheme in {"http", "https"} and bool(found.hostname) and found.port != 0
    except ValueError:
        return False
