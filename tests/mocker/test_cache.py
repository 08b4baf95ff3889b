"""The block pool against a model that a reader can check."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mocker.cache import BlockPool

BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Sequences over a few prompts take what is cached, allocate the rest, register, release.

    The model: a list of free contents, oldest first, and the sets of blocks in use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.free: list[int | None] = [None] * BLOCKS  # contents in the order they would go
        self.used: list[list[int]] = []
        self.content: dict[int, int | None] = {}  # of blocks in use, as registered

    def cached(self, content: int) -> bool:
        return content in self.free or content in self.content.values()

    @rule(prompt=st.integers(0, 3), length=st.integers(1, 6), tail=st.booleans())
    def begin(self, prompt: int, length: int, tail: bool) -> None:
        """What prompt 2n and 2n + 1 have in common is their first two blocks."""
        hashes = [(prompt // 2 if i < 2 else prompt) * 10 + i for i in range(length)]
        hits = self.pool.match(hashes, length)
        expected = 0
        while expected < length and self.cached(hashes[expected]):
            expected += 1
        assert len(hits) == expected
        need = length - len(hits) + tail
        leaving = self.pool.free_among(hits)
        assert leaving == sum(content in self.free for content in hashes[:expected])
        if need > self.pool.free_count - leaving:
            return
        self.pool.take(hits)
        for content in hashes[:expected]:
            if content in self.free:
                self.free.remove(content)
        new, evicted = self.pool.allocate(need)
        gone, self.free = self.free[:need], self.free[need:]
        assert evicted == [content for content in gone if content is not None]
        for block, content in zip(hits, hashes, strict=False):
            self.content[block] = content
        for block, content in zip(new, hashes[expected:], strict=False):
            self.content[block] = None
            known = self.cached(content)
            assert self.pool.register(block, content) is not known
            self.content[block] = None if known else content
        if tail:  # a partial block: nobody can ever find it
            self.content[new[-1]] = None
        self.used.append([*hits, *new])

    @precondition(lambda self: self.used)
    @rule(which=st.integers(0, 100))
    def end(self, which: int) -> None:
        blocks = self.used.pop(which % len(self.used))
        self.pool.release(blocks)
        still = {block for other in self.used for block in other}
        for block in reversed(blocks):
            if block not in still:
                self.free.append(self.content.pop(block))

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free_count == len(self.free)
        assert self.pool.used_count == len({b for blocks in self.used for b in blocks})


TestPoolMachine = PoolMachine.TestCase


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    blocks, _ = pool.allocate(3)
    for block, content in zip(blocks, (1, 2, 3), strict=True):
        pool.register(block, content)
    pool.release(blocks)
    assert pool.allocate(2)[1] == [3, 2]
    assert pool.match([1, 2, 3], 3) == blocks[:1]


def test_releasing_a_block_twice_is_a_programmer_error() -> None:
    pool = BlockPool(2)
    blocks, _ = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


def test_more_than_is_free_cannot_be_allocated() -> None:
    with pytest.raises(AssertionError):
        BlockPool(2).allocate(3)
