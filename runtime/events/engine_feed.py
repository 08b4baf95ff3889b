"""One vLLM engine's own KV events, each once and in order, or the word that some are lost.

vLLM publishes batches numbered from 0 on a PUB socket, and answers on a ROUTER socket with those
of its ring from a number on; both ports are per data-parallel rank. It has no snapshot, and no
mark that tells one run of the engine from the next: a run is recognised by the bytes of a batch
that is known already. So every question to the ring begins at the last known batch.

One task owns the sockets. It asks the ring when it has connected, when a number is missing or
falls back, and after silence, which finds what was lost last. It reads no further while the
consumer's queue is full: ZMQ then drops what it has no room for, which the ring gives back. The
engine never waits. Its thread answers the ring between two batches, every 0.1 s at the latest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import structlog
import xxhash
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from runtime.events.engine_wire import EngineBatch, decode_engine_batch
from runtime.events.envelope import WireError
from runtime.tasks import end

SEEN_BATCHES: Final = 1 << 14  # more than vLLM's ring holds by default
MESSAGE_BYTES_MAX: Final = 256 << 20
BURST_MESSAGES_MAX: Final = 256
RING_ATTEMPTS: Final = 4
RECONNECT_S: Final = 0.1  # doubles up to
RECONNECT_S_MAX: Final = 2.0
HEARTBEAT_S: Final = 5.0
HEARTBEAT_TIMEOUT_S: Final = 15.0
FIRST_PROBE_S: Final = 0.4  # after connecting; doubles up to `probe_s`
_PARTS: Final = 3
_SEQUENCE_BYTES: Final = 8
_CONNECTIONS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_END: Final = (-1).to_bytes(8, "big", signed=True)

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EngineFeedOptions:
    endpoint: str  # of the PUB socket, of this rank: see `rank_endpoint`
    replay_endpoint: str | None = None  # without it every gap is a loss
    topic: str = ""
    queue_batches: int = 1024
    high_water_messages: int = 100_000
    replay_timeout_s: float = 2.0  # without a word from the ring
    probe_s: float = 5.0


@dataclass(frozen=True, slots=True)
class EngineEvents:
    """The batch after the one before it; `sequence` is the engine's number of it."""

    sequence: int
    batch: EngineBatch


@dataclass(frozen=True, slots=True)
class Lost:
    """These batches cannot be had: what the engine holds is not known. Clear and resync."""

    sequences: range


@dataclass(frozen=True, slots=True)
class Restarted:
    """Another run of the engine, or one that cannot be told from it: forget what it held."""


FeedItem = EngineEvents | Lost | Restarted


@dataclass(frozen=True, slots=True)
class EngineFeedStatus:
    connected: bool
    error: str | None
    next_sequence: int
    batches_total: int
    replayed_total: int  # of those, batches that came from the ring
    lost_total: int
    restarts_total: int
    malformed_total: int
    unknown_total: int  # events of types not known here
    queued: int
    queue_limit: int


def rank_endpoint(endpoint: str, rank: int, host: str = "127.0.0.1") -> str:
    """Where to connect for a rank of an engine whose settings say `endpoint`: port + rank."""
    address, _, port = endpoint.rpartition(":")
    if not address.startswith("tcp://") or not port.isdecimal():
        if rank:
            raise ValueError(f"{endpoint!r} has no port to count ranks from")
        return endpoint
    for wildcard in ("*", "0.0.0.0", "[::]"):  # noqa: S104 (not bound: replaced)
        address = address.replace(f"//{wildcard}", f"//{host}")
    return f"{address}:{int(port) + rank}"


