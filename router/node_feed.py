"""One node's stream, followed into the index: gap, question, replay or snapshot, and what fails.

    syncing   what is missing is asked for; what was known before is still counted on
    live      everything that the node has said is in the index
    stale     it has failed to answer `tries` times; asked again, and forgotten after `stale_for`
    gone      it has left discovery; forgotten after `gone_for` unless it comes back

Events come in at any time and are applied in the same turn of the event loop; the node's own task
asks. A snapshot is gathered beside what is held and takes its place in one step, so that a request
sees the node as it was or as it is, never in between; its events wait meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog

from router.feed_settings import FeedSettings
from router.holdings import Holdings
from router.index_writer import IndexWriter
from router.place import Place
from runtime.events.envelope import Envelope, WireError, decode_envelope
from runtime.events.node_stream import (
    Begins,
    CatchUp,
    Worker,
    decode_begins,
    decode_rows,
    encode_catch_up,
)
from runtime.events.router_wire import decode_msgpack
from runtime.requests import RequestClient, RequestError, ResponseStream

TURN_BLOCKS: Final = 8192
TURN_EVENTS: Final = 256
"""Applied in one turn of the event loop: a millisecond's worth or two."""

_log = structlog.get_logger()


class NodeState(StrEnum):
    SYNCING = "syncing"
    LIVE = "live"
    STALE = "stale"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class NodeStatus:
    node: str
    state: NodeState
    publisher: int
    next: int | None  # the first sequence that is not applied; None before the first snapshot
    behind: int  # events known to be missing
    heard_s_ago: float | None
    delay_s: float | None  # from publishing to here, of the last event; by both hosts' clocks
    error: str | None  # why the last question failed
    workers: int
    owners: int
    blocks: int  # counted once for each owner and for each worker's own memory
    gaps_total: int
    duplicates_total: int
    questions_total: int
    failures_total: int
    replayed_total: int  # events
    snapshots_total: int
    malformed_total: int
    dropped_total: int  # waited for those before them, and there was no room; asked for again
    refused_total: int  # of one more worker or owner than a node may have


