"""The reader's side: one other node, what it says it has, and chunks read from it.

A link connects for as long as it runs, with growing pauses. While it is connected, `lengths` is
what the owner keeps in host memory; the moment the connection ends, or a read misses its deadline,
that is nothing. Bytes come with NIXL where both nodes have it, else over TCP; either way they are
compared with their checksum before anybody is told of them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from kvbm.meter import Meter
from kvbm.peers import wire
from kvbm.peers.greeting import Greeter, KnownError
from kvbm.peers.pull import DataConnections
from kvbm.protocol import FrameError, Message, encode, split_keys
from storage_tiers.arena import Arena
from storage_tiers.base import Corrupt, Failed, Key, Loaded, LoadItem, LoadOutcome, Missing
from storage_tiers.codec import checksum
from storage_tiers.files import Moved, MoveOutcome, NotMoved, address_of
from storage_tiers.ucx import UcxMover
from storage_tiers.ucx_process import RemoteArena

RETRY_S_MIN: Final = 0.1
RETRY_S_MAX: Final = 5.0
RETRY_KNOWN_S: Final = 60.0  # an address that turned out to be a node that is connected already
STEADY_S: Final = 10.0
KEYS_MAX: Final = 1 << 22  # known of one peer, about 150 bytes each
UNSENT_BYTES_MAX: Final = 4 << 20
NIXL_PAUSE_S: Final = 60.0  # after a failed read, which may have cost everybody the process
HOLD_MARGIN_S: Final = 1.0  # a claim outlives the read it is for

_log = structlog.get_logger("kvbm.peers")

_Claimed = asyncio.Future[wire.Claimed | None]


class PeerLink:
    """A `PeerSource`. Call from one event loop; `run` until cancelled."""

    def __init__(
        self,
        address: tuple[str, int],
        greeter: Greeter,
        arena: Arena,
        ucx: UcxMover | None,
        meter: Meter,
        *,
        is_known: Callable[[bytes], bool],
    ) -> None:
        """`is_known` says whether another link, or this node, has that identity."""
        self.address = address
        self.name = f"{address[0]}:{address[1]}"
        self.node = ""  # its name, once it has welcomed us
        self.identity: bytes | None = None  # while it is connected
        self.problem = "not connected yet"
        self.is_redundant = False  # the address leads where another link leads, or here
        self.lengths: dict[Key, int] = {}
        self.used_bytes = self.capacity_bytes = self.bytes_in_flight = 0
        self.loaded_chunks = 0
        self._greeter = greeter
        self._arena = arena
        self._arena_at = address_of(arena.data)
        self._ucx = ucx
        self._meter = meter
        self._is_known = is_known
        self._writer: asyncio.StreamWriter | None = None
        self._data: DataConnections | None = None
        self._remote: RemoteArena | None = None
        self._plain_until = 0.0  # NIXL has failed there
        self._numbers = itertools.count(1)
        self._claims: dict[int, _Claimed] = {}

    @property
    def mover(self) -> str | None:
        """What moves bytes from there now; None while it is away."""
        if self._writer is None:
            return None
        return "tcp" if self._nixl() is None else "nixl-ucx"

    async def run(self) -> None:
        pause_s = RETRY_S_MIN
        while True:
            began = time.monotonic()
            try:
                await self._live()
                if self._writer is not None:  # else it was dropped, and why is known
                    self._note_problem("the peer closed the connection")
            except KnownError:
                self.problem = "a node that is connected already, or this one"
                self.is_redundant = True
                pause_s = RETRY_KNOWN_S
            except (OSError, TimeoutError, FrameError) as error:
                self._note_problem(str(error) or type(error).__name__)
            finally:
                self._end()
            if time.monotonic() - began > STEADY_S and pause_s < RETRY_KNOWN_S:
                pause_s = RETRY_S_MIN
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_S_MAX)

    # -- PeerSource ----------------------------------------------------------------------

    def forget(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.used_bytes -= self.lengths.pop(key, 0)

    async def read(self, items: Sequence[LoadItem], deadline: float) -> list[LoadOutcome]:
        size = sum(self.lengths.get(item.key, 0) for item in items)
        self.bytes_in_flight += size
        try:
            outcomes: list[LoadOutcome] = []
            for at in range(0, len(items), wire.KEYS_PER_CLAIM_MAX):
                part = items[at : at + wire.KEYS_PER_CLAIM_MAX]
                outcomes += await self._read(part, deadline)
            return outcomes
        finally:
            self.bytes_in_flight -= size

    # -- reading -------------------------------------------------------------------------

    async def _read(self, items: Sequence[LoadItem], deadline: float) -> list[LoadOutcome]:
        number = next(self._numbers)
        claimed = await self._claim(number, items, deadline)
        if isinstance(claimed, str):
            return [Failed(f"{self.name}: {claimed}")] * len(items)
        outcomes: list[LoadOutcome] = [Missing()] * len(items)
        for index in claimed.busy:
            outcomes[index] = Failed(f"{self.name} lends no more at this moment")
        views = [items[lent.index].into[: lent.length] for lent in claimed.lent]
        moved = await self._move(number, claimed, views, deadline) if views else Moved()
        if isinstance(moved, Moved) and views:
            await self._verify(items, claimed, views, outcomes, deadline)
        elif isinstance(moved, NotMoved):
            for lent in claimed.lent:
                outcomes[lent.index] = Failed(f"{self.name}: {moved.reason}")
        self._say(wire.Release(number))
        ended = zip(items, outcomes, strict=True)
        self.forget([item.key for item, end in ended if isinstance(end, Missing | Corrupt)])
        return outcomes

    async def _claim(
        self, number: int, items: Sequence[LoadItem], deadline: float
    ) -> wire.Claimed | str:
        """What was lent, or why nothing."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return "the deadline is over"
        by_nixl = self._nixl() is not None and None not in [self._place(i.into) for i in items]
        keys = b"".join(item.key for item in items)
        hold_s = min(left_s + HOLD_MARGIN_S, wire.CLAIM_S_MAX)
        future: _Claimed = asyncio.get_running_loop().create_future()
        self._claims[number] = future
        try:
            if not self._say(wire.Claim(number, keys, hold_s, by_nixl)):
                return self.problem
            async with asyncio.timeout(left_s):
                claimed = await future
        except TimeoutError:
            self._meter.error("load_peer", "deadline")
            self._drop(f"it did not answer within {left_s:.3g} s")
            claimed = None
        finally:
            del self._claims[number]
        if claimed is None:
            return self.problem
        indexes = [*(lent.index for lent in claimed.lent), *claimed.busy]
        if (
            len(set(indexes)) != len(indexes)
            or not all(0 <= i < len(items) for i in indexes)
            or not all(n.is_sane(len(items[n.index].into)) for n in claimed.lent)
        ):
            self._drop("it lends what it was not asked for")
            return self.problem
        return claimed

    async def _move(
        self, number: int, claimed: wire.Claimed, views: Sequence[memoryview], deadline: float
    ) -> MoveOutcome:
        """All views are filled, or not; either way nothing writes to them any more."""
        remote, offsets = self._nixl(), [self._place(view) for view in views]
        moved: MoveOutcome = NotMoved("not tried")
        if self._ucx is not None and remote is not None and None not in offsets:
            pieces = [
                (lent.offset, at, lent.length)
                for lent, at in zip(claimed.lent, offsets, strict=True)
                if at is not None
            ]
            moved = await self._ucx.read(remote, pieces, deadline - time.monotonic())
            if isinstance(moved, Moved):
                return moved
            self._meter.error("load_peer", "nixl")
            _log.warning("peer_read_failed", peer=self.name, mover="nixl-ucx", reason=moved.reason)
            self._plain_until = time.monotonic() + NIXL_PAUSE_S
        if self._data is not None:
            moved = await self._data.pull(number, views, deadline)
        if isinstance(moved, NotMoved) and time.monotonic() >= deadline:
            self._meter.error("load_peer", "deadline")
            self._drop("a read from it missed its deadline")
        return moved

    async def _verify(
        self,
        items: Sequence[LoadItem],
        claimed: wire.Claimed,
        views: Sequence[memoryview],
        outcomes: list[LoadOutcome],
        deadline: float,
    ) -> None:
        digests = await asyncio.to_thread(lambda: [checksum(view) for view in views])
        for lent, digest in zip(claimed.lent, digests, strict=True):
            key = items[lent.index].key
            if digest == lent.checksum:
                outcomes[lent.index] = Loaded(lent.chunk(key))
                self.loaded_chunks += 1
            elif time.monotonic() > deadline + HOLD_MARGIN_S:
                # This process slept, and the claim was over before the bytes were read.
                outcomes[lent.index] = Failed(f"{self.name}: read after the claim was over")
            else:
                outcomes[lent.index] = Corrupt(f"what came from {self.name} is not the chunk")
                self._say(wire.Damaged(key))

    def _nixl(self) -> RemoteArena | None:
        """How to read with NIXL, if that is possible now."""
        is_running = self._ucx is not None and self._ucx.own is not None
        return self._remote if is_running and time.monotonic() >= self._plain_until else None

    def _place(self, view: memoryview) -> int | None:
        """Where in the arena the memory lies; None elsewhere."""
        at = address_of(view) - self._arena_at
        return at if 0 <= at <= self._arena.capacity_bytes - len(view) else None

    # -- the connection ------------------------------------------------------------------

    async def _live(self) -> None:
        """One connection's life."""
        greeted = await self._greeter.greet(self.address, wire.CONTROL, is_known=self._is_known)
        welcome, bodies = greeted.welcome, greeted.bodies
        stream, writer = await asyncio.open_connection(sock=greeted.sock)
        self._writer, self.node, self.identity = writer, welcome.node, welcome.identity
        self.capacity_bytes, self.problem = welcome.capacity_bytes, ""
        self.is_redundant = False
        self._data = DataConnections(self.address, self._greeter, welcome.session)
        _log.info("peer_connected", peer=self.name, node=welcome.node)
        while self._writer is writer:  # else it was dropped, and what it still says is of no use
            for body in bodies:
                self._heard(wire.decode_from_owner(body))
            data = await stream.read(wire.GREETING_BYTES_MAX)
            if not data:
                return
            bodies = list(greeted.frames.feed(data))

    def _heard(self, message: wire.FromOwner) -> None:
        match message:
            case wire.Have():
                self._learn(wire.unpack_have(message))
            case wire.Gone():
                self.forget(split_keys(message.keys))
            case wire.Claimed():
                future = self._claims.get(message.number)
                if future is not None and not future.done():
                    future.set_result(message)
            case wire.Serves():
                self._forget_remote()
                if message.arena.metadata:
                    self._remote, self._plain_until = message.arena, 0.0
            case _:
                raise FrameError(f"{type(message).__name__} on a control connection")

    def _learn(self, found: Sequence[tuple[Key, int]]) -> None:
        for key, length in found:
            if len(self.lengths) >= KEYS_MAX and key not in self.lengths:
                self._meter.dropped("peer_index", "full", 1)
                continue
            self.used_bytes += length - self.lengths.get(key, 0)
            self.lengths[key] = length

    def _say(self, message: Message) -> bool:
        writer = self._writer
        if writer is None or writer.is_closing():
            return False
        if writer.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self._drop("it does not read what it is asked")
            return False
        writer.write(encode(message))
        return True

    def _drop(self, reason: str) -> None:
        """End this connection: nothing is to be had from it now."""
        self._note_problem(reason)
        self._end()

    def _end(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.transport.abort()
            self._meter.error("peer", "lost")
        data, self._data = self._data, None
        if data is not None:
            data.close()
        self._forget_remote()
        self.identity = None
        self.lengths = {}
        self.used_bytes = self.capacity_bytes = 0
        for future in self._claims.values():
            if not future.done():
                future.set_result(None)

    def _forget_remote(self) -> None:
        if self._remote is not None and self._ucx is not None:
            self._ucx.forget(self._remote)
        self._remote = None

    def _note_problem(self, problem: str) -> None:
        if problem != self.problem:
            _log.warning("peer_away", peer=self.name, node=self.node, reason=problem)
        self.problem = problem
