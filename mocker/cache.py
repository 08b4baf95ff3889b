"""G1 of a mock engine: a fixed number of blocks, some in use, some free but still of use.

A block is used by so many sequences (`take`, `allocate`), and free when by none. A free block that
was registered keeps its hash until it is needed for something else: the least recently freed goes
first, and of one sequence the last block before those it follows. Only whole blocks are
registered, so a sequence's partial last block is never shared. A second block of the same content
is not registered: it serves its own sequence only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self.capacity = capacity
        self._users = [0] * capacity
        self._hashes: list[int | None] = [None] * capacity
        self._registered: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(capacity))

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def used_count(self) -> int:
        return self.capacity - len(self._free)

    @property
    def hashes(self) -> Iterable[int]:
        """Of all blocks that are registered."""
        return self._registered

    def match(self, hashes: Sequence[int], limit: int) -> list[int]:
        """Blocks of the longest registered prefix, at most `limit`; changes nothing."""
        found: list[int] = []
        registered = self._registered
        for index in range(min(limit, len(hashes))):
            block = registered.get(hashes[index])
            if block is None:
                break
            found.append(block)
        return found

    def has(self, block_hash: int) -> bool:
        return block_hash in self._registered

    def free_among(self, blocks: Sequence[int]) -> int:
        """How many of these would leave the free list when taken."""
        users = self._users
        return sum(1 for block in blocks if not users[block])

    def take(self, blocks: Sequence[int]) -> None:
        """Use registered blocks, free or not."""
        users, free = self._users, self._free
        for block in blocks:
            if not users[block]:
                del free[block]
            users[block] += 1

    def allocate(self, count: int) -> tuple[list[int], list[int]]:
        """Blocks to write to, and the hashes evicted for them.

        The caller guarantees that so many are free.
        """
        assert 0 <= count <= len(self._free)
        blocks: list[int] = []
        evicted: list[int] = []
        pop, users, hashes = self._free.popitem, self._users, self._hashes
        for _ in range(count):
            block, _ = pop(last=False)
            users[block] = 1
            was = hashes[block]
            if was is not None:
                hashes[block] = None
                del self._registered[was]
                evicted.append(was)
            blocks.append(block)
        return blocks, evicted

    def register(self, block: int, block_hash: int) -> bool:
        """A used block is whole now; False if another block has this content already."""
        assert self._users[block] > 0
        assert self._hashes[block] is None
        if self._registered.setdefault(block_hash, block) != block:
            return False
        self._hashes[block] = block_hash
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """End one use of each; a sequence's blocks are given in its order."""
        users, free = self._users, self._free
        for block in reversed(blocks):
            users[block] -= 1
            assert users[block] >= 0, "a block was released more often than used"
            if not users[block]:
                free[block] = None

    def check_integrity(self) -> None:
        """Raises AssertionError where the tables disagree; costs a walk over all blocks."""
        assert len(self._free) <= self.capacity
        for block, users in enumerate(self._users):
            assert users >= 0
            assert (users == 0) == (block in self._free)
            block_hash = self._hashes[block]
            assert block_hash is None or self._registered[block_hash] == block
        assert len(self._registered) == sum(h is not None for h in self._hashes)
