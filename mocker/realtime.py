"""The mock engine under the wall clock, for servers: tokens come out when their step has ended.

One event loop owns it; it runs on the loop's timers and has no task. `speedup` is how many seconds
of the engine's clock pass in one of the wall's. Steps follow one another on the engine's clock,
so late timers do not add up. A loop that is late by more than `LATE_S` does not catch up: the wall
time lost is left out, and `late_total` counts it. That is how a speedup beyond what this machine
can do ends: steps come as fast as they can.

The answer is a function of the prompt: a prompt and the beginning of its answer, given as a
prompt, are answered with the rest.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

import numpy as np

from mocker.content import TokenContent, mixed
from mocker.engine import Engine, EngineSettings
from mocker.events import Emit
from mocker.sequence import Request
from mocker.tiers import NodeTiers
from mocker.timing import PS_PER_S

LATE_S: Final = 0.25
SPEEDUP_MAX: Final = 1e6
TOKEN_DEADLINE_S: Final = 600.0
VOCABULARY: Final = 32_000
MULTIPLIER: Final = 0x9E3779B97F4A7C15  # odd, so that no power of it is 0


class RequestRefused(Exception):
    """The engine will not take the request; the message says why."""


class EngineClosed(Exception):
    """The engine was closed before the answer was complete."""


class RealtimeEngine:
    """Use as an async context manager, or call `close`."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        speedup: float = 1.0,
        index: int = 0,
        tiers: NodeTiers | None = None,
        emit: Emit | None = None,
        vocabulary: int = VOCABULARY,
        token_deadline_s: float = TOKEN_DEADLINE_S,
    ) -> None:
        if not 0 < speedup <= SPEEDUP_MAX:
            raise ValueError(
                f"a speedup of {speedup}: above 0 and at most {SPEEDUP_MAX:g} is possible"
            )
        # A row of steps would give only its last tokens.
        self.engine = Engine(replace(settings, bulk=False), index=index, tiers=tiers, emit=emit)
        self.late_total = 0
        self._loop = asyncio.get_running_loop()
        self._vocabulary = vocabulary
        self._token_deadline_s = token_deadline_s
        self._ps_per_s = speedup * PS_PER_S
        self._began_s = self._loop.time()
        self._now_ps = 0  # how far the engine has come
        self._timer: asyncio.Handle | None = None
        self._answers: dict[int, asyncio.Queue[int | None]] = {}
        self._next_id = 0
        self._closed = False

    async def generate(self, prompt: Sequence[int], tokens: int) -> AsyncGenerator[int, None]:
        """The answer's tokens. Closing the generator, or cancelling who waits, ends the request.

        Raises RequestRefused, EngineClosed, or TimeoutError where a token takes too long.
        """
        if self._closed:
            raise EngineClosed
        answer = answer_to(prompt, tokens, self._vocabulary)
        content = TokenContent([*prompt, *answer], self.engine.settings.block_size)
        request_id = self._next_id
        self._next_id += 1
        request = Request(request_id, len(prompt), tokens, content)
        moment_ps = self._moment_ps()
        refused = self.engine.submit(request, moment_ps)
        if refused:
            raise RequestRefused(refused.reason)
        if self.engine.end_ps is None:
            self._now_ps = moment_ps
        arrived: asyncio.Queue[int | None] = asyncio.Queue(tokens + 1)
        self._answers[request_id] = arrived
        self._look()
        try:
            for _ in range(tokens):
                async with asyncio.timeout(self._token_deadline_s):
                    number = await arrived.get()
                if number is None:
                    raise EngineClosed
                yield answer[number]
        finally:
            del self._answers[request_id]
            if self.engine.cancel(request_id, self._moment_ps()):
                self._look()

    def close(self) -> None:
        """End all answers with EngineClosed. Idempotent."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        for arrived in self._answers.values():
            arrived.put_nowait(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wall_ps(self) -> int:
        return int((self._loop.time() - self._began_s) * self._ps_per_s)

    def _moment_ps(self) -> int:
        """Now, on the engine's clock: not after the end of a step that runs."""
        now_ps = max(self._wall_ps(), self._now_ps)
        end_ps = self.engine.end_ps
        return now_ps if end_ps is None else min(now_ps, end_ps)

    def _look(self) -> None:
        """Something is new: begin a step soon, unless one runs, whose end will see to it."""
        if self.engine.end_ps is None and not self._closed:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_soon(self._begin)

    def _wake(self, wake_ps: int) -> None:
        self._now_ps = max(self._now_ps, wake_ps)
        self._begin()

    def _begin(self) -> None:
        end_ps = self.engine.start(self._now_ps)
        if end_ps is not None:
            self._timer = self._loop.call_at(self._at_s(end_ps), self._end)
        elif (wake_ps := self.engine.wake_ps) is not None:
            self._timer = self._loop.call_at(self._at_s(wake_ps), self._wake, wake_ps)
        else:
            self._timer = None

    def _end(self) -> None:
        end_ps = self.engine.end_ps
        assert end_ps is not None
        self._now_ps = end_ps
        for output in self.engine.finish():
            self._answers[output.request_id].put_nowait(output.number)
        late_s = self._loop.time() - self._at_s(end_ps)
        if late_s > LATE_S:
            self.late_total += 1
            self._began_s += late_s
        self._begin()

    def _at_s(self, at_ps: int) -> float:
        return self._began_s + at_ps / self._ps_per_s


def answer_to(prompt: Sequence[int], tokens: int, vocabulary: int = VOCABULARY) -> list[int]:
    """Each token is drawn by a polynomial hash of all tokens before it."""
    powers = np.cumprod(np.full(len(prompt) + tokens, MULTIPLIER, np.uint64))
    given = np.array(array("I", prompt), np.uint64)
    state = int(np.sum((given + np.uint64(1)) * powers[: len(prompt)], dtype=np.uint64))
    answer: list[int] = []
    for power in powers[len(prompt) :].tolist():
        token = mixed(np.array([state], np.uint64))[0] % vocabulary
        answer.append(token)
        state = (state + (token + 1) * power) % (1 << 64)
    return answer
