"""Two nodes and the bytes between them: what is known, claimed, moved, verified and given up."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from kvbm.note import Note
from kvbm.peers import contents as contents_module
from kvbm.peers import link as link_module
from kvbm.peers import loans as loans_module
from kvbm.peers import wire
from kvbm.peers.link import PeerLink
from kvbm.protocol import encode
from runtime.events.memory import MemoryPlane
from storage_tiers.base import (
    Corrupt,
    Failed,
    Key,
    Loaded,
    Missing,
    StoreItem,
    Tier,
    TierListener,
    TierName,
)
from storage_tiers.peer import PeerTier
from storage_tiers.testing import ReadOnlyConformance, RecordingListener, make_items
from tests.kvbm.builders import until
from tests.kvbm.peer_nodes import PeerNode

MIB = 1 << 20
START_S = 60.0
"""NIXL's import reads much from a disk that may be busy."""


class TestPeerTier(ReadOnlyConformance):
    """The tier over TCP: buffers anywhere in memory."""

    def make(self, listener: TierListener) -> Tier:
        network = self._reader.network
        return PeerTier(network.links, listener, deadline_s=5.0, mover=lambda: "tcp")

    async def put(self, tier: Tier, items: Sequence[StoreItem]) -> None:
        self._owner.commit(items)
        await until(lambda: self._reader.knows(items))

    async def corrupt(self, tier: Tier, key: Key) -> None:
        flip(self._owner, key)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[tuple[Tier, RecordingListener]]:
        async with pair() as (self._owner, self._reader), super().opened() as opened:
            yield opened


@asynccontextmanager
async def pair(
    *, mover: str = "plain", deadline: float = 5.0, dram_bytes: int = 64 * MIB
) -> AsyncIterator[tuple[PeerNode, PeerNode]]:
    """An owner, and a reader that knows its address and is connected by that mover."""
    owner = PeerNode("owner", mover=mover, dram_bytes=dram_bytes)
    async with owner.running():
        reader = PeerNode(
            "reader", nodes=[owner], mover=mover, dram_bytes=dram_bytes, deadline=deadline
        )
        async with reader.running():
            expected = "tcp" if mover == "plain" else "nixl-ucx"
            await until(lambda: reader.network.status()[0].mover == expected, within_s=START_S)
            yield owner, reader


def flip(node: PeerNode, key: Key) -> None:
    record = node.dram.claim(key)
    assert record is not None
    node.dram.view(node.dram.slot(record))[0] ^= 1
    node.dram.unclaim(record)


def ucx_of(node: PeerNode) -> int:
    assert node.network._ucx is not None and node.network._ucx.pid is not None
    return node.network._ucx.pid


def kinds(outcomes: Sequence[object]) -> set[type]:
    return {type(outcome) for outcome in outcomes}


# -- what is known ------------------------------------------------------------------------


async def test_a_reader_comes_to_know_exactly_what_the_owner_holds() -> None:
    source = random.Random(11)
    items = make_items("churn", 120, 4096, chained=False)
    owner = PeerNode("owner")
    owner.commit(items[:40])  # before anybody is connected
    async with owner.running():
        reader = PeerNode("reader", nodes=[owner])
        async with reader.running():
            for round_ in range(60):
                item = source.choice(items)
                if item.chunk.key in owner.dram:
                    await owner.dram.remove([item.chunk.key])
                else:
                    owner.commit([item])
                if round_ % 7 == 0:
                    await asyncio.sleep(0)
            [link] = reader.network.links()
            there = dict.fromkeys(owner.dram.all_keys(), 4096)
            await until(lambda: link.lengths == there)
            assert link.used_bytes == 4096 * len(there)
            assert reader.network.tier.usage().chunks == len(there)
            assert reader.events.announced == []  # the owner announces what is its own


async def test_a_chunk_brings_its_note_unless_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    note = Note(7, None, np.arange(4, dtype=np.uint64)).encode()
    monkeypatch.setattr(loans_module, "NOTE_BYTES_PER_CLAIM_MAX", 2 * len(note) + 1)
    items = [
        replace(item, chunk=replace(item.chunk, note=note)) for item in make_items("noted", 3, 4096)
    ]
    async with pair() as (owner, reader):
        owner.commit(items)
        await until(lambda: reader.knows(items))
        outcomes, _ = await reader.load(items)
        notes = [outcome.chunk.note for outcome in outcomes if isinstance(outcome, Loaded)]
        assert notes == [note, note, b""]


