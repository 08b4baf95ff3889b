"""A request server of sessions: the dispatcher behind a listener of one kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from runtime.requests.base import Canary, Handler, ServerStatus
from runtime.requests.canary import watch
from runtime.requests.dispatch import Dispatcher
from runtime.requests.server_session import ServerSession
from runtime.requests.session import Link, Session
from runtime.requests.settings import RequestPlaneSettings
from runtime.tasks import end

Accept = Callable[[Link], Session]


class Listener(Protocol):
    kind: str

    async def start(self, accept: Accept) -> str:
        """Call `accept` for each link that is made; the address for clients."""
        ...

    async def close(self) -> None:
        """Accept no more, and end what is left of the links soon."""
        ...


class SessionServer:
    def __init__(self, settings: RequestPlaneSettings, name: str, listener: Listener) -> None:
        self._settings = settings
        self._name = name
        self._listener = listener
        self._dispatcher = Dispatcher(settings)
        self._sessions: set[Session] = set()
        self._violations_total = 0
        self._address: str | None = None
        self._watch: asyncio.Task[None] | None = None

    def serve(self, endpoint: str, handler: Handler, *, canary: Canary | None = None) -> None:
        self._dispatcher.serve(endpoint, handler, canary)

    def withdraw(self, endpoint: str) -> None:
        self._dispatcher.withdraw(endpoint)

    async def start(self) -> str:
        assert self._address is None, "started already"
        self._address = await self._listener.start(self._accept)
        self._watch = asyncio.create_task(watch(self._dispatcher), name="canaries")
        return self._address

    async def drain(self, timeout_s: float) -> int:
        return await self._dispatcher.drain(timeout_s)

    async def close(self) -> None:
        watching, self._watch = self._watch, None
        if watching is not None:
            await end(watching)
        await self._dispatcher.close()
        for session in list(self._sessions):
            session.close("the server closes")
        if self._address is not None:
            self._address = None
            await self._listener.close()

    def status(self) -> ServerStatus:
        return self._dispatcher.status(
            self._listener.kind, self._address, len(self._sessions), self._violations_total
        )

    def _accept(self, link: Link) -> Session:
        session = ServerSession(link, self._settings, self._name, self._ended, self._dispatcher)
        self._sessions.add(session)
        if len(self._sessions) > self._settings.connections_max:
            session.close(f"the server has {self._settings.connections_max} connections already")
        return session

    def _ended(self, session: Session) -> None:
        self._sessions.discard(session)
        self._violations_total += session.broke_rules