class NodeFeed:
    """All methods are called from one event loop."""

    def __init__(
        self,
        node: str,
        writer: IndexWriter,
        client: RequestClient,
        endpoint: str,
        settings: FeedSettings,
        turns: asyncio.Semaphore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`turns` bounds how many nodes are asked at a time."""
        self.node = node
        self.place = Place(settings.ahead_bytes)
        self.holdings = Holdings(writer)
        self.address: str | None = None
        self._writer = writer
        self._client = client
        self._endpoint = endpoint
        self._settings = settings
        self._turns = turns
        self._clock = clock
        self._wake = asyncio.Event()
        self._readers: Mapping[Worker, int] = {}
        self._wants_all = True
        self._wants_probe = False
        self._failures = 0
        self._error: str | None = None
        self._asked_at = float("-inf")
        self._heard_at: float | None = None
        self._gap_at: float | None = None
        self._gone_at: float | None = None
        self._stale_at: float | None = None
        self._delay_s: float | None = None
        self._questions_total = 0
        self._failures_total = 0
        self._replayed_total = 0
        self._snapshots_total = 0
        self._malformed_total = 0

    # -- told by discovery ---------------------------------------------------------------

    def found(self, publisher: int, address: str, readers: Mapping[Worker, int]) -> None:
        """The node is there, or says something new of itself."""
        self._gone_at = None
        if address != self.address:
            self.address, self._failures, self._stale_at = address, 0, None
        if publisher != self.place.publisher:
            _log.info("node_found", node=self.node, publisher=f"{publisher:x}", address=address)
            self.place.meet(publisher)
            self._wants_all = True
        self._readers = readers
        self._wake.set()

    def lost(self) -> None:
        """It is in discovery no more."""
        if self._gone_at is None:
            _log.info("node_gone", node=self.node)
            self._gone_at, self.address = self._clock(), None
            self._wake.set()

    def probe(self) -> None:
        """Something may have been lost on its way here: ask soon."""
        self._wants_probe = True
        self._wake.set()

    def refresh(self) -> None:
        """The index may lack something that was applied: ask for everything."""
        self._wants_all = True
        self._wake.set()

    # -- its events ----------------------------------------------------------------------

    def hear(self, envelope: Envelope) -> int:
        """One event of its publisher; how many blocks are to be applied, also of those that waited.

        The caller flushes the writer in the same turn of the event loop.
        """
        self._heard_at = self._clock()
        self._delay_s = max(0.0, time.time() - envelope.published_at / 1000)
        gathered = self._gather(self.place.hear(envelope.sequence, envelope.payload))
        if self.place.has_gap:
            if self._gap_at is None:
                self._gap_at = self._heard_at
                self._wake.set()
        else:
            self._gap_at = None
        return gathered

    def _apply(self, payloads: Iterable[bytes]) -> None:
        self._gather(payloads)
        self._writer.flush()

    def _gather(self, payloads: Iterable[bytes]) -> int:
        blocks = 0
        for payload in payloads:
            try:
                blocks += self.holdings.gather(decode_msgpack(payload))
            except WireError as error:
                if not self._malformed_total:
                    _log.warning("node_event_malformed", node=self.node, reason=str(error))
                self._malformed_total += 1
        return blocks

    # -- its task ------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the node is forgotten after it has left, or this is cancelled."""
        while True:
            self._wake.clear()
            if self.holdings.readers != self._readers:
                self.place.hold()
                await self.holdings.follow(self._readers)
                self._apply(self.place.release())
            now = self._clock()
            if self._gone_at is not None and now >= self._gone_at + self._settings.gone_for:
                await self.forget()
                if self._gone_at is not None:
                    return
                continue
            if self._stale_at is not None and now >= self._stale_at + self._settings.stale_for:
                if self.holdings.blocks:
                    _log.warning("node_forgotten", node=self.node, error=self._error)
                await self.forget()
                self._stale_at = float("inf")  # forgotten already
            due = self._due()
            if due > now:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(due - now):
                        await self._wake.wait()
                continue
            async with self._turns:
                await self._ask()

    async def forget(self) -> None:
        """Nothing of it is counted on any more."""
        self.place.meet(self.place.publisher)
        self._wants_all = True
        await self.holdings.forget()

    def _due(self) -> float:
        """When there is something to do next, if nothing happens before."""
        settings = self._settings
        if self._gone_at is not None:
            return self._gone_at + settings.gone_for
        if self._failures:
            pause = settings.backoff * 2.0 ** min(self._failures - 1, 30)
            due = self._asked_at + min(pause, settings.backoff_max)
            if self._stale_at is not None:
                due = min(due, self._stale_at + settings.stale_for)
            return due
        if self._wants_all or self._wants_probe or self.place.next is None:
            return float("-inf")
        if self._gap_at is not None:
            return self._gap_at + settings.reorder
        return max(self._asked_at, self._heard_at or 0.0) + settings.probe_interval

    async def _ask(self) -> None:
        self._questions_total += 1
        try:
            await self._catch_up()
        except (RequestError, WireError) as error:
            self._failures += 1
            self._failures_total += 1
            self._error = str(error)
            if self._failures == self._settings.tries:
                self._stale_at = self._clock()
                _log.warning("node_stale", node=self.node, error=self._error)
        else:
            if self._stale_at is not None:
                _log.info("node_answers", node=self.node)
            self._failures, self._stale_at, self._error = 0, None, None
        self._asked_at = self._clock()
        self._gap_at = self._asked_at if self.place.has_gap else None

    async def _catch_up(self) -> None:
        """One question and its answer. Raises RequestError or WireError."""
        place, address = self.place, self.address
        if address is None:
            return  # it left while this waited for its turn
        self._wants_probe = False
        if self._wants_all or place.next is None:
            question = CatchUp()
            self._wants_all = False
            place.hold()
        else:
            question = CatchUp(place.publisher, place.next)
        wants_all = question.publisher == 0
        try:
            async with self._client.stream(
                address,
                self._endpoint,
                encode_catch_up(question),
                deadline_s=self._settings.ask_timeout,
            ) as answer:
                first = await anext(answer, None)
                if first is None:
                    raise WireError("an empty answer")
                begins = decode_begins(first)
                if begins.kind == "snapshot":
                    wants_all = True
                    await self._take_snapshot(begins, answer)
                else:
                    await self._take_replay(question, begins, answer)
        except BaseException:
            self._wants_all = self._wants_all or wants_all
            raise
        finally:
            self._apply(place.release())

    async def _take_snapshot(self, begins: Begins, answer: ResponseStream) -> None:
        place = self.place
        if begins.publisher != place.publisher:
            place.meet(begins.publisher)
        place.hold()
        async with self.holdings.stage() as staged:
            async for item in answer:
                await staged.add(decode_rows(item))
            if place.publisher != begins.publisher:
                raise WireError("the node began anew during its snapshot")
            staged.take_over()
            self._snapshots_total += 1
            self._apply(place.resume(begins.next))

    async def _take_replay(self, question: CatchUp, begins: Begins, answer: ResponseStream) -> None:
        place = self.place
        if begins.publisher != question.publisher or begins.next < question.first:
            self._wants_all = True
            raise WireError("a replay of another stream than was asked for")
        turn = 0
        async for item in answer:
            envelope = decode_envelope(item)
            if place.publisher != begins.publisher:
                raise WireError("the node began anew during its replay")
            if envelope.publisher_id != begins.publisher:
                raise WireError("an event of another publisher in a replay")
            self._replayed_total += 1
            turn += self._gather(place.hear(envelope.sequence, envelope.payload))
            if turn >= TURN_BLOCKS or len(self._writer.changes) >= TURN_EVENTS:
                self._writer.flush()
                turn = 0
                await asyncio.sleep(0)
        if place.publisher == begins.publisher and (place.next or 0) < begins.next:
            self._wants_all = True
            raise WireError(f"a replay to {begins.next} with holes at {place.next}")

    # -- what is seen of it --------------------------------------------------------------

    @property
    def state(self) -> NodeState:
        if self._gone_at is not None:
            return NodeState.GONE
        if self._stale_at is not None:
            return NodeState.STALE
        if self._wants_all or self.place.next is None or self.place.is_held or self.place.behind:
            return NodeState.SYNCING
        return NodeState.LIVE

    @property
    def status(self) -> NodeStatus:
        place = self.place
        heard = self._heard_at
        return NodeStatus(
            node=self.node,
            state=self.state,
            publisher=place.publisher,
            next=place.next,
            behind=place.behind,
            heard_s_ago=None if heard is None else self._clock() - heard,
            delay_s=self._delay_s,
            error=self._error,
            workers=len(self.holdings.workers),
            owners=len(self.holdings.owners),
            blocks=self.holdings.blocks,
            gaps_total=place.gaps_total,
            duplicates_total=place.duplicates_total,
            questions_total=self._questions_total,
            failures_total=self._failures_total,
            replayed_total=self._replayed_total,
            snapshots_total=self._snapshots_total,
            malformed_total=self._malformed_total,
            dropped_total=place.dropped_total,
            refused_total=self.holdings.refused_total,
        )
