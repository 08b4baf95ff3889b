"""A router as the stream sees it: it applies what comes, and asks for what it missed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable

import numpy as np

from runtime.events.envelope import Envelope, decode_envelope
from runtime.events.node_stream import (
    Begins,
    CatchUp,
    Rows,
    decode_begins,
    decode_rows,
    encode_catch_up,
)
from runtime.events.router_event import Cleared, Removed, StorageTier, Stored
from runtime.events.router_wire import decode_msgpack
from runtime.hashing import sequence_hashes

Holder = tuple[int, int, str, StorageTier]  # worker or owner, rank, domain, tier
Held = dict[Holder, set[int]]
Ask = Callable[[bytes], AsyncIterator[bytes]]


class Consumer:
    """Applies envelopes in order; what comes out of order waits for the answer to a question."""

    def __init__(self) -> None:
        self.held: defaultdict[Holder, set[int]] = defaultdict(set)
        self.snapshots = 0
        self.replays = 0
        self._publisher = 0
        self._next = 0
        self._waiting: list[Envelope] = []
        self._answer: AsyncIterator[bytes] | None = None
        self._begins: Begins | None = None
        self._last_id: dict[tuple[int, int], int] = {}

    @property
    def blocks(self) -> Held:
        return {holder: names for holder, names in self.held.items() if names}

    @property
    def is_behind(self) -> bool:
        return self._answer is not None or bool(self._waiting) or not self._publisher

    def hear(self, data: bytes) -> None:
        """A message from the plane."""
        envelope = decode_envelope(data)
        is_next = envelope.publisher_id == self._publisher and envelope.sequence == self._next
        if is_next and not self.is_behind:
            self._apply(envelope)
        elif envelope.publisher_id != self._publisher or envelope.sequence >= self._next:
            self._waiting.append(envelope)

    def ask(self, ask: Ask) -> None:
        """Ask for what is missing; the answer is read with `read`."""
        question = encode_catch_up(CatchUp(self._publisher, self._next))
        self._answer, self._begins = ask(question), None

    async def read(self) -> bool:
        """One item of the answer; False at its end, after which what waited is applied."""
        assert self._answer is not None
        item = await anext(self._answer, None)
        if item is None:
            self._end()
            return False
        if self._begins is None:
            self._begin(decode_begins(item))
        elif self._begins.kind == "replay":
            self._apply(decode_envelope(item))
        else:
            self._add(decode_rows(item))
        return True

    async def catch_up(self, ask: Ask) -> None:
        while self.is_behind:
            if self._answer is None:
                self.ask(ask)
            while await self.read():
                pass

    def _begin(self, begins: Begins) -> None:
        self._begins = begins
        if begins.kind == "snapshot":
            self.snapshots += 1
            self.held.clear()
            self._last_id.clear()
        else:
            self.replays += 1
            assert begins.publisher == self._publisher

    def _end(self) -> None:
        begins, self._answer, self._begins = self._begins, None, None
        assert begins is not None
        if begins.kind == "replay":
            assert self._next == begins.next
        self._publisher, self._next = begins.publisher, begins.next
        waiting, self._waiting = self._waiting, []
        for envelope in waiting:
            if envelope.publisher_id != self._publisher:
                continue  # of a run of the daemon that has ended
            if envelope.sequence > self._next:
                self._waiting.append(envelope)  # a gap once more
            elif envelope.sequence == self._next:
                self._apply(envelope)

    def _add(self, rows: Rows) -> None:
        holder = rows.worker_id, rows.dp_rank, rows.residency_domain, rows.storage_tier
        parents, tokens = np.frombuffer(rows.parents, "<u8"), np.frombuffer(rows.tokens, "<u8")
        names = [
            named(p or None, t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)
        ]
        self.held[holder].update(names)

    def _apply(self, envelope: Envelope) -> None:
        assert (envelope.topic, envelope.sequence) == ("kv-events", self._next)
        self._next += 1
        event = decode_msgpack(envelope.payload)
        worker = event.worker_id, event.event.dp_rank
        last = self._last_id.get(worker)
        assert last is None or event.event.event_id == last + 1
        self._last_id[worker] = event.event.event_id
        assert event.residency_domain is not None
        holder = *worker, event.residency_domain, event.storage_tier
        match event.event.data:
            case Stored() as stored:
                parent = stored.parent_hash
                pairs = zip(
                    stored.tokens_hashes.tolist(), stored.block_hashes.tolist(), strict=True
                )
                for tokens, name in pairs:
                    assert name == named(parent, tokens), "a name follows from its place"
                    parent = name
                    self.held[holder].add(name)
            case Removed(names):
                self.held[holder].difference_update(names.tolist())
            case Cleared():
                for other in list(self.held):
                    if other[:2] == worker:
                        del self.held[other]


def named(parent: int | None, tokens: int) -> int:
    if parent is None:
        return tokens
    return int(sequence_hashes(np.array([parent, tokens], np.uint64))[1])
