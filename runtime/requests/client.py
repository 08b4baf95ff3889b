"""A request client of sessions: one to each address, made when it is first used or lost before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from runtime.requests.base import REQUEST_ID, ClientStatus, with_request_id
from runtime.requests.client_session import ClientSession
from runtime.requests.errors import ConnectionLost, Overloaded
from runtime.requests.session import Link, Session
from runtime.requests.settings import RequestPlaneSettings
from runtime.requests.stream import Call, ResponseStream

_log = structlog.get_logger()


class Connector(Protocol):
    kind: str

    async def connect(self, address: str, make: Callable[[Link], ClientSession]) -> ClientSession:
        """A link with the session that `make` makes on it; raises OSError or ConnectionLost."""
        ...

    async def close(self) -> None: ...


class SessionClient:
    def __init__(self, settings: RequestPlaneSettings, name: str, connector: Connector) -> None:
        self._settings = settings
        self._name = name
        self._connector = connector
        self._sessions: dict[str, ClientSession] = {}
        self._connecting: dict[str, asyncio.Task[ClientSession]] = {}
        self._closed = False
        self._lost_total = 0
        self._violations_total = 0

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
        loop = asyncio.get_running_loop()
        call = Call(f"{endpoint} at {address}", self._settings.window)

        async def send(call: Call) -> None:
            session = await self._session(address)
            await session.open(call, endpoint, payload, found, end_s)

        end_s = loop.time() + timeout_s
        return ResponseStream(found[REQUEST_ID], call, send, timeout_s)

    async def close(self) -> None:
        self._closed = True
        tasks = list(self._connecting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in list(self._sessions.values()):
            session.close("the client closes")
        await self._connector.close()

    def status(self) -> ClientStatus:
        return ClientStatus(
            kind=self._connector.kind,
            connections=len(self._sessions),
            in_flight=self._in_flight(),
            in_flight_max=self._settings.in_flight_max,
            lost_total=self._lost_total,
            violations_total=self._violations_total,
        )

    def _in_flight(self) -> int:
        return sum(session.calls_count for session in self._sessions.values())

    async def _session(self, address: str) -> ClientSession:
        """The one to this address; callers that come while it is made share the attempt."""
        if self._closed:
            raise ConnectionLost("the client is closed")
        if self._in_flight() >= self._settings.in_flight_max:
            raise Overloaded(f"this client has {self._settings.in_flight_max} streams")
        session = self._sessions.get(address)
        if session is not None:
            return session
        task = self._connecting.get(address)
        if task is None:
            task = asyncio.create_task(self._connect(address), name=f"connect {address}")
            self._connecting[address] = task

            def done(task: asyncio.Task[ClientSession]) -> None:
                del self._connecting[address]
                _ = task.cancelled() or task.exception()  # told to those who still wait

            task.add_done_callback(done)
        try:
            return await asyncio.shield(task)
        except ConnectionLost as error:  # one for each of those who wait
            raise ConnectionLost(error.detail) from error
        except asyncio.CancelledError:
            if self._closed and task.cancelled():
                raise ConnectionLost("the client was closed") from None
            raise

    async def _connect(self, address: str) -> ClientSession:
        timeout_s = self._settings.connect_timeout
        made: list[ClientSession] = []

        def make(link: Link) -> ClientSession:
            made.append(ClientSession(link, self._settings, self._name, self._ended))
            made[0].say_hello()
            return made[0]

        try:
            async with asyncio.timeout(timeout_s):
                session = await self._connector.connect(address, make)
                await session.ready.wait()
        except TimeoutError as error:
            reason = f"no connection within {timeout_s:g} s"
            raise ConnectionLost(reason) from error
        except OSError as error:
            raise ConnectionLost(str(error) or type(error).__name__) from error
        finally:
            if made and made[0].hello is None:
                made[0].close("it was not greeted in time")
        if session.reason is not None:
            raise ConnectionLost(session.reason)
        self._sessions[address] = session
        return session

    def _ended(self, session: Session) -> None:
        self._lost_total += 1
        self._violations_total += session.broke_rules
        for address, known in list(self._sessions.items()):
            if known is session:
                del self._sessions[address]
                if not self._closed:
                    _log.info("request_session_lost", address=address, reason=session.reason)