class EngineFeed:
    """An async iterator of `FeedItem`, which ends when it is closed."""

    def __init__(self, options: EngineFeedOptions) -> None:
        assert options.queue_batches > 0
        self._options = options
        self._items: deque[FeedItem] = deque()
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._context: Any = None
        self._monitor: Any = None  # tells of connections
        self._connected = False
        self._changes = 0  # of the connection, made or broken
        self._error: str | None = "not connected yet"
        self._suspect = False  # the connection broke: this may be another run
        self._ring_answers = False  # it has given a batch of this run
        self._ring_failed = False  # it did not answer, though asked several times
        self._verified = False  # since the last burst was read
        self._next = 0
        self._seen = np.zeros(SEEN_BATCHES, np.uint64)  # the newest batches, by their bytes
        self._seen_from = 0
        self._counts = dict.fromkeys(
            ("batches", "replayed", "lost", "restarts", "malformed", "unknown"), 0
        )

    async def start(self) -> None:
        assert self._task is None, "started already"
        self._context = zmq.asyncio.Context()
        self._task = asyncio.create_task(self._run(), name="engine-feed")

    async def close(self) -> None:
        """Idempotent; what was read may still be taken."""
        self._closed = True
        self._arrived.set()
        task, self._task = self._task, None
        if task is not None:
            await end(task)
            await asyncio.to_thread(self._context.term)  # all sockets are closed: at once

    def status(self) -> EngineFeedStatus:
        counts = self._counts
        return EngineFeedStatus(
            connected=self._connected,
            error=self._error,
            next_sequence=self._next,
            batches_total=counts["batches"],
            replayed_total=counts["replayed"],
            lost_total=counts["lost"],
            restarts_total=counts["restarts"],
            malformed_total=counts["malformed"],
            unknown_total=counts["unknown"],
            queued=len(self._items),
            queue_limit=self._options.queue_batches,
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FeedItem:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        self._taken.set()
        return self._items.popleft()

    # -- the one task ---------------------------------------------------------------------

    async def _run(self) -> None:
        socket = self._context.socket(zmq.SUB)
        socket.linger = 0
        socket.rcvhwm = self._options.high_water_messages
        socket.maxmsgsize = MESSAGE_BYTES_MAX
        socket.reconnect_ivl = int(RECONNECT_S * 1000)
        socket.reconnect_ivl_max = int(RECONNECT_S_MAX * 1000)
        socket.heartbeat_ivl = int(HEARTBEAT_S * 1000)
        socket.heartbeat_timeout = int(HEARTBEAT_TIMEOUT_S * 1000)
        self._monitor = socket.get_monitor_socket(_CONNECTIONS)
        try:
            socket.subscribe(self._options.topic)
            socket.connect(self._options.endpoint)
            await self._follow(socket)
        except zmq.ZMQError as error:
            self._error = f"{self._options.endpoint}: {error}"
            _log.error("engine_feed_refused", endpoint=self._options.endpoint, reason=str(error))
        finally:
            self._connected = False
            self._closed = True
            self._arrived.set()
            socket.disable_monitor()
            self._monitor.close(linger=0)
            socket.close(linger=0)

    async def _follow(self, socket: Any) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        probe_s = FIRST_PROBE_S
        while True:
            ready = dict(await poller.poll(int(probe_s * 1000)))
            burst = await self._read_burst(socket) if socket in ready else []
            # A connection is told before its messages: after this, it is known whose they are.
            if await self._watch():
                probe_s = FIRST_PROBE_S
                await self._ask_ring(None)
            self._verified = False
            changes = self._changes
            for sequence, payload in burst:
                await self._live(sequence, payload)
                if self._changes != changes:
                    break  # the rest may be of another run than the ring is now
            if not ready and self._connected:
                await self._ask_ring(None)
                probe_s = min(2 * probe_s, self._options.probe_s)

    async def _watch(self) -> bool:
        """Whether the engine is newly connected."""
        fresh = False
        while await self._monitor.poll(0):
            event = (await recv_monitor_message(self._monitor))["event"]
            fresh = self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._error = None if self._connected else "disconnected"
            self._changes += 1
            self._suspect = self._next > 0
            _log.info("engine_feed", endpoint=self._options.endpoint, connected=self._connected)
        return fresh

    async def _read_burst(self, socket: Any) -> list[tuple[int, bytes]]:
        burst: list[tuple[int, bytes]] = []
        with contextlib.suppress(zmq.Again):
            while len(burst) < BURST_MESSAGES_MAX:
                parts = await socket.recv_multipart(zmq.NOBLOCK)
                if len(parts) == _PARTS and len(parts[1]) == _SEQUENCE_BYTES:
                    burst.append((int.from_bytes(parts[1], "big"), parts[2]))
                else:
                    self._malformed(f"a message of {len(parts)} parts")
        return burst

    async def _live(self, sequence: int, payload: bytes) -> None:
        if sequence < self._next and self._is_seen(sequence, payload):
            return  # the ring gave it already
        if not self._connected:
            # Left over of the run that was connected; the ring will tell what is missing.
            if sequence == self._next:
                await self._accept(sequence, payload)
            return
        if sequence != self._next or self._suspect:
            changes = self._changes
            verified = self._verified and sequence < self._next
            self._verified = verified or await self._ask_ring(sequence)
            if self._changes != changes:
                return
            if sequence < self._next:
                if self._verified or self._is_seen(sequence, payload):
                    return  # lost, or given by the ring, meanwhile
                await self._restart()
            if sequence > self._next:
                await self._lose(sequence)
        await self._accept(sequence, payload)

    # -- the ring -------------------------------------------------------------------------

    async def _ask_ring(self, live: int | None) -> bool:
        """Take over what the ring has after the last known batch, up to `live` at least.

        False if it could not be asked: then what was known may be of another run.
        """
        if self._options.replay_endpoint is None:
            await self._without_ring()
            return False
        answered = False
        for attempt in range(1 if self._ring_failed else RING_ATTEMPTS):
            if attempt:
                await asyncio.sleep(min(RECONNECT_S * 2**attempt, RECONNECT_S_MAX))
                await self._watch()
                if not self._connected:
                    return False  # asked again when it is
            complete = await self._replay()
            answered = answered or complete
            if complete and (live is None or live < self._next):
                break
        self._ring_failed = not answered
        if live is not None and not answered:
            await self._without_ring()
        return answered

    async def _without_ring(self) -> None:
        """Nothing tells whether this is the same run: after a break it is taken for another."""
        if self._suspect:
            await self._restart()

    async def _replay(self) -> bool:
        """Whether the ring answered to its end, without a hole."""
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.rcvhwm = self._options.high_water_messages
        socket.maxmsgsize = MESSAGE_BYTES_MAX
        socket.immediate = 1  # a question waits for a connection, not in a queue
        asked = max(self._next - 1, 0)
        silence_s = self._options.replay_timeout_s
        first = True
        try:
            socket.connect(self._options.replay_endpoint)
            async with asyncio.timeout(silence_s):
                await socket.send_multipart([b"", asked.to_bytes(_SEQUENCE_BYTES, "big")])
            while True:
                async with asyncio.timeout(silence_s):
                    parts = await socket.recv_multipart()
                if len(parts) != _PARTS + 1 or len(parts[2]) != _SEQUENCE_BYTES:
                    self._malformed(f"an answer of {len(parts)} parts")
                    return False
                if parts[2] == _END:
                    return await self._ended(empty=first, asked=asked)
                if not await self._replayed(int.from_bytes(parts[2], "big"), parts[3], first):
                    return False
                first = False
        except (TimeoutError, zmq.ZMQError) as error:
            reason = str(error) or "does not answer"
            self._error = f"the ring at {self._options.replay_endpoint}: {reason}"
            return False
        finally:
            socket.close(linger=0)

    async def _replayed(self, sequence: int, payload: bytes, first: bool) -> bool:
        """Whether the answer goes on; if not, the ring is to be asked anew."""
        if first:
            known = sequence < self._next
            if known and not self._is_seen(sequence, payload):
                await self._restart()
                if sequence:
                    return False  # from the beginning
            elif not known and self._suspect:
                await self._restart()  # the known batch has left the ring: no telling
            self._suspect = False
            self._ring_answers = True
            if sequence > self._next:
                await self._lose(sequence)
        if sequence > self._next:
            return False  # ROUTER dropped some on the way
        if sequence == self._next:
            self._counts["replayed"] += 1
            await self._accept(sequence, payload)
        return True

    async def _ended(self, *, empty: bool, asked: int) -> bool:
        self._error = None
        if empty and self._next and (self._suspect or self._ring_answers):
            # It knows fewer batches than this run had: it is another.
            await self._restart()
            return asked == 0
        self._suspect = False
        return True

    # -- what the consumer gets -----------------------------------------------------------

    async def _accept(self, sequence: int, payload: bytes) -> None:
        assert sequence == self._next
        self._seen[sequence % SEEN_BATCHES] = xxhash.xxh3_64_intdigest(payload)
        self._next = sequence + 1
        try:
            batch = decode_engine_batch(payload)
        except WireError as error:
            self._malformed(str(error))
            self._counts["lost"] += 1
            await self._put(Lost(range(sequence, sequence + 1)))
            return
        self._counts["batches"] += 1
        self._counts["unknown"] += batch.unknown_count
        await self._put(EngineEvents(sequence, batch))

    async def _lose(self, sequence: int) -> None:
        """Go on at `sequence`, without those before it."""
        lost = range(self._next, sequence)
        self._next = self._seen_from = sequence
        self._counts["lost"] += len(lost)
        _log.warning("engine_events_lost", endpoint=self._options.endpoint, lost=len(lost))
        await self._put(Lost(lost))

    async def _restart(self) -> None:
        had = self._next
        self._next = self._seen_from = 0
        self._suspect = self._ring_answers = False
        if had:
            self._counts["restarts"] += 1
            _log.info("engine_restarted", endpoint=self._options.endpoint, had=had)
            await self._put(Restarted())

    async def _put(self, item: FeedItem) -> None:
        while len(self._items) >= self._options.queue_batches:
            self._taken.clear()
            await self._taken.wait()
        self._items.append(item)
        self._arrived.set()

    def _is_seen(self, sequence: int, payload: bytes) -> bool:
        """Whether this very batch was accepted; of too old ones it is not known."""
        if not max(self._seen_from, self._next - SEEN_BATCHES) <= sequence < self._next:
            return False
        return bool(self._seen[sequence % SEEN_BATCHES] == xxhash.xxh3_64_intdigest(payload))

    def _malformed(self, reason: str) -> None:
        if not self._counts["malformed"]:
            _log.warning("engine_event_malformed", endpoint=self._options.endpoint, reason=reason)
        self._counts["malformed"] += 1
