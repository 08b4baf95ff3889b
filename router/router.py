"""The router of one model: where a prompt goes, and what is to be told of it until it ends.

`decide` is the whole decision and changes nothing; `route` also lets a request wait for room, and
counts it where it was sent. Whoever called `route` tells of the first token, of each block of
output and of the end, whatever end it is: `Routed` is a context manager for that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, Self

from msgspec.structs import replace

from router.approximate import RouteMemory
from router.cost import Request
from router.covering import Covering
from router.forecast import Forecast
from router.index import Hashes, Index, WorkerId
from router.load import Active
from router.queue import Urgency, WaitingLine
from router.selector import AllBusy, Chosen, Decision, NoWorker, Selector, Wishes
from router.workers import Worker, Workers, parse_worker

PASSED_OVER_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt by its whole blocks: hashes of each block's tokens, and of each chain up to it."""

    tokens: int
    tokens_hashes: Hashes
    sequence_hashes: Hashes


@dataclass(frozen=True, slots=True)
class Query:
    request: str  # unique among this router's
    prompt: Prompt
    wishes: Wishes = field(default_factory=Wishes)
    urgency: Urgency = field(default_factory=Urgency)
    expected_output_tokens: int = 0
    decode_only: bool = False  # its prompt is computed elsewhere, and its KV comes from there


