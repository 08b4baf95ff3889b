"""Pass-through: a request goes as it came to the engine that was chosen, its answer comes back.

The engine's own OpenAI server makes the answer; not a byte of it is changed. Until the first byte
has gone to the client, an engine that fails is replaced (`frontend.attempts`). A stream that breaks
later ends with an error event.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec
import structlog

from frontend import headers as names
from frontend.answers import DONE
from frontend.attempts import Attempts
from frontend.errors import UNSUPPORTED, ApiError, bad_request, engine_lost, refused_by_engine
from frontend.fleet import Assigned, Fleet, Job, Place
from frontend.gate import Scope
from frontend.keep_alive import EVENT_STREAM, NEVER, Head, KeepAlive
from frontend.meter import Measured
from frontend.respond import Reply
from frontend.tally import PerEvent, Tally, told_by
from runtime.engines.upstream import Answer, EngineFault, Given, Upstream, target_of, to_rank

RESPONSES: Final = "/v1/responses"
GENERATE: Final = "/inference/v1/generate"
WORKER: Final = b"x-kvbm-worker"
_CACHED: Final = b"x-kvbm-cached-tokens"
_SAID_BYTES_MAX: Final = 1000

_log = structlog.get_logger("kvbm.frontend")


@dataclass(frozen=True, slots=True)
class Read:
    """What a route made of a request's body."""

    model: str
    job: Callable[[str], Job]  # of the request's id; may take long, and raise ApiError
    stream: bool = False  # whether it asks for one


class Relay:
    """A handler of one route. `read` raises ApiError."""

    def __init__(
        self,
        read: Callable[[bytes, Scope], Read],
        fleet: Fleet,
        upstream: Upstream,
        *,
        migrations_max: int,
        keep_alive: KeepAlive = NEVER,
    ) -> None:
        self._read = read
        self._fleet = fleet
        self._upstream = upstream
        self._migrations_max = migrations_max
        self._keep_alive = keep_alive
        self._per_event: defaultdict[str, PerEvent] = defaultdict(PerEvent)  # of models

    async def __call__(self, body: bytes, scope: Scope, reply: Reply, measured: Measured) -> None:
        read = self._read(body, scope)
        measured.model = read.model
        job = read.job(reply.request_id)
        measured.prepared(len(job.tokens))
        keep_alive = self._keep_alive if read.stream else NEVER
        await self._serve(scope, body, job, reply, measured, keep_alive)

    async def _serve(
        self,
        scope: Scope,
        body: bytes,
        job: Job,
        reply: Reply,
        measured: Measured,
        keep_alive: KeepAlive,
    ) -> None:
        given = [
            *names.onward(scope["headers"]),
            (names.REQUEST_ID, reply.request_id.encode()),
            (names.TRACEPARENT, names.traceparent(scope["headers"])),
        ]
        attempts = Attempts(self._fleet, self._migrations_max, measured)
        while True:
            with (
                await attempts.assign(job) as assigned,
                keep_alive.watching(reply, partial(_opening, assigned, reply)),
            ):
                try:
                    if assigned.prefill is not None:
                        await self._prefill(assigned, assigned.prefill, scope["path"], given, body)
                    return await self._ask(assigned, scope, given, body, reply, measured)
                except EngineFault as fault:
                    if reply.latest is not None:
                        assigned.failed()
                        raise engine_lost("The engine broke off before its answer's end") from fault
                    attempts.failed(assigned, fault)

    async def _prefill(
        self, assigned: Assigned, place: Place, path: str, given: Given, body: bytes
    ) -> None:
        """Have the prompt computed elsewhere; its KV comes to the engine through the tiers.

        If that fails the engine computes it itself.
        """
        asked = msgspec.json.decode(body)
        if asked.get("previous_response_id"):
            assigned.prefilled()  # only the engine that has that one knows the prompt
            return
        data = msgspec.json.encode(_first_token_of(path, asked))
        try:
            target, to = target_of(path), to_rank(place, given)
            with await self._upstream.send(b"POST", place.url, target, to, data) as answer:
                await answer.read()
        except EngineFault as fault:
            _log.warning("prefill_failed", instance=f"{place.instance:x}", why=str(fault))
        assigned.prefilled()

    async def _ask(
        self,
        assigned: Assigned,
        scope: Scope,
        given: Given,
        body: bytes,
        reply: Reply,
        measured: Measured,
    ) -> None:
        place = assigned.place
        if not place.url:
            said = f"{scope['path']} is not for this model: its engines take tokens only"
            raise bad_request(said, "model", UNSUPPORTED)
        target = target_of(scope["path"], scope.get("query_string") or b"")
        method, to = scope["method"].encode(), to_rank(place, given)
        with await self._upstream.send(method, place.url, target, to, body) as answer:
            if answer.is_stream:
                await self._stream(assigned, answer, reply, measured)
                return
            data = await answer.read()
            measured.status = answer.status
            # When its first token came is not known: as its end it would teach a false speed.
            if answer.status < 300 and (tokens := told_by(data)):
                assigned.answered(tokens)
                measured.output(tokens)
            say_where(assigned, reply)
            if reply.status is not None:  # a comment has begun it: its status is told already
                raise _late(answer.status, data)
            await reply.whole(answer.status, back(answer), data)

    async def _stream(
        self, assigned: Assigned, answer: Answer, reply: Reply, measured: Measured
    ) -> None:
        tally = Tally(self._per_event[measured.model])
        first = True
        while chunk := await answer.part():
            if first:
                first = False
                assigned.first_token()
                measured.first_token()
                measured.output(1)
                measured.is_estimate = True
                measured.status = answer.status
                say_where(assigned, reply)
                if reply.status is None:
                    await reply.begin(answer.status, back(answer))
            if more := tally.take(chunk):
                assigned.output(more)
                measured.output(more)
            if chunk.endswith(DONE):  # clients may leave as soon as they have it
                _end(tally, assigned, measured)
            await reply.part(chunk)
        if first:
            raise EngineFault(assigned.place.url, "its stream was empty", begun=True)
        if not measured.is_whole:
            _end(tally, assigned, measured)
        await reply.end()


