"""The router on the request plane, for callers elsewhere: `route`, `explain`, `forecast`, `events`.

Payloads are those of the HTTP API. What is refused is an answer as well, with `rejected`. A request
is known to the router that routed it: tell its events to the instance that the answer names.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from router.asks import AskRefused
from router.service import NotRouted, RouterService
from runtime.component import Serving
from runtime.requests import RequestContext
from runtime.requests.base import Handler


async def serve_component(service: RouterService) -> list[Serving]:
    """Until the assembly's runtime is closed; raises OSError where no address can be had."""
    settings = service.assembly.settings.component
    if settings is None:
        return []
    runtime = service.assembly.runtime
    place = runtime.namespace(service.assembly.namespace).component(settings.name)
    answers: dict[str, Callable[[bytes], Awaitable[Any]]] = {
        "events": _at_once(service.events),
        "explain": _at_once(service.explain),
        "forecast": _at_once(service.forecast),
        "route": service.route,
    }
    labels = {"router": service.assembly.settings.name}
    # All at once: where discovery is away each waits for it a while.
    serving = await asyncio.gather(
        *(
            place.endpoint(name).serve(_handler(service, name, answer), labels=labels)
            for name, answer in answers.items()
        )
    )
    service.events_instance = f"{serving[list(answers).index('events')].name.id:x}"
    return serving


def _at_once(answer: Callable[[bytes], Any]) -> Callable[[bytes], Awaitable[Any]]:
    async def call(body: bytes) -> Any:
        return answer(body)

    return call


def _handler(
    service: RouterService, name: str, answer: Callable[[bytes], Awaitable[Any]]
) -> Handler:
    async def handle(payload: bytes, _context: RequestContext) -> AsyncIterator[bytes]:
        try:
            told = await answer(payload)
        except AskRefused as error:
            service.assembly.metrics.bad_request(name)
            told = {"rejected": {"kind": "bad-request", "why": str(error)}}
        except NotRouted as error:
            told = {"rejected": {"kind": error.kind, "why": str(error)}}
        yield msgspec.json.encode(told)

    return handle