async def test_a_reader_too_slow_to_follow_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "CHANGES_MAX", 8)
    items = make_items("many", 64, 4096, chained=False)
    async with pair() as (owner, reader):
        owner.commit(items)  # at once: more than may wait to be told
        await until(lambda: owner.meter.errors["peer_connection", "too_slow"] == 1)
        await until(lambda: reader.knows(items))


async def test_what_a_peer_holds_is_forgotten_with_its_connection() -> None:
    items = make_items("gone", 3, 4096)
    owner = PeerNode("owner")
    async with owner.running():
        reader = PeerNode("reader", nodes=[owner])
        owner.commit(items)
        async with reader.running():
            await until(lambda: reader.knows(items))
            [reading] = owner.network.owner._readers.values()
            reading.writer.transport.abort()
            await until(lambda: not reader.network.links()[0].lengths)
            assert kinds((await reader.load(items))[0]) == {Missing}
            await until(lambda: reader.knows(items))  # and it connects again


# -- who is a peer ------------------------------------------------------------------------


async def test_nodes_find_each_other_on_the_event_plane() -> None:
    plane = MemoryPlane()
    items = make_items("found", 3, 4096)
    first, second = PeerNode("first", plane=plane), PeerNode("second", plane=plane)
    async with first.running(), second.running():
        first.commit(items)
        await until(lambda: second.knows(items), within_s=START_S)
        outcomes, found = await second.load(items)
        assert kinds(outcomes) == {Loaded}
        assert found == [bytes(item.data) for item in items]
        assert [s.found_by for s in second.network.status()] == ["events"]


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x94\xa1\xff\xc4\x01i\xa1h\x01", b"\x91" * 4096], ids=len
)
async def test_announcements_that_are_none_are_counted(payload: bytes) -> None:
    plane = MemoryPlane()
    node = PeerNode("node", plane=plane)
    async with node.running():
        await until(lambda: plane._subscriptions)
        plane.publish("kvbm.test.other.peer", payload)
        await until(lambda: node.meter.errors["peer_announcement", "malformed"] == 1)


async def test_its_own_address_in_the_list_is_no_peer() -> None:
    node = PeerNode("node")
    async with node.running():
        link = node.network._add(("127.0.0.1", node.port), heard_at=None).link
        running = asyncio.ensure_future(link.run())
        await until(lambda: link.is_redundant)
        running.cancel()
        assert node.network.owner.readers == []


async def test_without_the_token_nothing_is_told_or_believed() -> None:
    owner = PeerNode("owner", token="the right token")
    async with owner.running():
        owner.commit(make_items("secret", 1, 4096))
        reader = PeerNode("reader", nodes=[owner], token="another token")
        async with reader.running():
            await until(lambda: "token" in reader.network.status()[0].problem)
            assert reader.network.tier.usage().chunks == 0
        assert owner.meter.errors["peer_connection", "refused"] >= 1


async def test_an_owner_that_does_not_know_the_token_is_not_believed() -> None:
    """It lets everybody in; its bytes could be anything."""

    async def pretend(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(wire.Challenge(wire.VERSION, b"o" * 16, wire.new_nonce())))
        await stream.read(1)
        writer.write(encode(wire.Welcome("owner", b"o" * 16, b"s" * 16, MIB, b"guess")))
        writer.write(encode(wire.Have(b"k" * 16, (4096).to_bytes(8, "little"))))
        await stream.read(-1)
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader = PeerNode("reader", token="the right token")
    async with reader.running():
        link = reader.network._add(("127.0.0.1", port), heard_at=None).link
        running = asyncio.ensure_future(link.run())
        await until(lambda: "token" in link.problem)
        assert not link.lengths
        running.cancel()
    server.close()


# -- claims -------------------------------------------------------------------------------


