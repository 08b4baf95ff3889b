"""What each worker is busy with, as far as routers know: the sequences that were sent to it.

Kept from the routers' own decisions rather than from the workers' reports, which come late. Blocks
of prompts that running sequences of one worker share count once, as they do in its memory. It
writes the load columns of `Workers`, and nobody else does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from router.index import WorkerId
from router.workers import Workers

SEQUENCES_MAX: Final = 1 << 17


@dataclass(slots=True)
class Active:
    """One running sequence."""

    row: int
    prompt: Sequence[int]  # sequence hashes of whole blocks
    blocks: int  # beyond those of `prompt`: the last one begun, and the output's
    prefill_tokens: float  # 0 once its first token has come
    prefill_s: float


class ActiveSequences:
    """One thread calls it. A request's id is unique among all routers; who makes it sees to that.

    Calls that name an unknown request do nothing and say so: it may have ended with its worker.
    """

    def __init__(self, workers: Workers, limit: int = SEQUENCES_MAX) -> None:
        self._workers = workers
        self._limit = limit
        self._active: dict[str, Active] = {}
        self._held: dict[int, Counter[int]] = {}  # row -> sequences that hold each prompt block
        self._queues: dict[int, dict[str, float]] = {}  # row -> prompts not computed, in order

    def __len__(self) -> int:
        return len(self._active)

    def __contains__(self, request: str) -> bool:
        return request in self._active

    def begin(self, request: str, sequence: Active) -> bool:
        """False if there is such a request already, or there are too many."""
        if request in self._active or len(self._active) >= self._limit:
            return False
        self._active[request] = sequence
        held = self._held.setdefault(sequence.row, Counter())
        before = len(held)
        held.update(sequence.prompt)
        row, workers = sequence.row, self._workers
        workers.blocks[row] += len(held) - before + sequence.blocks
        workers.requests[row] += 1
        workers.prefill_tokens[row] += sequence.prefill_tokens
        workers.prefill_s[row] += sequence.prefill_s
        if sequence.prefill_s > 0.0:
            queue = self._queues.setdefault(row, {})
            queue[request] = sequence.prefill_s
            if len(queue) == 1:
                self._begin_head(row)
        return True

    def prefilled(self, request: str, *, timed: bool = True) -> bool:
        """Its first token has come; not `timed`: some time before."""
        sequence = self._active.get(request)
        if sequence is None:
            return False
        self._end_prefill(request, sequence)
        return True

    def grow(self, request: str, blocks: int = 1) -> bool:
        """Its output has begun this many blocks more."""
        sequence = self._active.get(request)
        if sequence is None:
            return False
        sequence.blocks += blocks
        self._workers.blocks[sequence.row] += blocks
        return True

    def end(self, request: str) -> bool:
        sequence = self._active.pop(request, None)
        if sequence is None:
            return False
        self._end_prefill(request, sequence)
        held = self._held[sequence.row]
        before = len(held)
        for block in sequence.prompt:
            if held[block] == 1:
                held.pop(block)  # `del` of a counter is written in Python, and slow
            else:
                held[block] -= 1
        self._workers.blocks[sequence.row] -= before - len(held) + sequence.blocks
        self._workers.requests[sequence.row] -= 1
        if not self._workers.requests[sequence.row]:
            self._rest(sequence.row)
        return True

    def worker_added(self, worker: WorkerId) -> None:
        """Nothing has waited for it."""

    def worker_removed(self, row: int) -> list[str]:
        """The worker is gone, and with it these requests."""
        ended = [name for name, sequence in self._active.items() if sequence.row == row]
        for name in ended:
            del self._active[name]
        self._rest(row)
        return ended

    def items(self) -> Iterator[tuple[str, Active]]:
        return iter(self._active.items())

    def check_integrity(self) -> None:
        workers = self._workers
        for row in range(workers.rows):
            mine = [sequence for sequence in self._active.values() if sequence.row == row]
            distinct = {block for sequence in mine for block in sequence.prompt}
            assert set(self._held.get(row, ())) == distinct
            assert workers.requests[row] == len(mine)
            assert workers.blocks[row] == len(distinct) + sum(one.blocks for one in mine)
            assert abs(workers.prefill_tokens[row] - sum(one.prefill_tokens for one in mine)) < 1e-6
            assert abs(workers.prefill_s[row] - sum(one.prefill_s for one in mine)) < 1e-6
            queue = self._queues.get(row, {})
            assert sorted(queue.values()) == sorted(one.prefill_s for one in mine if one.prefill_s)
            assert workers.head_s[row] == next(iter(queue.values()), 0.0)

    def _end_prefill(self, request: str, sequence: Active) -> None:
        row = sequence.row
        self._workers.prefill_tokens[row] -= sequence.prefill_tokens
        self._workers.prefill_s[row] -= sequence.prefill_s
        sequence.prefill_tokens = sequence.prefill_s = 0.0
        queue = self._queues.get(row, {})
        if request in queue:
            was_head = next(iter(queue)) == request
            del queue[request]
            if was_head:
                self._begin_head(row)

    def _begin_head(self, row: int) -> None:
        """The worker turns to the next prompt, if there is one."""
        self._workers.head_s[row] = next(iter(self._queues[row].values()), 0.0)
        self._workers.head_since_s[row] = self._workers.clock()

    def _rest(self, row: int) -> None:
        """Nothing runs there: no rounding error of sums and differences stays behind."""
        self._held.pop(row, None)
        self._queues.pop(row, None)
        workers = self._workers
        workers.prefill_tokens[row] = workers.prefill_s[row] = workers.head_s[row] = 0.0
        workers.blocks[row] = workers.requests[row] = 0.0
