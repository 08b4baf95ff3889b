"""Tokens from the fleet for one prompt, going on elsewhere when an engine is lost.

What an engine had given before it was lost is part of the prompt for the next one, so the client
sees one answer. With greedy sampling it is the answer that one engine would have given; with a seed
it is not, because the engine's random state is lost with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

import msgspec
import numpy as np
import structlog

from frontend.attempts import Attempts
from frontend.errors import ApiError, engine_lost, refused_by_engine
from frontend.fleet import Assigned, Fleet, Job, Place
from frontend.meter import Measured
from runtime.engines.upstream import EngineFault
from runtime.generation import (
    EngineRefused,
    Generate,
    Generated,
    GenerationRefused,
    Sampling,
    decode_generated,
    encode,
)
from runtime.requests import RequestClient
from runtime.requests.errors import DeadlineExceeded, Draining, Overloaded, RequestError

_log = structlog.get_logger("kvbm.frontend")


class TokenEngines(Protocol):
    def generate(
        self, place: Place, request: Generate, headers: Mapping[str, str]
    ) -> AsyncGenerator[Sequence[Generated]]:
        """Items, as many at a time as have come. Closing the iterator ends the work.

        Raises EngineFault, EngineRefused, or ApiError as the answer.
        """
        ...


class RequestPlaneEngines:
    """Engines that serve `endpoint` at their record's transport."""

    def __init__(self, client: RequestClient, endpoint: str, deadline_s: float) -> None:
        self._client = client
        self._endpoint = endpoint
        self._deadline_s = deadline_s

    async def generate(
        self, place: Place, request: Generate, headers: Mapping[str, str]
    ) -> AsyncGenerator[Sequence[Generated]]:
        stream = self._client.stream(
            place.transport,
            self._endpoint,
            encode(request),
            deadline_s=self._deadline_s,
            headers=headers,
        )
        try:
            async with stream:
                async for payloads in stream.batches():
                    items, refused = _decoded(payloads)
                    if items:
                        yield items
                    if refused is not None:
                        raise refused
        except DeadlineExceeded as error:
            said = f"The answer took over {self._deadline_s:g} s"
            raise ApiError(504, said, "deadline") from error
        except RequestError as error:
            raise EngineFault(
                place.transport,
                str(error),
                begun=not error.may_retry,
                is_busy=isinstance(error, Overloaded | Draining),
            ) from error
        except GenerationRefused as error:
            raise EngineFault(place.transport, str(error), begun=True) from error


class ByAddress:
    """Engines on the request plane, and those whose only address is that of their OpenAI server."""

    def __init__(self, on_plane: TokenEngines, servers: TokenEngines) -> None:
        self._on_plane = on_plane
        self._servers = servers

    def generate(
        self, place: Place, request: Generate, headers: Mapping[str, str]
    ) -> AsyncGenerator[Sequence[Generated]]:
        engines = self._servers if place.transport == place.url else self._on_plane
        return engines.generate(place, request, headers)


class Generation:
    """`migrations_max`: how often one request may go on elsewhere after it had begun."""

    def __init__(
        self,
        fleet: Fleet,
        engines: TokenEngines,
        *,
        migrations_max: int,
        migration_tokens_max: int | None = None,
    ) -> None:
        """`migration_tokens_max`: a longer sequence is not computed again."""
        self._fleet = fleet
        self._engines = engines
        self._migrations_max = migrations_max
        self._migration_tokens_max = migration_tokens_max

    async def run(
        self,
        job: Job,
        sampling: Sampling,
        headers: Mapping[str, str],
        measured: Measured,
        placed: Callable[[Assigned], None],
    ) -> AsyncGenerator[Sequence[Generated]]:
        """Until the item that says why it is the last, as many at a time as come together.

        `placed` hears of each engine that is asked. Raises ApiError.
        """
        given: list[int] = []
        attempts = Attempts(self._fleet, self._migrations_max, measured)
        while True:
            with await attempts.assign(_with_output(job, given)) as assigned:
                placed(assigned)
                goes_on = bool(given)
                request = _request(job, given, sampling, assigned.place)
                try:
                    if assigned.prefill is not None:
                        await self._prefill(assigned, assigned.prefill, request, headers)
                    work = self._engines.generate(assigned.place, request, headers)
                    async with aclosing(work) as batches:
                        async for items in batches:
                            before = len(given)
                            for item in items:
                                given += item.token_ids
                            assigned.output(len(given) - before)
                            yield [_without_cached(item) for item in items] if goes_on else items
                            if any(item.finish_reason is not None for item in items):
                                return
                    raise EngineFault(assigned.place.transport, "no reason for its end", begun=True)
                except EngineRefused as error:
                    told = error.refused
                    raise refused_by_engine(told.status, told.message, told.param) from error
                except EngineFault as fault:
                    attempts.failed(assigned, fault, begun=bool(given))
                    if self._is_too_long(len(job.tokens) + len(given)):
                        said = "The engine was lost, and the sequence is too long to compute again"
                        raise engine_lost(said) from fault
            if len(given) >= sampling.max_tokens:
                yield [Generated(token_ids=[], finish_reason="length")]  # that was all but said
                return

    async def _prefill(
        self, assigned: Assigned, place: Place, request: Generate, headers: Mapping[str, str]
    ) -> None:
        """Have the prompt computed elsewhere; its KV comes to the engine through the tiers.

        If that fails the engine computes it itself.
        """
        first = msgspec.structs.replace(
            request, sampling=Sampling(max_tokens=1, temperature=0.0), dp_rank=place.dp_rank
        )
        try:
            async with aclosing(self._engines.generate(place, first, headers)) as batches:
                async for _ in batches:
                    pass
        except (EngineFault, EngineRefused, ApiError) as fault:
            _log.warning("prefill_failed", instance=f"{place.instance:x}", why=str(fault))
        assigned.prefilled()

    def _is_too_long(self, tokens: int) -> bool:
        return self._migration_tokens_max is not None and tokens > self._migration_tokens_max


def _decoded(
    payloads: Sequence[bytes],
) -> tuple[list[Generated], GenerationRefused | EngineRefused | None]:
    """Items, up to where one is none."""
    items: list[Generated] = []
    try:
        for payload in payloads:
            item = decode_generated(payload)
            if item.refused is not None:
                return items, EngineRefused(item.refused)
            items.append(item)
    except GenerationRefused as error:
        return items, error
    return items, None


def _with_output(job: Job, given: list[int]) -> Job:
    """The request as it stands: what came of it is part of the prompt."""
    if not given:
        return job
    return replace(job, tokens=np.concatenate([job.tokens, np.array(given, np.uint32)]))


def _request(job: Job, given: list[int], sampling: Sampling, place: Place) -> Generate:
    left = _left_of(sampling, len(given)) if given else sampling
    return Generate(
        token_ids=[*job.tokens.tolist(), *given],
        sampling=left,
        model=job.model,
        dp_rank=place.dp_rank,
        priority=job.priority,
        cache_salt=job.cache_salt,
        hints=job.hints,
        session=job.session,
    )


def _left_of(sampling: Sampling, done: int) -> Sampling:
    """What is left of it after `done` tokens."""
    return msgspec.structs.replace(
        sampling,
        max_tokens=sampling.max_tokens - done,
        min_tokens=max(sampling.min_tokens - done, 0),
    )


def _without_cached(item: Generated) -> Generated:
    """Of an engine that goes on with another's work: what it had is not what the client asks."""
    return Generated(
        token_ids=item.token_ids, finish_reason=item.finish_reason, stop_token=item.stop_token
    )