async def test_a_claimed_chunk_is_not_evicted_until_it_is_released() -> None:
    async with pair(dram_bytes=16 * MIB) as (owner, reader):
        items = make_items("held", 2, MIB)
        owner.commit(items)
        await until(lambda: reader.knows(items))
        [link] = reader.network.links()
        claimed = await claim(link, 7, items, hold_s=30.0)
        assert [lent.length for lent in claimed.lent] == [MIB, MIB]
        await owner.dram.store(make_items("others", 40, MIB, chained=False))
        assert all(item.chunk.key in owner.dram for item in items)
        link._say(wire.Release(7))
        await until(lambda: owner.dram.claims == 0)
        await owner.dram.store(make_items("more", 40, MIB, chained=False))
        assert not any(item.chunk.key in owner.dram for item in items)


async def test_a_claim_ends_with_its_time() -> None:
    async with pair() as (owner, reader):
        items = make_items("short", 2, 4096)
        owner.commit(items)
        await until(lambda: reader.knows(items))
        await claim(reader.network.links()[0], 7, items, hold_s=0.05)
        await until(lambda: owner.dram.claims == 0)
        assert owner.meter.errors["peer_loan", "expired"] == 1


async def test_claims_end_with_the_readers_connection() -> None:
    async with pair() as (owner, reader):
        items = make_items("left", 4, 4096)
        owner.commit(items)
        await until(lambda: reader.knows(items))
        [link] = reader.network.links()
        await claim(link, 7, items, hold_s=30.0)
        assert owner.dram.claims == 4
        link._drop("for the test")
        await until(lambda: owner.dram.claims == 0)


async def test_peers_may_hold_only_a_part_of_host_memory() -> None:
    async with pair(dram_bytes=16 * MIB) as (owner, reader):
        items = make_items("greedy", 8, MIB)  # half of the owner's memory
        owner.commit(items)
        await until(lambda: reader.knows(items))
        claimed = await claim(reader.network.links()[0], 7, items, hold_s=30.0)
        assert len(claimed.lent) == 4 and len(claimed.busy) == 4
        outcomes, _ = await reader.load(items[:1])
        assert kinds(outcomes) == {Failed}
        assert reader.knows(items)  # it is there, only not now
        assert owner.meter.drops["peer_loans", "full"] == 5


async def claim(
    link: PeerLink, number: int, items: Sequence[StoreItem], hold_s: float
) -> wire.Claimed:
    """Claim, and go on holding."""
    future: asyncio.Future[wire.Claimed | None] = asyncio.get_running_loop().create_future()
    link._claims[number] = future
    assert link._say(wire.Claim(number, b"".join(i.chunk.key for i in items), hold_s, False))
    claimed = await asyncio.wait_for(future, START_S)
    del link._claims[number]
    assert claimed is not None
    return claimed


async def test_a_chunk_whose_checksum_is_not_known_yet_gets_one_when_it_is_claimed() -> None:
    async with pair() as (owner, reader):
        items = make_items("fresh", 3, 4096)
        for item in items:
            slot = owner.dram.reserve(4096)
            assert slot is not None
            owner.dram.view(slot)[:] = item.data
            chunk = item.chunk
            owner.dram.commit(slot, type(chunk)(chunk.key, 4096, 0, chunk.parent, chunk.position))
        owner.dram.touch([item.chunk.key for item in reversed(items)])
        owner.contents.stored(TierName.DRAM, [item.chunk.key for item in items])
        await until(lambda: reader.knows(items))
        outcomes, _ = await reader.load(items)
        assert outcomes == [Loaded(item.chunk) for item in items]


# -- damage -------------------------------------------------------------------------------


async def test_bytes_damaged_at_the_owner_are_found_at_the_reader_and_by_the_owner() -> None:
    async with pair() as (owner, reader):
        items = make_items("flipped", 3, 4096)
        owner.commit(items)
        await until(lambda: reader.knows(items))
        flip(owner, items[1].chunk.key)
        outcomes, _ = await reader.load(items)
        assert [type(o) for o in outcomes] == [Loaded, Corrupt, Loaded]
        assert reader.listener.corrupt == [(TierName.PEER, items[1].chunk.key)]
        assert reader.network.tier.usage().corrupt_total == 1
        await until(lambda: owner.listener.corrupt == [(TierName.DRAM, items[1].chunk.key)])
        assert owner.meter.errors["peer_loan", "damaged"] == 1
        assert not reader.knows(items[1:2])


