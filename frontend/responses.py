"""Responses that engines keep: a request about one goes to the engine that has it.

What an engine answered is in that engine alone. Ids are remembered as answers pass; of one that is
not known here (another frontend's, one from before a restart, one forgotten) the engines are asked.
So several frontends of one namespace need to tell each other nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import MutableMapping, Sequence
from typing import Any, Final

import msgspec

from frontend import headers as names
from frontend.errors import ApiError, engine_lost
from frontend.exchange import Exchange, Handler
from frontend.fleet import Fleet, Place
from frontend.gate import Gate, Receive, Scope, Send
from frontend.keep_alive import EVENT_STREAM, NEVER, KeepAlive
from frontend.meter import Measured, Meter
from frontend.relay import RESPONSES, WORKER, back
from frontend.request import decode
from frontend.respond import Reply
from runtime.engines.upstream import Answer, EngineFault, Upstream, target_of

ASK_DEADLINE_S: Final = 5.0
ASKED_MAX: Final = 32  # engines at a time, of all searches
ID_PLACE_BYTES_MAX: Final = 4 << 20
"""An answer's id is not looked for behind so much of it."""
_ID = re.compile(r"\w[\w.:-]{0,255}", re.ASCII)


class _Made(msgspec.Struct, frozen=True):
    """Of an answer, or of what an event of a stream tells."""

    id: str = ""


class _Event(msgspec.Struct):
    response: _Made = _Made()


class _Following(msgspec.Struct):
    previous_response_id: str | None = None


_made_decoder = msgspec.json.Decoder(_Made)
_event_decoder = msgspec.json.Decoder(_Event)
_following_decoder = msgspec.json.Decoder(_Following)


class Makers:
    """Which instance made which response: of the latest `most`."""

    def __init__(self, most: int, meter: Meter) -> None:
        self._most = most
        self._meter = meter
        self._instances: dict[str, int] = {}  # the oldest first

    def note(self, response_id: str, instance: int) -> None:
        self._instances[response_id] = instance
        if len(self._instances) > self._most:
            del self._instances[next(iter(self._instances))]
            self._meter.responses_forgotten.inc()
        self._meter.responses_remembered.set(len(self._instances))

    def get(self, response_id: str) -> int | None:
        return self._instances.get(response_id)

    def forget(self, response_id: str) -> None:
        self._instances.pop(response_id, None)
        self._meter.responses_remembered.set(len(self._instances))


