"""Decisions as numbered values in discovery, carried out by somebody else.

The planner puts `v1/planner/NAMESPACE/decision`; who carries it out puts its number under
`v1/planner/NAMESPACE/completed`. Until then, or until the time is up, no other is made. Numbers go
on from the last completed one, so that they never fall while that is there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import structlog

from planner.actuate.base import ActuateError, Applied
from planner.decide import Decision
from planner.fleet import Member
from runtime.discovery import Discovery, DiscoveryUnavailable, Put
from runtime.engine_card import Role
from runtime.names import encode_segment

REASONS_MAX: Final = 32

_log = structlog.get_logger("planner")


class Ask(msgspec.Struct, frozen=True):
    """One decision as the other side reads it. JSON."""

    number: int
    targets: dict[Role, int]
    reasons: list[str]


class Completion(msgspec.Struct, frozen=True):
    number: int


def decision_key(namespace: str) -> str:
    return f"v1/planner/{encode_segment(namespace)}/decision"


def completed_key(namespace: str) -> str:
    return f"v1/planner/{encode_segment(namespace)}/completed"


class Virtual:
    kind = "virtual"
    acts = True

    def __init__(
        self,
        discovery: Discovery,
        namespace: str,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._discovery = discovery
        self._namespace = namespace
        self._timeout_s = timeout_s
        self._clock = clock
        self._asked: Ask | None = None
        self._asked_s = 0.0
        self.timeouts_total = 0

    async def start(self) -> None: ...

    async def close(self) -> None:
        await self._discovery.delete(decision_key(self._namespace))

    async def desired(self) -> Mapping[Role, int]:
        return {}

    async def apply(self, decision: Decision, members: Sequence[Member]) -> Applied:
        del members
        completed = await self._completed()
        asked = self._asked
        if asked is not None and asked.number > completed:
            if asked.targets == dict(decision.targets):
                return Applied(accepted=True, text=f"decision {asked.number} is under way")
            left_s = self._timeout_s - (self._clock() - self._asked_s)
            if left_s > 0:
                text = f"decision {asked.number} is not completed; {left_s:.0f} s left"
                return Applied(accepted=False, text=text)
            self.timeouts_total += 1
            _log.warning("decision_not_completed", number=asked.number)
        elif not decision.changes:
            return Applied(accepted=True, text="nothing to do")
        number = max(completed, asked.number if asked is not None else 0) + 1
        reasons = [reason.text for reason in decision.reasons[:REASONS_MAX]]
        self._asked = Ask(number, dict(decision.targets), reasons)
        self._asked_s = self._clock()
        await self._discovery.put(decision_key(self._namespace), msgspec.json.encode(self._asked))
        return Applied(accepted=True, text=f"decision {number} was put into discovery")

    async def _completed(self) -> int:
        key = completed_key(self._namespace)
        try:
            found = await self._discovery.list(f"v1/planner/{encode_segment(self._namespace)}/")
        except DiscoveryUnavailable as error:
            raise ActuateError(str(error)) from error
        if key not in found:
            return 0
        try:
            return msgspec.json.decode(found[key], type=Completion).number
        except msgspec.DecodeError as error:
            raise ActuateError(f"{key} holds no completion: {error}") from error


class VirtualClient:
    """The other side: takes decisions and says when they are done."""

    def __init__(self, discovery: Discovery, namespace: str) -> None:
        self._discovery = discovery
        self._namespace = namespace
        self._done = 0

    async def next(self, timeout_s: float) -> Ask:
        """The latest decision that was not completed here. Raises TimeoutError."""
        key = decision_key(self._namespace)
        watch = self._discovery.watch(key.removesuffix("decision"))
        try:
            async with asyncio.timeout(timeout_s):
                async for event in watch:
                    if isinstance(event, Put) and event.key == key:
                        ask = msgspec.json.decode(event.value, type=Ask)
                        if ask.number > self._done:
                            return ask
        finally:
            watch.close()
        raise TimeoutError

    async def complete(self, number: int) -> None:
        self._done = max(self._done, number)
        value = msgspec.json.encode(Completion(number))
        await self._discovery.put(completed_key(self._namespace), value)
