"""Chunks of host memory held for one reader on another node, each for a bounded time.

A loan is a claim on its chunks: they are not evicted until the reader releases it, its time is
over, or the reader's connection ends. All readers together hold no more than a bound, so that
peers cannot keep this node's own engines from storing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from kvbm.meter import Meter
from kvbm.note import NoteBook
from kvbm.peers.wire import (
    CLAIM_S_MAX,
    KEYS_PER_CLAIM_MAX,
    NOTE_BYTES_PER_CLAIM_MAX,
    Claim,
    Claimed,
    Lent,
)
from kvbm.protocol import FrameError, split_keys
from storage_tiers.base import TierName
from storage_tiers.codec import checksum
from storage_tiers.dram import DramTier

LENT_FRACTION: Final = 0.25  # of host memory, to all readers together
LOANS_MAX: Final = 64  # of one reader


@dataclass(slots=True)
class Loan:
    by_nixl: bool
    records: list[int] = field(default_factory=list)  # claimed in host memory
    lent: list[Lent] = field(default_factory=list)
    bytes: int = 0
    timer: asyncio.TimerHandle | None = None
    users: int = 0  # sending its bytes; it is freed when they are done
    is_over: bool = False


class LoanOffice:
    """What is lent to all readers. Call from the event loop that owns `dram`."""

    def __init__(
        self, dram: DramTier, notes: NoteBook, meter: Meter, serve: Callable[[float], None]
    ) -> None:
        """`serve` is told for how long NIXL readers may read, 0 when none does any more."""
        self.dram = dram
        self.notes = notes
        self.meter = meter
        self._serve = serve
        self._by_nixl = 0
        self._bytes_max = int(LENT_FRACTION * dram.arena.capacity_bytes)
        self.lent_bytes = 0

    def has_room(self, size: int) -> bool:
        return self.lent_bytes + size <= self._bytes_max

    def begun(self, loan: Loan, hold_s: float) -> None:
        self.lent_bytes += loan.bytes
        if loan.by_nixl:
            self._by_nixl += 1
            self._serve(hold_s)

    def ended(self, loan: Loan) -> None:
        for record in loan.records:
            self.dram.unclaim(record)
        self.lent_bytes -= loan.bytes
        if loan.by_nixl:
            self._by_nixl -= 1
            if not self._by_nixl:
                self._serve(0.0)
        self.meter.transfer(TierName.DRAM.value, TierName.PEER.value, loan.bytes, 0.0)


class Borrower:
    """One reader's loans."""

    def __init__(self, office: LoanOffice) -> None:
        self._office = office
        self._loans: dict[int, Loan] = {}

    def __len__(self) -> int:
        return len(self._loans)

    async def claim(self, message: Claim) -> Claimed:
        """Raises FrameError for what no reader may ask."""
        keys = split_keys(message.keys)
        if message.number in self._loans or len(self._loans) >= LOANS_MAX:
            raise FrameError(f"claim {message.number} with {len(self._loans)} claims open")
        if len(keys) > KEYS_PER_CLAIM_MAX or not 0 < message.hold_s <= CLAIM_S_MAX:
            raise FrameError(f"a claim of {len(keys)} keys for {message.hold_s} s")
        dram, loan = self._office.dram, Loan(message.by_nixl)
        self._loans[message.number] = loan
        busy: list[int] = []
        indexes: list[int] = []
        for index, key in enumerate(keys):
            record = dram.claim(key)
            if record is None:
                continue
            length = dram.slot(record).length
            if not self._office.has_room(loan.bytes + length):
                dram.unclaim(record)
                busy.append(index)
                continue
            loan.records.append(record)
            loan.bytes += length
            indexes.append(index)
        self._office.begun(loan, message.hold_s)
        loop = asyncio.get_running_loop()
        loan.timer = loop.call_later(message.hold_s, self._expire, message.number)
        loan.users += 1  # so that the records stay ours while we wait
        try:
            await self._seal(loan.records)
            loan.lent = self._described(indexes, loan.records)
        finally:
            self.put_down(loan)
        if busy:
            self._office.meter.dropped("peer_loans", "full", len(busy))
        return Claimed(message.number, loan.lent, busy)

    def release(self, number: int) -> None:
        self._end(number)

    def use(self, number: int) -> tuple[Loan, list[memoryview]] | None:
        """The bytes of a loan, held until `put_down`; None if it is over."""
        loan = self._loans.get(number)
        if loan is None:
            return None
        loan.users += 1
        arena = self._office.dram.arena
        return loan, [arena.view(lent.offset, lent.length) for lent in loan.lent]

    def put_down(self, loan: Loan) -> None:
        loan.users -= 1
        if loan.is_over and not loan.users:
            self._office.ended(loan)

    def leave(self) -> None:
        """The reader is gone, and every loan of it is over."""
        for number in list(self._loans):
            self._end(number)

    # -- below ---------------------------------------------------------------------------

    def _described(self, indexes: Sequence[int], records: Sequence[int]) -> list[Lent]:
        dram, room = self._office.dram, NOTE_BYTES_PER_CLAIM_MAX
        lent: list[Lent] = []
        for index, record in zip(indexes, records, strict=True):
            chunk = dram.chunk(record)
            note = self._office.notes.note_of(chunk.key)
            if len(note) <= room:
                room -= len(note)
                chunk = replace(chunk, note=note)
            lent.append(Lent.of(index, dram.slot(record).offset, chunk))
        return lent

    async def _seal(self, records: Sequence[int]) -> None:
        """Checksums of what an engine committed a moment ago."""
        dram = self._office.dram
        unsealed = [record for record in records if not dram.is_sealed(record)]
        if unsealed:
            views = [dram.view(dram.slot(record)) for record in unsealed]
            digests = await asyncio.to_thread(lambda: [checksum(view) for view in views])
            for record, digest in zip(unsealed, digests, strict=True):
                dram.seal(record, digest)

    def _expire(self, number: int) -> None:
        self._office.meter.error("peer_loan", "expired")
        self._end(number)

    def _end(self, number: int) -> None:
        loan = self._loans.pop(number, None)
        if loan is None:
            return
        if loan.timer is not None:
            loan.timer.cancel()
        loan.is_over = True
        if not loan.users:
            self._office.ended(loan)