class Load(Protocol):
    """`ActiveSequences`, or `ReplicatedLoad`."""

    def begin(self, request: str, sequence: Active) -> bool: ...
    def prefilled(self, request: str, *, timed: bool = True) -> bool: ...
    def grow(self, request: str, blocks: int = 1) -> bool: ...
    def end(self, request: str) -> bool: ...
    def worker_added(self, worker: WorkerId) -> None: ...
    def worker_removed(self, row: int) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Rejected:
    """The request was sent nowhere."""

    kind: Literal[
        "no-worker", "no-prefill-worker", "busy", "queue-full", "deadline", "duplicate", "full"
    ]
    why: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the line; `turn` is set when a worker it may go to has room."""

    turn: asyncio.Future[None]
    wishes: Wishes


@dataclass(frozen=True, slots=True)
class Ahead:
    """What there was to do before the first token, when the request was sent."""

    new_tokens: float  # its own that no tier has
    waiting_tokens: float  # others' on that worker
    load_s: float  # expected for what lower tiers have
    waited_s: float  # in the line, before it was sent


class Routed:
    """A request on its worker. Leaving the context ends it."""

    def __init__(self, router: Router, query: Query, chosen: Chosen, ahead: Ahead) -> None:
        self.worker = chosen.worker
        self.chosen = chosen
        self.ahead = ahead
        self._router = router
        self._request = query.request
        self._room = -query.prompt.tokens % chosen.request.block_tokens

    def first_token(self, *, timed: bool = True) -> None:
        """Not `timed`: it came some time before."""
        self._router.prefilled(self._request, timed=timed)

    def output(self, tokens: int) -> None:
        """So many more have come; fewer than 0 make room for those that follow."""
        block_tokens = self.chosen.request.block_tokens
        if tokens > self._room:
            blocks = -(-(tokens - self._room) // block_tokens)
            self._room += blocks * block_tokens
            self._router.grow(self._request, blocks)
        self._room -= tokens

    def end(self) -> None:
        """Idempotent."""
        self._router.end(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


Step = Literal["find", "select"]


class Router:
    """All methods are called from one event loop.

    `hold_above`: a request waits while every worker it may go to has more prompt tokens to compute
    than this share of what it takes into one step. None: requests never wait. `tracks_blocks`: no
    for workers that only compute prompts, and keep none. `timed` is told what each step of a
    decision took, in seconds.
    """

    def __init__(
        self,
        workers: Workers,
        index: Index,
        load: Load,
        selector: Selector,
        *,
        block_tokens: int,
        memory: RouteMemory | None = None,
        line: WaitingLine[Waiting] | None = None,
        hold_above: float | None = None,
        tracks_blocks: bool = True,
        timed: Callable[[Step, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._index = index
        self._covering = Covering(workers)
        self._remembered = Covering(workers)
        self._load = load
        self._selector = selector
        self._block_tokens = block_tokens
        self._memory = memory
        self._line: WaitingLine[Waiting] = WaitingLine() if line is None else line
        self._waiting_tokens = 0
        self._hold_above = hold_above
        self._tracks_blocks = tracks_blocks
        self._timed = timed
        self._clock = clock

    # -- workers -------------------------------------------------------------------------

    def add_worker(self, worker: Worker) -> None:
        """Raises WorkerError if it is there."""
        self._workers.add(worker)
        self._load.worker_added(worker.id)
        self._advance()

    def change_worker(self, worker: Worker) -> None:
        """Its speed, capacity, taints, or whether it takes requests. Raises WorkerError."""
        self._workers.change(worker)
        self._advance()

    def remove_worker(self, worker: WorkerId) -> Sequence[str]:
        """The requests that were on it. Raises WorkerError."""
        row = self._workers.remove(worker)
        self._index.remove_worker(worker)
        if self._memory is not None:
            self._memory.forget_worker(worker)
        ended = self._load.worker_removed(row)
        self._advance()
        return ended

    # -- requests ------------------------------------------------------------------------

    def decide(self, query: Query) -> Decision:
        """Where the request would go now."""
        start = time.perf_counter()
        request = self._request(query)
        found = time.perf_counter()
        decision = self._selector.select(request, query.wishes)
        if self._timed is not None:
            self._timed("find", found - start)
            self._timed("select", time.perf_counter() - found)
        return decision

    def preview(self, query: Query) -> Decision:
        """What `decide` will say next; it leaves no trace."""
        return self._selector.preview(self._request(query), query.wishes)

    def explain(self, query: Query) -> dict[str, Any]:
        """The decision that comes next, in words that JSON has; nothing is sent."""
        told: dict[str, Any]
        match self.preview(query):
            case Chosen() as chosen:
                told = chosen.explain()
            case AllBusy(workers):
                told = {"worker": None, "reason": f"all of {workers} workers are over their limits"}
            case NoWorker(why):
                told = {"worker": None, "reason": why}
        for one in told.setdefault("candidates", []):
            worker = parse_worker(one["worker"])
            one["load"] = self.load_of(worker)
            one["healthy"] = self._workers.at(self._workers.row(worker)).healthy
        told["excluded"] = [
            {"worker": str(worker), "why": why, "load": self.load_of(worker)}
            for worker, why in sorted(self._selector.why_not(query.wishes).items())
        ]
        told["waits"] = self._must_wait(query.wishes)
        return told

    def forecast(self, query: Query) -> Forecast:
        """What the request may expect of the worker it would go to now; nothing is sent."""
        workers, rows = self._workers, slice(self._workers.rows)
        there, present = workers.mask(None), workers.present[rows]
        of_all = Forecast(
            tokens=query.prompt.tokens,
            serving=int(there.sum()),
            busy=int((there & self._selector.limits.busy(workers)).sum()),
            waiting=len(self._line),
            requests=int(workers.requests[rows][present].sum()),
            prefill_tokens=int(workers.prefill_tokens[rows][present].sum()),
        )
        chosen = self.preview(query)
        if isinstance(chosen, NoWorker):
            return replace(of_all, why=chosen.why)
        if isinstance(chosen, AllBusy):
            return replace(of_all, why=f"all of {chosen.workers} workers are over their limits")
        row, request = chosen.row, chosen.request
        costs = self._selector.seconds(request, workers, there)
        line_s = 0.0
        if self._must_wait(query.wishes):
            line_s = self._waiting_tokens * float(workers.prefill_a[row]) / max(of_all.serving, 1)
        return replace(
            of_all,
            worker=str(chosen.worker),
            cached_tokens=int(request.covered[-1, row]) * self._block_tokens,
            line_s=line_s,
            step_s=self._selector.seconds.step_s(request, workers, row),
            **{f"{name}_s": float(term[row]) for name, term in costs.terms.items()},
        )

    def load_of(self, worker: WorkerId) -> dict[str, float]:
        """What a worker is busy with, as far as routers know. Raises WorkerError."""
        row, workers = self._workers.row(worker), self._workers
        return {
            "requests": float(workers.requests[row]),
            "blocks": float(workers.blocks[row]),
            "prefill_tokens": float(workers.prefill_tokens[row]),
            "prefill_s": float(workers.prefill_s[row]),
        }

    async def route(self, query: Query, *, deadline_s: float) -> Routed | Rejected:
        """Choose a worker, after waiting for room if need be, and count the request there."""
        # Those that wait and have room got their turn when it came free: nobody is overtaken.
        waited_s = 0.0
        if self._must_wait(query.wishes):
            began = self._clock()
            rejected = await self._wait(query, deadline_s)
            if rejected is not None:
                return rejected
            waited_s = self._clock() - began
        try:
            return self.send(query, waited_s)
        finally:
            self._advance()  # whoever waits next may have room as well

    def send(self, query: Query, waited_s: float = 0.0) -> Routed | Rejected:
        """Choose a worker now, whether it has room or not, and count the request there."""
        match self.decide(query):
            case NoWorker(why):
                return Rejected("no-worker", why)
            case AllBusy(workers):
                return Rejected("busy", f"all of {workers} workers are over their limits")
            case Chosen() as chosen:
                active = self.active_of(query, chosen)
                waiting_tokens = float(self._workers.prefill_tokens[chosen.row])
                if not self._load.begin(query.request, active):
                    return Rejected("duplicate", f"request {query.request!r} is running already")
                load = 0.0 if chosen.costs is None else chosen.costs.load_s(chosen.row)
                ahead = Ahead(active.prefill_tokens, waiting_tokens, load, waited_s)
                if self._memory is not None:
                    prompt = query.prompt
                    self._memory.sent(chosen.worker, prompt.sequence_hashes, prompt.tokens_hashes)
                return Routed(self, query, chosen, ahead)

    def prefilled(self, request: str, *, timed: bool = True) -> None:
        self._load.prefilled(request, timed=timed)
        self._advance()

    def grow(self, request: str, blocks: int) -> None:
        self._load.grow(request, blocks)

    def end(self, request: str) -> None:
        self._load.end(request)
        self._advance()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def waiting_max(self) -> int:
        return self._line.limit

    # -- inside --------------------------------------------------------------------------

    def _request(self, query: Query) -> Request:
        prompt = query.prompt
        covered = self._covering.none()
        if not query.decode_only:
            self._covering.add(self._index.find(prompt.tokens_hashes), covered)
            if self._memory is not None:
                self._remembered.add(self._memory.find(prompt.tokens_hashes), covered)
        return Request(
            prompt.tokens,
            self._block_tokens,
            covered,
            query.expected_output_tokens,
            query.decode_only,
        )

    def active_of(self, query: Query, chosen: Chosen) -> Active:
        """What the worker has to do for the request that no tier has done."""
        prompt, found = query.prompt, int(chosen.request.covered[-1, chosen.row])
        new_tokens = max(prompt.tokens - found * self._block_tokens, 1)
        if query.decode_only:
            new_tokens, prefill_s = 0, 0.0
        elif chosen.costs is not None and "compute" in chosen.costs.terms:
            terms = chosen.costs.terms
            prefill_s = float(terms["compute"][chosen.row] + terms["load"][chosen.row])
        else:
            prefill_s = new_tokens * self._workers.at(chosen.row).speed.prefill_s_per_token
        if not self._tracks_blocks:
            return Active(chosen.row, [], 0, float(new_tokens), prefill_s)
        hashes = prompt.sequence_hashes.tolist()
        return Active(
            chosen.row, hashes, chosen.request.blocks - len(hashes), float(new_tokens), prefill_s
        )

    async def _wait(self, query: Query, deadline_s: float) -> Rejected | None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = Waiting(turn, query.wishes)
        tokens = query.prompt.tokens
        number = self._line.put(waiting, query.urgency, tokens=tokens, now=self._clock())
        if number is None:
            return Rejected("queue-full", f"{self._line.limit} requests wait already")
        self._waiting_tokens += tokens
        self._advance()
        try:
            async with asyncio.timeout(deadline_s):
                await turn
        except TimeoutError:
            return Rejected("deadline", f"no worker had room within {deadline_s:g} s")
        except asyncio.CancelledError:
            self._advance()  # it may have been its turn already
            raise
        finally:
            self._waiting_tokens -= tokens
            self._line.take(number)
        return None

    def _must_wait(self, wishes: Wishes) -> bool:
        if self._hold_above is None:
            return False
        able = self._selector.able(wishes)
        if isinstance(able, NoWorker):
            return False  # which it is told at once
        rows = slice(self._workers.rows)
        room = self._hold_above * self._workers.batch_tokens_max[rows]
        full = self._workers.prefill_tokens[rows] > room
        return bool(full[able].all())

    def _advance(self) -> None:
        """The turn of the first that has room; `route` then looks for the next.

        Of those whose own workers are full only a few are passed over, so that a long line costs
        little; while no worker has room none is looked at.
        """
        if not len(self._line) or self._must_wait(Wishes()):
            return
        for number, waiting in self._line.foremost(PASSED_OVER_MAX):
            if not self._must_wait(waiting.wishes):
                self._line.take(number)
                if not waiting.turn.done():
                    waiting.turn.set_result(None)
                return