async def test_another_peer_that_has_the_chunk_is_asked_next() -> None:
    items = make_items("twice", 4, 4096)
    first, second = PeerNode("first"), PeerNode("second")
    async with first.running(), second.running():
        first.commit(items)
        second.commit(items)
        reader = PeerNode("reader", nodes=[first, second])
        async with reader.running():
            await until(lambda: all(len(link.lengths) == 4 for link in reader.network.links()))
            flip(first, items[0].chunk.key)
            await first.dram.remove([items[3].chunk.key])
            flip(second, items[2].chunk.key)
            outcomes, found = await reader.load(items)
            assert outcomes == [Loaded(item.chunk) for item in items]
            assert found == [bytes(item.data) for item in items]


# -- NIXL ---------------------------------------------------------------------------------


async def test_chunks_come_over_ucx_into_the_arena() -> None:
    async with pair(mover="auto") as (owner, reader):
        items = [*make_items("a", 8, MIB // 2), *make_items("odd", 3, 70_001)]
        owner.commit(items)
        await until(lambda: reader.knows(items))
        reader.network.links()[0]._data = None  # no other way
        outcomes, found = await reader.load(items)
        assert outcomes == [Loaded(item.chunk) for item in items]
        assert found == [bytes(item.data) for item in items]
        assert reader.network.tier.usage().mover == "nixl-ucx"
        flip(owner, items[0].chunk.key)
        assert kinds((await reader.load(items[:1]))[0]) == {Corrupt}


async def test_a_reader_whose_ucx_process_dies_reads_by_tcp_until_another_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "NIXL_PAUSE_S", 0.1)
    async with pair(mover="auto") as (owner, reader):
        items = make_items("killed", 8, MIB)
        owner.commit(items)
        await until(lambda: reader.knows(items))
        first = ucx_of(reader)
        os.kill(first, signal.SIGSTOP)  # the read is under way when it dies
        loading = asyncio.ensure_future(reader.load(items))
        await until(lambda: reader.network._ucx is not None and reader.network._ucx._reads)
        os.kill(first, signal.SIGKILL)
        outcomes, found = await loading
        assert outcomes == [Loaded(item.chunk) for item in items]
        assert found == [bytes(item.data) for item in items]
        assert reader.meter.errors["load_peer", "nixl"] == 1
        assert reader.meter.errors["peer_ucx", "ended"] == 1
        await until(lambda: reader.network.status()[0].mover == "nixl-ucx", within_s=START_S)
        assert ucx_of(reader) != first


async def test_an_owner_whose_ucx_process_hangs_costs_the_reader_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is written to the slots once the load has ended, though the owner wakes up."""
    monkeypatch.setenv("UCX_TLS", "tcp")  # else the owner's memory is read without its doing
    async with pair(mover="auto", deadline=3.0) as (owner, reader):
        items = make_items("hung", 8, MIB)
        owner.commit(items)
        await until(lambda: reader.knows(items))
        assert kinds((await reader.load(items[:1]))[0]) == {Loaded}
        os.kill(ucx_of(owner), signal.SIGSTOP)
        try:
            outcomes, _ = await reader.load(items)
            assert kinds(outcomes) == {Failed}
            assert reader.network._ucx is not None and reader.network._ucx.kills == 1
            assert reader.meter.errors["load_peer", "deadline"] == 1
            marker = bytes([0x5A]) * (reader.arena.capacity_bytes)
            reader.arena.data[:] = marker
        finally:
            os.kill(ucx_of(owner), signal.SIGCONT)
        await until(lambda: reader.knows(items))
        assert reader.arena.data == marker
        await until(lambda: owner.dram.claims == 0)
        await until(lambda: reader.network.status()[0].mover == "nixl-ucx", within_s=START_S)
        assert kinds((await reader.load(items))[0]) == {Loaded}


async def test_an_owner_whose_ucx_process_dies_is_read_by_tcp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with pair(mover="auto", deadline=20.0) as (owner, reader):
        items = make_items("dies", 8, MIB)
        owner.commit(items)
        await until(lambda: reader.knows(items))
        assert kinds((await reader.load(items[:1]))[0]) == {Loaded}
        os.kill(ucx_of(owner), signal.SIGSTOP)
        loading = asyncio.ensure_future(reader.load(items))
        await until(lambda: reader.network._ucx is not None and reader.network._ucx._reads)
        os.kill(ucx_of(owner), signal.SIGKILL)
        outcomes, found = await loading
        assert outcomes == [Loaded(item.chunk) for item in items]
        assert found == [bytes(item.data) for item in items]
