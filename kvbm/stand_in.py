"""An engine's place at the daemon without an engine: a scheduler, a worker, one cache group.

What `kvbm bench` and the tests store and load with. It waits where the connector never would.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from kvbm.client import UNMEASURED, Filled, SchedulerClient
from kvbm.link import Link
from kvbm.protocol import (
    COMING,
    HERE,
    VERSION,
    Fence,
    Fenced,
    FromDaemon,
    Hello,
    MatchGroup,
    Outcome,
    Pace,
    Routing,
    State,
    Welcome,
)
from storage_tiers.arena import Arena, Slot
from storage_tiers.base import Key, StoreItem

WAIT_S = 60.0
TOKENS_PER_CHUNK = 32
_names = itertools.count()


class StandIn:
    """Stores and fetches chunks as the connector does. A context manager; calls wait, bounded."""

    def __init__(
        self,
        socket: Path,
        chunk_bytes: int,
        *,
        lease_chunks: int = 16,
        routing: Routing | None = None,
    ) -> None:
        """`routing`: who it is for routers; its chunks' notes are then taken."""
        self._routing = routing
        self._engine = f"stand-in-{os.getpid()}-{next(_names)}"
        self._chunk_bytes = chunk_bytes
        self._arena: Arena | None = None
        self._connection = 0
        self._worker = Link(str(socket), lambda: self._hello("worker"), self)
        self.client = SchedulerClient(str(socket), lambda: self._hello("scheduler"), [lease_chunks])

    def __enter__(self) -> Self:
        self.start()
        self.wait(
            # It may say so to the scheduler before the worker has heard where the arena is.
            lambda: self.client.ready and self._mapped() is not None,
            "the daemon is ready for this engine",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Connect, in the background: until then nothing is found and nothing taken."""
        self._worker.start()
        self.client.start()

    def close(self) -> None:
        self.client.close()
        self._worker.close()

    def store(self, items: Sequence[StoreItem]) -> None:
        """Hand these chunks to the daemon, as many at a time as slots are leased."""
        waiting = list(items)
        end = time.monotonic() + WAIT_S
        while waiting:
            if time.monotonic() > end:
                raise TimeoutError(f"no slots for {len(waiting)} chunks within {WAIT_S:g} s")
            if not (done := self.offer(waiting)):
                time.sleep(0.01)
            del waiting[:done]

    def offer(self, items: Sequence[StoreItem]) -> int:
        """Hand over as many of these chunks as there are slots for at this moment."""
        self.client.pump()
        if (arena := self._mapped()) is None:
            return 0
        slots = self.client.take_slots(0, len(items))
        filled: list[Filled] = []
        for slot, item in zip(slots, items, strict=False):
            arena.view(slot.offset, slot.length)[:] = item.data
            chunk = item.chunk
            filled.append(Filled(chunk.key, chunk.parent, chunk.position, slot, chunk.note))
        if filled:
            self.client.commit(filled)
        return len(filled)

    def fetch(
        self, keys: Sequence[Key], request: str = "", pace: Pace = UNMEASURED
    ) -> list[bytes | None]:
        """Each chunk's bytes, None from the first one on that the daemon cannot give.

        `pace` is the engine's speed, by which the daemon may leave chunks to be computed.
        """
        return self._look(keys, lambda _, view: bytes(view), request, pace)

    def load(self, keys: Sequence[Key], into: Sequence[memoryview]) -> int:
        """Copy each chunk into its buffer; how many came, of whose bytes nothing is checked here.

        A buffer is as long as its chunk.
        """

        def copy(index: int, view: memoryview) -> bytes:
            into[index][:] = view
            return b""

        return sum(found is not None for found in self._look(keys, copy))

    def _look(
        self,
        keys: Sequence[Key],
        take: Callable[[int, memoryview], bytes],
        request: str = "",
        pace: Pace = UNMEASURED,
    ) -> list[bytes | None]:
        """What `take` makes of each chunk's index and bytes, while it is claimed."""
        group = MatchGroup(TOKENS_PER_CHUNK, 0, b"".join(keys))
        asked_at = time.monotonic()
        self.client.pump()  # the daemon may have come, or gone
        lookup = self.client.look_up([group], list(keys), request, pace)
        if lookup is None:
            return [None] * len(keys)
        self.wait(
            lambda: lookup.answered and COMING not in lookup.states, "every chunk came or failed"
        )
        found: list[bytes | None] = []
        arena = self._mapped()
        for index, state in enumerate(lookup.states):
            if state != HERE or arena is None:
                found.append(None)
                continue
            slot = Slot(*lookup.rows[index][2:])
            found.append(take(index, arena.view(slot.offset, slot.length)))
            assert arena.generation(slot.offset) == slot.generation, "it is claimed"
        loaded = TOKENS_PER_CHUNK * sum(data is not None for data in found)
        waited_s = time.monotonic() - asked_at
        ended: State = "loaded" if loaded else "computed"
        outcome = Outcome(lookup.ticket, ended, 0, loaded, waited_s, 0.0, "")
        self.client.forget(lookup, outcome)
        return found

    def wait(self, true: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        self.client.pump()
        while not true():
            waited_s = time.monotonic() - began
            if waited_s > WAIT_S:
                raise TimeoutError(f"not within {WAIT_S:g} s: {what}")
            # An answer from host memory comes in less than a millisecond.
            time.sleep(min(max(waited_s / 4, 0.0002), 0.005))
            self.client.pump()

    def _mapped(self) -> Arena | None:
        """The arena that the scheduler's slots are in; None while it is another daemon's."""
        arena = self._arena
        return None if arena is None or arena.epoch != self.client.epoch else arena

    # -- the worker's link ---------------------------------------------------------------

    def connected(self, connection: int, welcome: Welcome, arena_fd: int | None) -> None:
        assert arena_fd is not None, "a worker's welcome brings the arena"
        self._arena = Arena.attach(arena_fd)
        self._connection = connection

    def received(self, message: FromDaemon) -> None:
        if isinstance(message, Fence):
            self._worker.send(self._connection, Fenced())

    def disconnected(self) -> None:
        pass

    def _hello(self, role: str) -> Hello:
        sizes = [self._chunk_bytes] if role == "worker" else []
        routing = self._routing if role == "scheduler" else None
        return Hello(VERSION, role, self._engine, 0, 1, {}, sizes, False, os.getpid(), routing)
