"""Notes: what they say, what a session takes, and how they go with their chunks through a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvbm.client import Filled, SchedulerClient
from kvbm.note import BLOCKS_MAX, NOTE_BYTES_MAX, Note, NoteError, domain_of, is_note
from kvbm.note_dict import NoteDict
from kvbm.offload import LaneSettings
from kvbm.protocol import FRAME_BYTES_MAX, Commit, FrameError, encode
from kvbm.session import Sessions
from runtime.hashing import sequence_hashes
from storage_tiers.arena import Slot
from storage_tiers.base import Key, RemovalReason, StoreItem, TierName
from storage_tiers.testing import make_key
from tests.kvbm.builders import Node, RecordingEvents, chunks_of, keys_of, wanted
from tests.kvbm.members import commit_of, join_engine, make_hello

MakeNode = Callable[..., Node]


def make_note(seed: int, blocks: int = 4, parent: int | None = None) -> bytes:
    return Note(7, parent, np.arange(seed, seed + blocks, dtype=np.uint64)).encode()


def noted(items: Sequence[StoreItem]) -> list[StoreItem]:
    """The same chunks, each with a note of its own."""
    return [
        replace(item, chunk=replace(item.chunk, note=make_note(place)))
        for place, item in enumerate(items)
    ]


def notes_in(node: Node, items: Sequence[StoreItem]) -> list[bytes]:
    return [node.notes.note_of(item.chunk.key) for item in items]


def notes_on(items: Sequence[StoreItem]) -> list[bytes]:
    return [item.chunk.note for item in items]


# -- what a note says -------------------------------------------------------------------


@given(
    st.integers(0, (1 << 64) - 1),
    st.none() | st.integers(0, (1 << 64) - 1),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=40),
)
@hypothesis_settings(deadline=None)  # numba compiles at the first call
def test_a_note_is_read_as_it_was_written(
    domain: int, parent: int | None, hashes: list[int]
) -> None:
    tokens = np.array(hashes, dtype=np.uint64)
    packed = Note(domain, parent, tokens).encode()
    read = Note.decode(packed)
    assert is_note(packed) and (read.domain, read.parent) == (domain, parent)
    assert read.tokens_hashes.tolist() == hashes
    chain = read.chain.tolist()
    if parent is None:
        assert chain == sequence_hashes(tokens).tolist()
    # Two notes of one sequence go on from each other.
    tail = Note(domain, chain[0], tokens[1:])
    assert len(hashes) == 1 or tail.chain.tolist() == chain[1:]


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"n",
        make_note(0)[:-1],
        make_note(0) + b"\0",
        b"\2" + make_note(0)[1:],
        make_note(0, blocks=1)[:24],
        make_note(0)[:2] + (5).to_bytes(2, "little") + make_note(0)[4:],
        make_note(0)[:2] + (BLOCKS_MAX + 1).to_bytes(2, "little") + bytes(NOTE_BYTES_MAX),
    ],
)
def test_other_bytes_are_no_note(wrong: bytes) -> None:
    assert not is_note(wrong)
    with pytest.raises(NoteError):
        Note.decode(wrong)


def test_a_domain_is_of_one_key_space_and_tenant() -> None:
    one = domain_of(b"n" * 32, b"salt", 1)
    others = {domain_of(b"m" * 32, b"salt", 1), domain_of(b"n" * 32, b"", 1)}
    others.add(domain_of(b"n" * 32, b"salt", 2))
    assert one not in others and len(others) == 3
    assert domain_of(b"n" * 32, b"salt", 1) == one


# -- a notebook -------------------------------------------------------------------------


def test_a_notebook_forgets_what_is_in_no_tier_any_more() -> None:
    book = NoteDict(RecordingEvents())
    one, other = make_key("one"), make_key("other")
    book.learn([one, other], [make_note(1), b"no note"])
    book.stored(TierName.DRAM, [one, other])
    book.stored(TierName.SSD, [one])
    book.removed(TierName.DRAM, [one, other])
    assert book.note_of(one) == make_note(1) and book.note_of(other) == b""
    book.removed(TierName.SSD, [one])
    assert book.note_of(one) == b"" and not len(book)


def test_a_note_that_comes_late_stays_as_long_as_its_chunk() -> None:
    book, key = NoteDict(RecordingEvents()), make_key("late")
    book.stored(TierName.S3, [key])
    book.stored(TierName.DRAM, [key])
    book.learn([key], [make_note(1)])
    book.removed(TierName.DRAM, [key])
    assert book.note_of(key) == make_note(1)
    book.removed(TierName.S3, [key])
    assert not len(book)


# -- what a session takes ---------------------------------------------------------------


def say_commit(node: Node, items: Sequence[StoreItem], notes: list[bytes]) -> None:
    engine = join_engine(Sessions(node.manager))
    slots: list[Slot] = engine.lease(len(items))
    engine.say(msgspec.structs.replace(commit_of(slots, items), notes=notes))


async def test_a_commit_brings_notes_before_its_chunks_are_announced(node: Node) -> None:
    items = noted(chunks_of("a", 3))
    order: list[Key] = []

    class Watching(RecordingEvents):
        def stored(self, tier: TierName, keys: Sequence[Key]) -> None:
            assert all(node.notes.note_of(key) for key in keys if key != items[1].chunk.key)
            order.extend(keys)

    node.notes._onward = Watching()
    notes = [items[0].chunk.note, b"", items[2].chunk.note]
    say_commit(node, items, notes)
    assert order == keys_of(items)
    assert notes_in(node, items) == notes


async def test_an_engine_without_notes_may_leave_them_out(node: Node) -> None:
    items = chunks_of("a", 2)
    say_commit(node, items, [])
    assert notes_in(node, items) == [b"", b""] and not len(node.notes)
    assert all(key in node.dram for key in keys_of(items))


@pytest.mark.parametrize(
    "notes",
    [
        [make_note(0)],
        [make_note(0)] * 3,
        [make_note(0), b"no note"],
        [make_note(0), make_note(0)[:-8]],
        [b"", bytes(NOTE_BYTES_MAX + 8)],
    ],
)
async def test_bad_notes_are_a_breach_of_the_protocol(node: Node, notes: list[bytes]) -> None:
    items = chunks_of("a", 2)
    with pytest.raises(FrameError, match="notes"):
        say_commit(node, items, notes)
    assert not len(node.dram) and not len(node.notes)


def test_a_commit_with_the_longest_notes_fits_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SchedulerClient("nowhere", lambda: make_hello("scheduler"), [1])
    sent: list[Commit] = []
    monkeypatch.setattr(client, "_send", sent.append)
    longest = make_note(0, blocks=BLOCKS_MAX)
    assert len(longest) == NOTE_BYTES_MAX
    keys = [make_key(number) for number in range(600)]
    client.commit([Filled(key, None, 0, Slot(4096, 4096, 1), longest) for key in keys])
    assert b"".join(message.keys for message in sent) == b"".join(keys)
    for message in sent:
        assert len(message.notes) * len(keys[0]) == len(message.keys)
        assert len(encode(message)) < FRAME_BYTES_MAX
    sent.clear()
    client.commit([Filled(keys[0], None, 0, Slot(4096, 4096, 1))])
    assert sent[0].notes == [], "nothing is sent for nothing"
    client.close()


# -- down and up ------------------------------------------------------------------------


async def test_notes_go_down_with_their_chunks_and_come_up_again(node: Node) -> None:
    items = noted(chunks_of("a", 4))
    async with node.running():
        node.commit(items)
        await node.settle()
        for memory in node.memories:
            assert [memory.notes[key] for key in keys_of(items)] == notes_on(items)
        # As after a restart with what is below, and no catalogue that told of it.
        await node.dram.remove(keys_of(items))
        for memory in node.memories:
            node.notes.removed(memory.name, keys_of(items))
        assert not len(node.notes)
        asked = node.match(wanted(items))
        await node.settle()
        assert sorted(asked.landed) == [0, 1, 2, 3]
        assert notes_in(node, items) == notes_on(items)
        node.manager.close(asked.ticket)


async def test_a_chunk_that_is_read_again_below_keeps_its_note(make_node: MakeNode) -> None:
    node = make_node(settings=LaneSettings(batch_chunks=1))
    items = noted(chunks_of("a", 3))
    ssd, s3 = node.memories
    await ssd.store(items)  # evicted from host memory before its turn came
    for item in items:
        node.manager.offloader._offer_to(1, item.chunk)
    async with node.running():
        await node.settle()
    assert [s3.notes[key] for key in keys_of(items)] == notes_on(items)
    assert notes_in(node, items) == notes_on(items)


async def test_a_refused_chunk_leaves_no_note_behind(make_node: MakeNode) -> None:
    node = make_node()
    items = noted(chunks_of("a", 2))
    slots = node.manager.lease(items[0].chunk.length, 2)
    filled = node.fill(slots, items)
    node.dram.refusal = lambda chunk: "quota" if chunk.key == items[1].chunk.key else None  # type: ignore[method-assign]
    node.manager.commit(filled)
    assert notes_in(node, items) == [items[0].chunk.note, b""]


async def test_what_a_tier_finds_by_itself_is_learnt(node: Node) -> None:
    keys = [make_key("a"), make_key("b")]
    listener = node.memories[1]._listener
    listener.appeared(TierName.S3, keys, [make_note(1), b""])
    listener.noted(TierName.S3, keys[1:], [make_note(2)])
    assert [node.notes.note_of(key) for key in keys] == [make_note(1), make_note(2)]
    listener.removed(TierName.S3, keys, RemovalReason.AGE)
    assert not len(node.notes)
