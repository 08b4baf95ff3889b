"""A request client over HTTP: one task a request reads its answer as fast as the caller does."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, urlsplit

import httpx2

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

_NOT_SENT: Final = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_BUSY: Final = {429, 503}


class HttpClient:
    def __init__(self, settings: RequestPlaneSettings, name: str) -> None:
        self._settings = settings
        self._exchanges: set[_Exchange] = set()
        self._closed = False
        self._lost_total = 0
        self._violations_total = 0
        tls = settings.tls
        name_expected = tls.server_name if tls is not None else None
        self._extensions = {"sni_hostname": name_expected} if name_expected is not None else {}
        connect_s, silence_s = settings.connect_timeout, settings.silence_max
        self._http = httpx2.AsyncClient(
            verify=client_context(tls) if tls is not None else True,
            timeout=httpx2.Timeout(silence_s, connect=connect_s, pool=connect_s),
            # A second connection of each may be needed to stop it.
            limits=httpx2.Limits(max_connections=2 * settings.in_flight_max),
            headers={"user-agent": name},
            trust_env=False,
        )

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
            exchange = _Exchange(call, self._http, address, self._extensions)
            self._exchanges.add(exchange)
            sent = {**to_wire(found), TIMEOUT: repr(timeout_s), STREAM: exchange.name}
            exchange.start(endpoint, payload, sent, self._settings.frame_max)
            assert exchange.task is not None
            exchange.task.add_done_callback(lambda _: self._ended(exchange))

        return ResponseStream(found[REQUEST_ID], call, send, timeout_s)

    async def close(self) -> None:
        self._closed = True
        for exchange in list(self._exchanges):
            exchange.call.cancel(ConnectionLost("the client was closed"))
        tasks = [exchange.task for exchange in self._exchanges if exchange.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

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
        self, call: Call, http: httpx2.AsyncClient, address: str, extensions: dict[str, str]
    ) -> None:
        self.call = call
        self.name = secrets.token_hex(8)
        self.task: asyncio.Task[None] | None = None
        self.was_lost = False
        self.broke_rules = False
        self._http = http
        self._extensions = extensions
        self._address = address.rstrip("/")
        self._room = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    def start(
        self, endpoint: str, payload: bytes, headers: dict[str, str], frame_bytes_max: int
    ) -> None:
        self.call.driver = self
        run = self._run(REQUESTS + quote(endpoint, safe=""), payload, headers, frame_bytes_max)
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

    async def _stop(self) -> None:
        # Where this fails, what becomes of the request itself tells the same.
        with contextlib.suppress(httpx2.TransportError):
            await self._http.post(f"{self._address}{STOPS}{self.name}", extensions=self._extensions)

    async def _run(
        self, path: str, payload: bytes, headers: dict[str, str], frame_bytes_max: int
    ) -> None:
        call = self.call
        try:
            async with self._http.stream(
                "POST",
                self._address + path,
                content=payload,
                headers=headers,
                extensions=self._extensions,
            ) as response:
                if response.headers.get("content-type") != MEDIA_TYPE:
                    call.finish(_foreign(response.status_code))
                    return
                reader = FrameReader(frame_bytes_max)
                async for data in response.aiter_raw():
                    await self._read(reader, data)  # also past the end: the connection is kept
            if not call.ended:
                raise httpx2.ReadError("the answer has no end")
        except FrameError as error:
            self.broke_rules = True
            call.finish(ConnectionLost(f"{self._address} broke the rules: {error}"))
        except httpx2.TransportError as error:
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

    def _lost(self, error: httpx2.TransportError) -> ConnectionLost:
        if isinstance(error, _NOT_SENT):
            self.call.driver = None
        if isinstance(error, httpx2.ReadTimeout):
            silent_s = self._http.timeout.read
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
