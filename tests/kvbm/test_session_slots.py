"""Sessions: slots that an engine leases, commits and gives back, and those it may not."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from kvbm.client import SchedulerClient
from kvbm.protocol import (
    VERSION,
    FrameError,
    FromClient,
    GiveBack,
    Lease,
    Leased,
    Ready,
    Share,
    Welcome,
    unpack_slots,
)
from kvbm.session import Sessions
from storage_tiers.arena import Slot
from storage_tiers.base import KEY_BYTES
from tests.kvbm.builders import CHUNK_BYTES, Node, chunks_of, keys_of
from tests.kvbm.members import Engine, commit_of, join_engine, pack, said

MakeNode = Callable[..., Node]
ITEMS = chunks_of("a", 3)


@pytest.fixture
def engine(node: Node) -> Engine:
    return join_engine(Sessions(node.manager))


async def test_a_committed_slot_becomes_a_chunk_with_its_parent(engine: Engine, node: Node) -> None:
    slots = engine.lease(3)
    for slot, item in zip(slots, ITEMS, strict=True):
        node.dram.view(slot)[:] = item.data
    engine.commit(slots, ITEMS)
    assert len(engine.session._leased) == engine.session.leased_bytes == 0
    async with node.running():
        await node.settle()
    assert node.dram.find(keys_of(ITEMS)) == [item.chunk for item in ITEMS]


def test_slots_given_back_can_be_leased_again(make_node: MakeNode) -> None:
    node = make_node(lease_bytes_max=4 * CHUNK_BYTES)
    engine = join_engine(Sessions(node.manager))
    slots = engine.lease(10)
    assert len(slots) == 4
    assert said(engine.scheduler, Leased)[-1].asked == 10
    assert engine.lease(1) == []
    assert engine.session.leased_bytes == 4 * CHUNK_BYTES
    engine.say(GiveBack(pack(slots[:3])))
    assert len(engine.session._leased) == 1
    assert len(engine.lease(10)) == 3


def test_engines_share_what_may_be_leased_evenly(make_node: MakeNode) -> None:
    node = make_node(lease_bytes_max=8 * CHUNK_BYTES)
    sessions = Sessions(node.manager)
    one = join_engine(sessions, "one")
    assert said(one.scheduler, Share) == [Share(8 * CHUNK_BYTES)]
    assert len(one.lease(100)) == 8
    other = join_engine(sessions, "other")
    assert (
        said(one.scheduler, Share)[1:] == said(other.scheduler, Share) == [Share(4 * CHUNK_BYTES)]
    )
    assert other.lease(1) == [], "the first engine has not given anything back yet"
    [slots] = [unpack_slots(told.slots) for told in said(one.scheduler, Leased)]
    one.say(GiveBack(pack([slot for _, _, slot in slots[:5]])))
    assert len(other.lease(100)) == 4, "no more than its share"
    assert len(one.lease(100)) == 1
    sessions.leave(other.scheduler)
    assert said(one.scheduler, Share)[-1] == Share(8 * CHUNK_BYTES)


def foreign_slots(engine: Engine) -> dict[str, list[Slot]]:
    """Lists of slots with one in each that is not in the engine's lease."""
    own, *rest = engine.lease(3)
    stranger = join_engine(engine.sessions, "stranger")
    [foreign] = stranger.lease(1)
    return {
        "another engine's": [own, foreign],
        "another generation": [own, rest[0]._replace(generation=rest[0].generation + 1)],
        "another length": [own, rest[0]._replace(length=rest[0].length - 1)],
        "inside a slot": [own, rest[0]._replace(offset=rest[0].offset + 4096)],
        "twice": [own, own],
        "out of the arena": [own, Slot(1 << 60, CHUNK_BYTES, 1)],
    }


WRONG = [
    "another engine's",
    "another generation",
    "another length",
    "inside a slot",
    "twice",
    "out of the arena",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_slots_that_are_not_leased_are_neither_committed_nor_given_back(
    engine: Engine, node: Node, wrong: str
) -> None:
    slots = foreign_slots(engine)[wrong]
    before = node.dram.leased_bytes
    for message in (commit_of(slots, ITEMS[:2]), GiveBack(pack(slots))):
        with pytest.raises(FrameError, match="not in this engine's lease"):
            engine.say(message)
        assert node.dram.leased_bytes == before
        assert len(engine.session._leased) == 3, "the good slot stays leased"
    assert not any(node.dram.find(keys_of(ITEMS)))


def test_a_committed_slot_is_not_in_the_lease_any_more(engine: Engine, node: Node) -> None:
    slots = engine.lease(1)
    engine.commit(slots, ITEMS[:1])
    for message in (commit_of(slots, ITEMS[1:2]), GiveBack(pack(slots))):
        with pytest.raises(FrameError, match="not in this engine's lease"):
            engine.say(message)
    assert node.dram.find(keys_of(ITEMS[:1])) != [None]


@pytest.mark.parametrize(
    "change",
    [
        {"keys": bytes(KEY_BYTES)},
        {"parents": bytes(3 * KEY_BYTES)},
        {"positions": [0]},
        {"slots": b""},
        {"keys": bytes(KEY_BYTES), "parents": bytes(KEY_BYTES), "positions": [0]},
        {"keys": bytes(48), "parents": bytes(48), "positions": [0, 1, 2]},
        {"keys": bytes(31)},
        {"slots": bytes(30)},
    ],
)
def test_a_commit_whose_lists_differ_is_refused_and_loses_no_slot(
    engine: Engine, node: Node, change: dict[str, object]
) -> None:
    message = commit_of(engine.lease(2), ITEMS[:2])
    with pytest.raises(FrameError):
        engine.say(msgspec.structs.replace(message, **change))
    for member in (engine.scheduler, *engine.workers):
        engine.sessions.leave(member)
    assert node.dram.leased_bytes == 0, "slots of the refused commit are lost"


@pytest.mark.parametrize("position", [-1, 1 << 32, (1 << 64) - 1])
def test_a_position_that_no_tier_can_write_down_is_refused(engine: Engine, position: int) -> None:
    """SSD and S3 keep positions in 32 bits; others fail the whole batch that such a chunk is in."""
    message = commit_of(engine.lease(1), ITEMS[:1])
    with pytest.raises(FrameError):
        engine.say(msgspec.structs.replace(message, positions=[position]))


def test_slots_that_arrive_after_the_share_shrank_are_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The link's thread hears of the share at once, the client of the slots when it pumps."""
    client = SchedulerClient("nowhere", lambda: pytest.fail("not started"), [4])
    sent: list[FromClient] = []

    def send(message: FromClient) -> bool:
        sent.append(message)
        return True

    monkeypatch.setattr(client, "_send", send)
    inbox = client._inbox
    inbox.connected(1, Welcome(VERSION, b"", 1), None)
    inbox.received(Share(8 * CHUNK_BYTES))
    inbox.received(Ready([[0]], [CHUNK_BYTES]))
    client.pump()
    assert [type(message) for message in sent] == [Lease]
    slots = [Slot(number * CHUNK_BYTES, CHUNK_BYTES, 1) for number in range(4)]
    inbox.received(Leased(pack(slots), 4))
    inbox.received(Share(0))
    client.pump()
    assert client.take_slots(0, 4) == []
    returned = [message for message in sent if isinstance(message, GiveBack)]
    assert {slot for m in returned for _, _, slot in unpack_slots(m.slots)} == set(slots)
    client.close()
