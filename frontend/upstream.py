"""Engines' OpenAI servers over HTTP: one pool of connections for all of them.

Whatever goes wrong with an engine is an `EngineFault`, which says whether it can have begun on the
request. What the engine itself answers, errors included, is its answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp

from frontend.fleet import Place

CONNECT_TIMEOUT_S: Final = 5.0
IDLE_CONNECTION_S: Final = 4.0  # below the 5 s after which uvicorn closes one, as it is being used

Given = list[tuple[str, str]]
"""Headers for an engine."""


class EngineFault(Exception):
    """An engine did not answer, or broke off. `begun`: it may have worked on the request."""

    def __init__(self, url: str, why: str, *, begun: bool) -> None:
        self.begun = begun
        super().__init__(f"{url}: {why}")


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's, as it comes."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]  # names in lower case
    _response: aiohttp.ClientResponse

    @property
    def is_stream(self) -> bool:
        return self._response.content_type == "text/event-stream"

    async def read(self) -> bytes:
        """All of the body. Raises EngineFault."""
        with _faults(self._response, begun=True):
            return await self._response.read()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises EngineFault."""
        with _faults(self._response, begun=True):
            async for chunk in self._response.content.iter_any():
                yield chunk


class Upstream:
    """Opened and closed in one event loop.

    `silence_s`: an engine that says nothing is gone. `key`: what engines ask for, if they do.
    """

    def __init__(self, silence_s: float, key: str | None = None) -> None:
        self._silence_s = silence_s
        self._own = [] if key is None else [("authorization", f"Bearer {key}")]
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self._silence_s
            ),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding",),  # what comes back is passed on as it is
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @contextlib.asynccontextmanager
    async def send(
        self, method: str, url: str, headers: Sequence[tuple[str, str]], body: bytes
    ) -> AsyncIterator[Answer]:
        """Leaving the context early closes the connection, which ends the engine's work.

        Raises EngineFault.
        """
        assert self._session is not None, "open first"
        try:
            response = await self._session.request(
                method,
                url,
                headers=[*headers, *self._own],
                data=body or None,
                allow_redirects=False,
            )
        except aiohttp.ClientConnectorError as error:
            raise EngineFault(url, str(error), begun=False) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineFault(url, repr(error), begun=True) from error
        async with response:
            found = [(name.lower(), value) for name, value in response.raw_headers]
            yield Answer(response.status, found, response)


def to_rank(place: Place, given: Given) -> Given:
    """With what names one of the engine's data-parallel ranks, if it has several."""
    if place.dp_size == 1:
        return given
    return [*given, ("x-data-parallel-rank", str(place.dp_rank))]


@contextlib.contextmanager
def _faults(response: aiohttp.ClientResponse, *, begun: bool):  # type: ignore[no-untyped-def]
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EngineFault(str(response.url), repr(error), begun=begun) from error
