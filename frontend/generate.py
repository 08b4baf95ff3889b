"""Tokens from the fleet for one prompt, going on elsewhere when an engine is lost.

What an engine had given before it was lost is part of the prompt for the next one, so the client
sees one answer. With greedy sampling it is the answer that one engine would have given; with a seed
it is not, because the engine's random state is lost with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Final, Protocol

import msgspec
import numpy as np
import structlog

from frontend.errors import ApiError, engine_lost
from frontend.fleet import Assigned, Fleet, Job
from frontend.meter import Measured
from frontend.upstream import EngineFault
from runtime.generation import (
    Generate,
    Generated,
    GenerationRefused,
    Sampling,
    decode_generated,
    encode,
)
from runtime.requests import RequestClient
from runtime.requests.errors import DeadlineExceeded, RequestError

ENGINES_TRIED_MAX: Final = 8

_log = structlog.get_logger("kvbm.frontend")


class TokenEngines(Protocol):
    def generate(
        self, assigned: Assigned, request: Generate, headers: Mapping[str, str]
    ) -> AsyncGenerator[Generated]:
        """Closing the iterator ends the work. Raises EngineFault, or ApiError as the answer."""
        ...


class RequestPlaneEngines:
    """Engines that serve `endpoint` at their record's transport."""

    def __init__(self, client: RequestClient, endpoint: str, deadline_s: float) -> None:
        self._client = client
        self._endpoint = endpoint
        self._deadline_s = deadline_s

    async def generate(
        self, assigned: Assigned, request: Generate, headers: Mapping[str, str]
    ) -> AsyncGenerator[Generated]:
        stream = self._client.stream(
            assigned.transport,
            self._endpoint,
            encode(request),
            deadline_s=self._deadline_s,
            headers=headers,
        )
        try:
            async with stream as items:
                async for item in items:
                    yield decode_generated(item)
        except DeadlineExceeded as error:
            said = f"The answer took over {self._deadline_s:g} s"
            raise ApiError(504, said, "deadline") from error
        except RequestError as error:
            begun = not error.may_retry
            raise EngineFault(assigned.transport, str(error), begun=begun) from error
        except GenerationRefused as error:
            raise EngineFault(assigned.transport, str(error), begun=True) from error


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
        self, job: Job, sampling: Sampling, headers: Mapping[str, str], measured: Measured
    ) -> AsyncGenerator[Generated]:
        """Until the item that says why it is the last. Raises ApiError."""
        given: list[int] = []
        failed: list[int] = []
        begun = 0
        while True:
            assigned = await self._assign(job, given, failed)
            measured.sent(assigned, migrated=bool(failed))
            with assigned:
                try:
                    request = _request(job, given, sampling, assigned)
                    goes_on = bool(given)
                    async with aclosing(
                        self._engines.generate(assigned, request, headers)
                    ) as items:
                        async for item in items:
                            if item.token_ids:
                                assigned.output(len(item.token_ids))
                                given += item.token_ids
                            yield _without_cached(item) if goes_on else item
                            if item.finish_reason is not None:
                                return
                    raise EngineFault(assigned.transport, "it ended without a reason", begun=True)
                except EngineFault as fault:
                    assigned.failed()
                    failed.append(assigned.instance)
                    begun += fault.begun or bool(given)
                    _log.warning("engine_failed", instance=f"{assigned.instance:x}", why=str(fault))
                    if begun > self._migrations_max or len(failed) >= ENGINES_TRIED_MAX:
                        raise engine_lost("The engine at work on the request was lost") from fault
                    if self._is_too_long(len(job.tokens) + len(given)):
                        said = "The engine was lost, and the sequence is too long to compute again"
                        raise engine_lost(said) from fault
            if len(given) >= sampling.max_tokens:
                yield Generated(token_ids=[], finish_reason="length")  # that was all but said
                return

    async def _assign(self, job: Job, given: list[int], failed: list[int]) -> Assigned:
        if given:
            tokens = np.concatenate([job.tokens, np.array(given, np.uint32)])
            job = replace(job, tokens=tokens)
        try:
            return await self._fleet.assign(job.without(failed))
        except ApiError as error:
            if failed and error.status == 503:
                raise engine_lost(f"The engine was lost, and {error.message}") from error
            raise

    def _is_too_long(self, tokens: int) -> bool:
        return self._migration_tokens_max is not None and tokens > self._migration_tokens_max


def _request(job: Job, given: list[int], sampling: Sampling, assigned: Assigned) -> Generate:
    left = _left_of(sampling, len(given)) if given else sampling
    return Generate(
        token_ids=[*job.tokens.tolist(), *given],
        sampling=left,
        model=job.model,
        dp_rank=assigned.dp_rank,
        priority=job.priority,
        cache_salt=job.cache_salt,
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
