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
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol, Self

import numpy as np

from mocker.content import TokenContent, mixed_one
from mocker.engine import Engine, EngineSettings
from mocker.events import Emit
from mocker.sequence import Record, Request
from mocker.tiers import LowerTiers
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


class Listener(Protocol):
    """Who is told of one answer; called from the event loop, and must not wait or raise."""

    def token(self, token: int, record: Record | None) -> None:
        """The next token has come out; the last one brings what became of the request."""
        ...

    def closed(self) -> None:
        """The engine was closed: no more will come."""
        ...


class _Waiting:
    def __init__(self, tokens: int) -> None:
        self.arrived: asyncio.Queue[int | None] = asyncio.Queue(tokens + 1)

    def token(self, token: int, record: Record | None) -> None:
        self.arrived.put_nowait(token)

    def closed(self) -> None:
        self.arrived.put_nowait(None)


class RealtimeEngine:
    """Use as an async context manager, or call `close`."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        speedup: float = 1.0,
        index: int = 0,
        tiers: LowerTiers | None = None,
        emit: Emit | None = None,
        on_end: Callable[[Record], None] | None = None,
        vocabulary: int = VOCABULARY,
        token_deadline_s: float = TOKEN_DEADLINE_S,
    ) -> None:
        if not 0 < speedup <= SPEEDUP_MAX:
            raise ValueError(
                f"a speedup of {speedup}: above 0 and at most {SPEEDUP_MAX:g} is possible"
            )
        # A row of steps would give only its last tokens.
        self.engine = Engine(
            replace(settings, bulk=False), index=index, tiers=tiers, emit=emit, on_end=self._ended
        )
        self._on_end = on_end
        self.late_total = 0
        self._loop = asyncio.get_running_loop()
        self._vocabulary = vocabulary
        self._token_deadline_s = token_deadline_s
        self._ps_per_s = speedup * PS_PER_S
        self._began_s = self._loop.time()
        self._now_ps = 0  # how far the engine has come
        self._timer: asyncio.Handle | None = None
        self._answers: dict[int, tuple[list[int], Listener]] = {}
        self._records: dict[int, Record] = {}  # of answers whose last token is being told
        self._next_id = 0
        self._closed = False

    def ask(self, prompt: Sequence[int], tokens: int, listener: Listener) -> int:
        """Begin an answer; the request's id, to leave it by. Raises RequestRefused, EngineClosed.

        The listener is called from the engine's timer, once for each token: that is the cheap way.
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
        self._answers[request_id] = answer, listener
        self._look()
        return request_id

    def leave(self, request_id: int) -> None:
        """Nobody wants the rest of the answer. Idempotent."""
        if self._answers.pop(request_id, None) and self.engine.cancel(
            request_id, self._moment_ps()
        ):
            self._look()

    async def generate(self, prompt: Sequence[int], tokens: int) -> AsyncGenerator[int, None]:
        """The answer's tokens. Closing the generator, or cancelling who waits, ends the request.

        Raises RequestRefused, EngineClosed, or TimeoutError where a token takes too long.
        """
        waiting = _Waiting(tokens)
        request_id = self.ask(prompt, tokens, waiting)
        try:
            for _ in range(tokens):
                async with asyncio.timeout(self._token_deadline_s):
                    token = await waiting.arrived.get()
                if token is None:
                    raise EngineClosed
                yield token
        finally:
            self.leave(request_id)

    def close(self) -> None:
        """End all answers with EngineClosed. Idempotent."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        answers, self._answers = self._answers, {}
        for _, listener in answers.values():
            listener.closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _ended(self, record: Record) -> None:
        if record.outcome == "finished":
            self._records[record.request_id] = record
        if self._on_end:
            self._on_end(record)

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
            # A listener may leave, its own request or another's.
            found = self._answers.get(output.request_id)
            if found is None:
                continue
            answer, listener = found
            if output.last:
                del self._answers[output.request_id]
                listener.token(answer[output.number], self._records.pop(output.request_id))
            else:
                listener.token(answer[output.number], None)
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
        token = mixed_one(state) % vocabulary
        answer.append(token)
        state = (state + (token + 1) * power) % (1 << 64)
    return answer
