"""What workers probably hold, from where requests were sent: for engines that publish no events.

A prompt that was sent to a worker is taken to be there for `ttl_s` after it was last sent there.
The same, beside real events and with a short time, is prediction: a second request with the same
prompt finds the worker of the first before that worker has said a word.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from router.index import Hashes, Index, Matches, Tier, WorkerId

TTL_S: Final = 120.0  # the reference's default
BLOCKS_MAX: Final = 1 << 22
LISTED_SLACK: Final = 1 << 12


@dataclass(frozen=True, slots=True)
class _Sent:
    number: int
    ends_at: float
    worker: WorkerId
    blocks: Hashes


class RouteMemory:
    """Writes an index that nothing else writes. One thread calls it.

    Bounded by `blocks_max` residencies of a block on a worker: the oldest go before their time.
    """

    def __init__(
        self,
        index: Index,
        *,
        ttl_s: float = TTL_S,
        blocks_max: int = BLOCKS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert ttl_s > 0 and blocks_max > 0
        self._index = index
        self._ttl_s = ttl_s
        self._blocks_max = blocks_max
        self._clock = clock
        self._sent: deque[_Sent] = deque()
        self._latest: dict[WorkerId, dict[int, int]] = {}  # worker -> block -> who sent it last
        self._numbers = itertools.count()
        self._listed = 0  # blocks in `_sent`, those counted that were sent again later
        self._blocks = 0
        self.pruned_total = 0  # residencies that ended before their time

    def __len__(self) -> int:
        """Residencies remembered."""
        return self._blocks

    def sent(self, worker: WorkerId, sequence_hashes: Hashes, tokens_hashes: Hashes) -> None:
        """A prompt of these whole blocks, from its start, was sent to the worker."""
        assert len(sequence_hashes) == len(tokens_hashes)
        now = self._clock()
        self.expire(now)
        if not len(sequence_hashes):
            return
        number = next(self._numbers)
        latest = self._latest.setdefault(worker, {})
        self._blocks -= len(latest)
        latest.update(dict.fromkeys(sequence_hashes.tolist(), number))
        self._blocks += len(latest)
        self._index.stored(worker, Tier.G1, None, sequence_hashes, tokens_hashes)
        self._sent.append(_Sent(number, now + self._ttl_s, worker, sequence_hashes))
        self._listed += len(sequence_hashes)
        if self._listed > 2 * self._blocks + LISTED_SLACK:
            self._compact()
        while self._blocks > self._blocks_max:
            before = self._blocks
            self._end(self._sent.popleft())
            self.pruned_total += before - self._blocks

    def expire(self, now: float | None = None) -> None:
        now = self._clock() if now is None else now
        while self._sent and self._sent[0].ends_at <= now:
            self._end(self._sent.popleft())

    def find(self, tokens_hashes: Hashes) -> Matches:
        self.expire()
        return self._index.find(tokens_hashes)

    def forget_worker(self, worker: WorkerId) -> None:
        """It is gone."""
        self._index.remove_worker(worker)
        self._blocks -= len(self._latest.pop(worker, ()))
        self._sent = deque(one for one in self._sent if one.worker != worker)
        self._listed = sum(len(one.blocks) for one in self._sent)

    def _end(self, sent: _Sent) -> None:
        """Of its blocks those end that were not sent there again later."""
        self._listed -= len(sent.blocks)
        latest = self._latest.get(sent.worker, {})
        over = self._own(sent)
        for block in over:
            del latest[block]
        self._blocks -= len(over)
        if over:
            self._index.removed(sent.worker, Tier.G1, np.array(over, dtype=np.uint64))

    def _own(self, sent: _Sent) -> list[int]:
        latest = self._latest.get(sent.worker, {})
        return [block for block in sent.blocks.tolist() if latest.get(block) == sent.number]

    def _compact(self) -> None:
        """A prompt that is sent all the time must not be listed once for each time."""
        kept = ((one, np.array(self._own(one), dtype=np.uint64)) for one in self._sent)
        self._sent = deque(replace(one, blocks=blocks) for one, blocks in kept if len(blocks))
        self._listed = sum(len(one.blocks) for one in self._sent)