def _end(tally: Tally, assigned: Assigned, measured: Measured) -> None:
    if more := tally.end():
        assigned.output(more)
        measured.output(more)
    assigned.end()
    measured.is_estimate = not tally.is_told
    measured.is_whole = True


def _first_token_of(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The same request, for one token and no more, of which nothing is kept."""
    only: dict[str, Any] = {"stream": False, "max_tokens": 1, "n": 1}
    if "max_completion_tokens" in asked:
        only["max_completion_tokens"] = 1
    if path == RESPONSES:
        only = {"stream": False, "store": False, "background": False, "max_output_tokens": 1}
    elif path == GENERATE:
        sampling = {**(asked.get("sampling_params") or {}), "max_tokens": 1, "n": 1}
        only = {"stream": False, "sampling_params": sampling}
    kept = {name: value for name, value in asked.items() if name != "stream_options"}
    return {**kept, **only}


def _opening(assigned: Assigned, reply: Reply) -> Head:
    say_where(assigned, reply)
    return EVENT_STREAM


def say_where(assigned: Assigned, reply: Reply) -> None:
    """Who answers; in place of whom was said before, if another one did not get to it."""
    worker = f"{assigned.place.instance:x}.{assigned.place.dp_rank}"
    reply.extra[1:] = [
        (WORKER, worker.encode()),
        (_CACHED, str(assigned.cached_tokens).encode()),
    ]


def _late(status: int, body: bytes) -> ApiError:
    """What an engine said instead of a stream, for the end of one."""
    if status < 400:
        return engine_lost("The engine gave no stream")
    try:
        said = str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        said = body[:_SAID_BYTES_MAX].decode(errors="replace")
    return refused_by_engine(status, said)


def back(answer: Answer) -> list[tuple[bytes, bytes]]:
    """An engine's headers, as far as they are the client's."""
    return [(name, value) for name, value in answer.headers if name not in _NOT_BACK]


_NOT_BACK: Final = frozenset(
    {
        *(b"connection", b"keep-alive", b"transfer-encoding", b"content-length"),
        *(b"date", b"server", names.REQUEST_ID),
    }
)


def read_session(scope: Scope) -> str | None:
    """The session that the client says its request is part of."""
    given = names.first(scope["headers"], names.SESSION)
    return given.decode("latin-1") if given else None


def read_pinned(scope: Scope) -> int | None:
    """The instance that the client wants and no other. Raises ApiError."""
    given = names.first(scope["headers"], names.INSTANCE)
    if given is None:
        return None
    try:
        return int(given, 16)
    except ValueError as error:
        said = f"{given.decode('latin-1')!r} is no instance: a hexadecimal number"
        raise bad_request(said, names.INSTANCE.decode(), "invalid_value") from error
