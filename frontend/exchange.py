"""A request from the moment it comes in to the end of its answer, whatever becomes of it.

Plain ASGI, below the framework's request objects: they would cost more than all of this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

import structlog

from frontend import headers as names
from frontend.errors import INVALID_JSON, ApiError
from frontend.gate import ClientGone, Gate, Receive, Scope, Send
from frontend.meter import Measured, Meter
from frontend.respond import Reply

_log = structlog.get_logger("kvbm.frontend")


class Handler(Protocol):
    async def __call__(self, body: bytes, scope: Scope, reply: Reply, measured: Measured) -> None:
        """Answer the request. Is cancelled when the client leaves. Raises ApiError."""
        ...


class Exchange:
    """The ASGI application of one route."""

    def __init__(self, route: str, handler: Handler, gate: Gate, meter: Meter) -> None:
        self._route = route
        self._handler = handler
        self._gate = gate
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, names.request_id(scope["headers"]))
        try:
            self._gate.check_key(scope["headers"])
            self._gate.enter()
        except ApiError as error:
            self._meter.refused(self._route, error)
            await reply.error(error, self._route)
            return
        try:
            await self._admitted(scope, receive, reply)
        finally:
            self._gate.leave()

    async def _admitted(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        measured = self._meter.begin(self._route)
        try:
            body = await self._gate.body(scope["headers"], receive)
            await _until_client_leaves(receive, self._handler(body, scope, reply, measured))
        except ClientGone:
            measured.outcome = "" if measured.is_whole else "cancelled"
        except ApiError as error:
            told = _explained(error, scope["headers"])
            measured.failed(told)
            await reply.error(told, self._route)
        except Exception:  # noqa: BLE001 (a fault of ours is one request's, and is logged)
            _log.exception("request_failed", route=self._route, request=reply.request_id)
            fault = ApiError(500, "The frontend failed; its log says why", "internal")
            measured.failed(fault)
            await reply.error(fault, self._route)
        finally:
            measured.end()


def _explained(error: ApiError, headers: names.Headers) -> ApiError:
    """What is no JSON is often none because of how it was sent."""
    if error.code != INVALID_JSON:
        return error
    encoding = names.first(headers, b"content-encoding") or b"identity"
    if encoding.lower() != b"identity":
        said = f"Bodies are not unpacked here, and this is {encoding.decode('latin-1')}"
        as_it_is = ((b"accept-encoding", b"identity"),)
        return ApiError(415, said, "unsupported_encoding", extra=as_it_is)
    kind = names.first(headers, b"content-type") or b"application/json"
    if b"json" not in kind.lower():
        said = f"The body is {kind.decode('latin-1')}: send application/json"
        return ApiError(415, said, "unsupported_media_type")
    return error


async def _until_client_leaves(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Raises ClientGone, the work then cancelled, when the client closes its connection."""
    task = asyncio.current_task()
    assert task is not None
    leaving = asyncio.ensure_future(_left(receive))
    leaving.add_done_callback(lambda done: done.cancelled() or task.cancel())
    try:
        await work
    except asyncio.CancelledError:
        if leaving.done() and not leaving.cancelled() and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        leaving.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