class Responses:
    """Handlers: `create` of a new one, by way of `relay`, and `about` one that is there."""

    def __init__(
        self,
        relay: Handler,
        fleet: Fleet,
        upstream: Upstream,
        makers: Makers,
        meter: Meter,
        *,
        keep_alive: KeepAlive = NEVER,
    ) -> None:
        self._relay = relay
        self._fleet = fleet
        self._upstream = upstream
        self._makers = makers
        self._meter = meter
        self._keep_alive = keep_alive
        self._asking = asyncio.Semaphore(ASKED_MAX)

    async def create(self, body: bytes, scope: Scope, reply: Reply, measured: Measured) -> None:
        """Where the one before is; if no engine has that, any may say so."""
        previous = decode(_following_decoder, body).previous_response_id
        if previous and names.first(scope["headers"], names.INSTANCE) is None:
            place = await self._place_of(previous)
            if place is not None:
                pinned = (names.INSTANCE, b"%x" % place.instance)
                scope = {**scope, "headers": [*scope["headers"], pinned]}
        await self._relay(body, scope, reply, measured)

    async def about(self, body: bytes, scope: Scope, reply: Reply, measured: Measured) -> None:
        response_id = scope["path_params"]["response_id"]
        place = await self._place_of(response_id)
        if place is None:
            said = f"Response with id {response_id!r} not found"
            raise ApiError(404, said, "response_not_found", "response_id")
        given = [
            *names.onward(scope["headers"]),
            (names.REQUEST_ID, reply.request_id.encode()),
            (names.TRACEPARENT, names.traceparent(scope["headers"])),
        ]
        method = scope["method"].encode()
        target = target_of(scope["path"], scope.get("query_string") or b"")
        try:
            with await self._upstream.send(method, place.url, target, given, body) as answer:
                measured.status = answer.status
                await self._pass_back(answer, place, reply)
        except EngineFault as fault:
            raise engine_lost("The engine that has the response was lost") from fault
        if scope["method"] == "DELETE" and measured.status < 300:
            self._makers.forget(response_id)

    async def _pass_back(self, answer: Answer, place: Place, reply: Reply) -> None:
        head = [*back(answer), (WORKER, b"%x.%d" % (place.instance, place.dp_rank))]
        if not answer.is_stream:
            await reply.whole(answer.status, head, await answer.read())
            return
        await reply.begin(answer.status, head)
        with self._keep_alive.watching(reply, lambda: EVENT_STREAM):
            while chunk := await answer.part():
                await reply.part(chunk)
        await reply.end()

    async def _place_of(self, response_id: str) -> Place | None:
        """The engine that has it; None if none of those that are there does."""
        if _ID.fullmatch(response_id) is None:
            return None
        places = self._fleet.places()
        maker = self._makers.get(response_id)
        if maker is None:
            return await self._search(response_id, places)
        return next((place for place in places if place.instance == maker), None)

    async def _search(self, response_id: str, places: Sequence[Place]) -> Place | None:
        asked = [asyncio.ensure_future(self._has(place, response_id)) for place in places]
        found = None
        try:
            for answer in asyncio.as_completed(asked, timeout=ASK_DEADLINE_S):
                found = await answer
                if found is not None:
                    self._makers.note(response_id, found.instance)
                    break
        except TimeoutError:
            pass  # who did not answer in time cannot be asked for it either
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        self._meter.response_searches.labels("not_found" if found is None else "found").inc()
        return found

    async def _has(self, place: Place, response_id: str) -> Place | None:
        target = target_of(f"{RESPONSES}/{response_id}")
        async with self._asking:
            try:
                with await self._upstream.send(b"GET", place.url, target, (), b"") as answer:
                    return place if answer.status == 200 else None
            except EngineFault:
                return None


class CreatingExchange(Exchange):
    """That of `POST /v1/responses`: notes the ids in answers before their clients see them."""

    def __init__(
        self, route: str, handler: Handler, gate: Gate, meter: Meter, makers: Makers
    ) -> None:
        super().__init__(route, handler, gate, meter)
        self._makers = makers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, _Noting(send, self._makers))


class _Noting:
    """Passes an answer on and looks for its id, until it is found."""

    def __init__(self, send: Send, makers: Makers) -> None:
        self._send = send
        self._makers = makers
        self._instance: int | None = None  # while its id is looked for
        self._is_stream = False
        self._body = b""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._begin(message)
        elif self._instance is not None:
            self._look(self._instance, message)
        await self._send(message)

    def _begin(self, message: MutableMapping[str, Any]) -> None:
        worker = names.first(message["headers"], WORKER)
        if message["status"] == 200 and worker is not None:
            self._instance = int(worker.partition(b".")[0], 16)
            kind = names.first(message["headers"], b"content-type") or b""
            self._is_stream = kind.startswith(b"text/event-stream")

    def _look(self, instance: int, message: MutableMapping[str, Any]) -> None:
        self._body += message.get("body", b"")
        found = ""
        if self._is_stream:
            *events, self._body = self._body.split(b"\n\n")
            found = next(filter(None, map(_id_in_event, events)), "")
        elif not message.get("more_body", False):
            found = _id_of(self._body)
        if found:
            self._makers.note(found, instance)
        if found or len(self._body) > ID_PLACE_BYTES_MAX:
            self._instance, self._body = None, b""


def _id_of(answer: bytes) -> str:
    try:
        return _made_decoder.decode(answer).id
    except msgspec.DecodeError:
        return ""


def _id_in_event(event: bytes) -> str:
    """Of `response.created` and its like; a comment has none."""
    lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]
    try:
        return _event_decoder.decode(lines[0][5:]).response.id if lines else ""
    except msgspec.DecodeError:
        return ""
