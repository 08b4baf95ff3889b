"""Pass-through: a request goes as it came to the engine that was chosen, its answer comes back.

The engine's own OpenAI server makes the answer; not a byte of it is changed. Until the first byte
has gone to the client, an engine that fails can be replaced: one that was never reached as often as
there are others, one that may have begun only `migrations_max` times, because a request that kills
engines must not kill all of them. A stream that breaks later ends with an error event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from frontend import headers as names
from frontend.errors import ApiError, bad_request, engine_lost
from frontend.fleet import Assigned, Fleet, Job
from frontend.gate import Scope
from frontend.meter import Measured
from frontend.respond import Reply
from frontend.upstream import Answer, EngineFault, Upstream

ENGINES_TRIED_MAX: Final = 8
_WORKER: Final = b"x-kvbm-worker"
_CACHED: Final = b"x-kvbm-cached-tokens"
_EVENT_END: Final = b"\n\n"

_log = structlog.get_logger("kvbm.frontend")


@dataclass(frozen=True, slots=True)
class Read:
    """What a route made of a request's body."""

    model: str
    job: Callable[[str], Job]  # of the request's id; may take long, and raise ApiError


class Relay:
    """A handler of one route. `read` raises ApiError."""

    def __init__(
        self,
        read: Callable[[bytes, Scope], Read],
        fleet: Fleet,
        upstream: Upstream,
        *,
        migrations_max: int,
    ) -> None:
        self._read = read
        self._fleet = fleet
        self._upstream = upstream
        self._migrations_max = migrations_max

    async def __call__(self, body: bytes, scope: Scope, reply: Reply, measured: Measured) -> None:
        read = self._read(body, scope)
        measured.model = read.model
        job = read.job(reply.request_id)
        measured.prepared(len(job.tokens))
        await self._serve(scope, body, job, reply, measured)

    async def _serve(
        self, scope: Scope, body: bytes, job: Job, reply: Reply, measured: Measured
    ) -> None:
        given = [
            *names.onward(scope["headers"]),
            ("x-request-id", reply.request_id),
            ("traceparent", names.traceparent(scope["headers"])),
        ]
        failed: list[int] = []
        begun = 0
        while True:
            try:
                assigned = await self._fleet.assign(job.without(failed))
            except ApiError as error:
                if failed and error.status == 503:
                    raise engine_lost(f"The engine was lost, and {error.message}") from error
                raise
            measured.sent(assigned, migrated=bool(failed))
            with assigned:
                try:
                    return await self._ask(assigned, scope, given, body, reply, measured)
                except EngineFault as fault:
                    assigned.failed()
                    failed.append(assigned.instance)
                    begun += fault.begun
                    _log.warning("engine_failed", instance=f"{assigned.instance:x}", why=str(fault))
                    if reply.status is not None:
                        raise engine_lost("The engine broke off before its answer's end") from fault
                    if begun > self._migrations_max or len(failed) >= ENGINES_TRIED_MAX:
                        raise engine_lost("The engine at work on the request was lost") from fault

    async def _ask(
        self,
        assigned: Assigned,
        scope: Scope,
        given: list[tuple[str, str]],
        body: bytes,
        reply: Reply,
        measured: Measured,
    ) -> None:
        if assigned.dp_size > 1:
            given = [*given, ("x-data-parallel-rank", str(assigned.dp_rank))]
        query = scope.get("query_string") or b""
        url = assigned.url + scope["path"] + ("?" + query.decode("latin-1") if query else "")
        async with self._upstream.send(scope["method"], url, given, body) as answer:
            if answer.is_stream:
                await self._stream(assigned, answer, reply, measured)
                return
            data = await answer.read()
            assigned.first_token()
            measured.first_token()
            measured.status = answer.status
            self._say_where(assigned, reply)
            await reply.whole(answer.status, _back(answer), data)

    async def _stream(
        self, assigned: Assigned, answer: Answer, reply: Reply, measured: Measured
    ) -> None:
        first = True
        async for chunk in answer.chunks():
            if first:
                first = False
                assigned.first_token()
                measured.first_token()
                measured.status = answer.status
                self._say_where(assigned, reply)
                await reply.begin(answer.status, _back(answer))
            events = chunk.count(_EVENT_END)
            assigned.output(events)
            measured.output(events)
            await reply.part(chunk)
        if first:
            raise EngineFault(assigned.url, "its stream was empty", begun=True)
        await reply.end()

    def _say_where(self, assigned: Assigned, reply: Reply) -> None:
        worker = f"{assigned.instance:x}.{assigned.dp_rank}"
        reply.extra.append((_WORKER, worker.encode()))
        reply.extra.append((_CACHED, str(assigned.cached_tokens).encode()))


def _back(answer: Answer) -> list[tuple[bytes, bytes]]:
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
