"""Engines of pools: on the request plane, or with nothing but an OpenAI server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from router.pools.local_router import Place
from runtime.engine_card import COMPONENT, ENDPOINT
from runtime.engines.completions import CompletionEngines
from runtime.engines.upstream import EngineFault, Upstream
from runtime.generation import EngineRefused, Generate, Generated, decode_generated, encode
from runtime.requests import RequestClient, RequestContext
from runtime.requests.errors import ConnectionLost

Piece = tuple[bytes, Generated]
"""An item for who asked, and the same read."""

_HEADERS: Final = ("x-request-id", "traceparent")


class Engines:
    """Called from one event loop, its client's and upstream's."""

    def __init__(self, client: RequestClient, upstream: Upstream) -> None:
        self._client = client
        self._servers = CompletionEngines(upstream)

    def ask(
        self, namespace: str, place: Place, request: Generate, context: RequestContext
    ) -> AsyncGenerator[Piece]:
        """Closing the iterator ends the work, and so does the context's end.

        Raises RequestError. What no engine would take is an item that says so.
        """
        ask = self._over_http if place.takes_http else self._on_plane
        return ask(namespace, place, request, context)

    async def _on_plane(
        self, namespace: str, place: Place, request: Generate, context: RequestContext
    ) -> AsyncGenerator[Piece]:
        stream = self._client.stream(
            place.transport,
            f"{namespace}.{COMPONENT}.{ENDPOINT}",
            encode(request),
            deadline_s=context.left_s(),
            headers=context.headers,
        )
        async with stream as items:
            async for item in items:
                yield item, decode_generated(item)
                if context.stopped.is_set():
                    stream.stop()

    async def _over_http(
        self, namespace: str, place: Place, request: Generate, context: RequestContext
    ) -> AsyncGenerator[Piece]:
        headers = {name: context.headers[name] for name in _HEADERS if name in context.headers}
        try:
            async with aclosing(self._servers.generate(place, request, headers)) as batches:
                async for items in batches:
                    for item in items:
                        yield encode(item), item
                    if context.stopped.is_set():
                        return
        except EngineRefused as error:
            item = Generated(token_ids=[], refused=error.refused)
            yield encode(item), item
        except EngineFault as fault:
            raise ConnectionLost(str(fault), was_sent=fault.begun) from fault
