"""Sessions: who may join an engine, what each member may say, and how an engine ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from kvbm import session as session_module
from kvbm.protocol import (
    COMING,
    GROUPS_MAX,
    HERE,
    KEYS_PER_MATCH_MAX,
    MISS,
    RANKS_MAX,
    VERSION,
    Arrived,
    Commit,
    Fence,
    Fenced,
    FrameError,
    FromClient,
    GiveBack,
    Hello,
    Lease,
    Leased,
    Loaded,
    Match,
    Matched,
    MatchGroup,
    Ready,
    Share,
    Unmatch,
    unpack_slots,
)
from kvbm.session import Refusal, Sessions
from storage_tiers.testing import store_all
from tests.kvbm.builders import CHUNK_BYTES, Node, chunks_of, keys_of
from tests.kvbm.members import Engine, Peer, commit_of, join_engine, make_hello, pack, said

MakeNode = Callable[..., Node]
ROUTING = {"worker_id": 7, "dp_rank": 0, "namespace": b"n", "block_tokens": 16, "group": 0}


@pytest.fixture
def sessions(node: Node) -> Sessions:
    return Sessions(node.manager)


@pytest.fixture
def engine(sessions: Sessions) -> Engine:
    return join_engine(sessions)


# -- joining ----------------------------------------------------------------------------


def test_what_an_engine_says_for_routers_is_taken(sessions: Sessions) -> None:
    hello = make_hello("scheduler", routing=ROUTING | {"worker_id": (1 << 64) - 1})
    assert hello.routing is not None and sessions.join(Peer(hello)).members[0].hello is hello


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (make_hello(version=VERSION + 1), f"protocol {VERSION + 1}"),
        (make_hello("router"), "unknown role 'router'"),
        (make_hello(""), "unknown role"),
        (make_hello(world_size=0), "world size 0"),
        (make_hello(world_size=-1), "world size -1"),
        (make_hello(world_size=RANKS_MAX + 1), "out of range"),
        (make_hello("scheduler", world_size=0), "world size 0"),
        (make_hello(rank=1), "rank 1"),
        (make_hello(rank=-1), "rank -1"),
        (make_hello(group_bytes=[]), "bytes per chunk"),
        (make_hello(group_bytes=[0]), "bytes per chunk"),
        (make_hello(group_bytes=[1 << 32]), "lower the connector's blocks_per_chunk"),
        (make_hello(group_bytes=[1 << 31], world_size=2), "lower the connector's blocks_per_chunk"),
        (make_hello(group_bytes=[4096, -4096]), "bytes per chunk"),
        (make_hello(group_bytes=[4096] * (GROUPS_MAX + 1)), "bytes per chunk"),
        (make_hello("scheduler", routing=ROUTING | {"worker_id": 0}), "worker id 0"),
        (make_hello("scheduler", routing=ROUTING | {"worker_id": 1 << 64}), "worker id"),
        (make_hello("scheduler", routing=ROUTING | {"dp_rank": -1}), "data-parallel rank -1"),
        (make_hello("scheduler", routing=ROUTING | {"block_tokens": 0}), "0 tokens in a block"),
        (make_hello("scheduler", routing=ROUTING | {"group": GROUPS_MAX}), "cache group"),
        (make_hello("scheduler", routing=ROUTING | {"namespace": b"n" * 65}), "namespace"),
        (make_hello("scheduler", routing=ROUTING | {"events": "tcp" * 200}), "events are heard"),
    ],
)
def test_a_member_that_fits_no_engine_is_told_why(
    sessions: Sessions, hello: Hello, reason: str
) -> None:
    with pytest.raises(Refusal, match=reason):
        sessions.join(Peer(hello))
    assert not sessions.all
    join_engine(sessions)  # the engine's name is still free


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (make_hello("scheduler", world_size=2), "scheduler connected already"),
        (make_hello("scheduler", world_size=3), "world size 3 is not its engine's 2"),
        (make_hello(rank=1, world_size=1), "world size 1"),
        (make_hello(rank=0, world_size=2), "rank 0"),
        (make_hello(rank=2, world_size=2), "rank 2"),
        (make_hello(rank=1, world_size=2, group_bytes=[4096, 4096]), "differ in number"),
    ],
)
def test_a_member_that_does_not_fit_its_engine_is_told_why(
    sessions: Sessions, hello: Hello, reason: str
) -> None:
    first = sessions.join(Peer(make_hello("scheduler", world_size=2)))
    worker = Peer(make_hello(rank=0, world_size=2))
    sessions.join(worker)
    refused = Peer(hello)
    with pytest.raises(Refusal, match=reason):
        sessions.join(refused)
    assert len(first.members) == 2
    sessions.leave(refused)  # what the socket does for every peer that goes
    assert not first.ending
    sessions.join(Peer(make_hello(rank=1, world_size=2)))
    assert first.is_ready


def test_a_stripe_too_large_to_be_true_is_refused(sessions: Sessions) -> None:
    """The sum of the stripes is told to the scheduler, so it must fit a message."""
    scheduler = Peer(make_hello("scheduler", world_size=2))
    session = sessions.join(scheduler)

    def join_workers() -> None:
        for rank in range(2):
            sessions.join(Peer(make_hello(rank=rank, world_size=2, group_bytes=[(1 << 64) - 1])))

    with pytest.raises(Refusal):
        join_workers()
    assert not session.is_ready


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_engine_is_ready_once_all_have_come_in_any_order(
    sessions: Sessions, order: tuple[int, ...]
) -> None:
    scheduler = Peer(make_hello("scheduler", world_size=2))
    peers = [scheduler, *(Peer(make_hello(rank=rank, world_size=2)) for rank in range(2))]
    for place in order:
        assert not said(scheduler, Ready)
        sessions.join(peers[place])
    [session] = sessions.all
    assert session.is_ready
    assert len(said(scheduler, Ready)) == len(said(scheduler, Share)) == 1
    assert scheduler.told.index(said(scheduler, Ready)[0]) < scheduler.told.index(
        said(scheduler, Share)[0]
    )
    assert not any(peer.told for peer in peers[1:])


@pytest.mark.parametrize(
    ("replicated", "stripes", "ready"),
    [
        (False, [[4096, 100], [4096, 100]], Ready([[0, 4096], [0, 100]], [8192, 200])),
        (False, [[4096, 100], [2048, 300]], Ready([[0, 4096], [0, 100]], [6144, 400])),
        (True, [[4096, 100], [4096, 100]], Ready([[0, 0], [0, 0]], [4096, 100])),
    ],
)
def test_ready_tells_where_each_rank_finds_its_bytes(
    sessions: Sessions, replicated: bool, stripes: list[list[int]], ready: Ready
) -> None:
    scheduler = Peer(make_hello("scheduler", world_size=2))
    sessions.join(scheduler)
    for rank in (1, 0):
        sessions.join(
            Peer(
                make_hello(
                    rank=rank, world_size=2, group_bytes=stripes[rank], replicated=replicated
                )
            )
        )
    assert said(scheduler, Ready) == [ready]


def test_each_engine_has_its_own_session(sessions: Sessions) -> None:
    one, other = join_engine(sessions, "one"), join_engine(sessions, "other")
    assert one.session is not other.session
    assert one.session.number != other.session.number
    assert {session.engine for session in sessions.all} == {"one", "other"}
    assert set(one.session.members) == {one.scheduler, *one.workers}


# -- what may be said -------------------------------------------------------------------

ITEMS = chunks_of("a", 3)
ONE_GROUP = [MatchGroup(16, 0, b"".join(keys_of(ITEMS)))]


@pytest.mark.parametrize(
    "message",
    [
        Match(1, ONE_GROUP),
        Unmatch([1]),
        Lease(CHUNK_BYTES, 1),
        Commit(b"", b"", [], b""),
        GiveBack(b""),
        make_hello(),
    ],
)
def test_a_worker_may_not_say_what_its_scheduler_may(engine: Engine, message: FromClient) -> None:
    with pytest.raises(FrameError, match=type(message).__name__):
        engine.session.handle(engine.workers[0], message)
    assert not len(engine.session._leased) and not len(engine.session._tickets)


def test_a_second_hello_is_refused(engine: Engine) -> None:
    with pytest.raises(FrameError, match="second Hello"):
        engine.say(make_hello("scheduler"))


@pytest.mark.parametrize(
    "groups",
    [
        [],
        ONE_GROUP * 2,
        [MatchGroup(16, 0, keys_of(ITEMS)[0] * 2)],
        [MatchGroup(0, 0, b"")],
        [MatchGroup(-16, 0, b"")],
        [MatchGroup(16, -1, b"")],
        [MatchGroup(16, 0, bytes(15))],
        [MatchGroup(16, 0, b"")] * (GROUPS_MAX + 1),
        [MatchGroup(16, 0, b"".join(i.to_bytes(16) for i in range(KEYS_PER_MATCH_MAX + 1)))],
    ],
)
def test_a_match_out_of_bounds_is_refused(engine: Engine, groups: list[MatchGroup]) -> None:
    with pytest.raises(FrameError):
        engine.say(Match(1, groups))
    assert len(engine.session._tickets) == 0


@pytest.mark.parametrize(
    ("length", "count"),
    [(CHUNK_BYTES + 1, 1), (0, 1), (-1, 1), (CHUNK_BYTES, 0), (CHUNK_BYTES, -1), (1 << 62, 1)],
)
def test_a_lease_of_what_the_engine_does_not_use_is_refused(
    engine: Engine, length: int, count: int
) -> None:
    with pytest.raises(FrameError, match="lease"):
        engine.say(Lease(length, count))
    assert not said(engine.scheduler, Leased)


def test_a_lease_before_the_engine_is_ready_is_refused(sessions: Sessions) -> None:
    scheduler = Peer(make_hello("scheduler"))
    session = sessions.join(scheduler)
    with pytest.raises(FrameError, match="lease"):
        session.handle(scheduler, Lease(CHUNK_BYTES, 1))


def test_what_engines_loaded_is_counted(engine: Engine, node: Node) -> None:
    engine.say(Loaded(1000, 1))
    engine.session.handle(engine.workers[0], Loaded(500, 2))
    assert node.dram.usage().loaded_bytes_total == 1500
    assert node.meter.transfer_bytes["G2", "G1"] == 1500
    assert node.meter.errors == {("load_G2", "failed"): 3}


@pytest.mark.parametrize("message", [Loaded(-1, 0), Loaded(0, -1)])
def test_loading_less_than_nothing_is_refused(engine: Engine, message: Loaded) -> None:
    with pytest.raises(FrameError):
        engine.say(message)


# -- tickets ----------------------------------------------------------------------------


async def test_a_match_is_answered_and_what_comes_is_told(engine: Engine, node: Node) -> None:
    node.commit(ITEMS[:1])
    await store_all(node.memories[0], ITEMS[1:2])
    assert engine.match(7, ITEMS) == [HERE, COMING, MISS]
    [(index, source, slot)] = unpack_slots(said(engine.scheduler, Matched)[0].slots)
    assert (index, source) == (0, 2)
    assert node.dram.view(slot) == ITEMS[0].data
    async with node.running():
        await node.settle()
    [arrived] = said(engine.scheduler, Arrived)
    [(index, source, slot)] = unpack_slots(arrived.slots)
    assert (arrived.ticket, index, source, arrived.failed) == (7, 1, 3, [])
    assert node.dram.view(slot) == ITEMS[1].data
    assert engine.session.claims == node.dram.claims == 2
    engine.say(Unmatch([7, 7, 8]))
    assert len(engine.session._tickets) == node.dram.claims == 0


async def test_what_does_not_come_is_told_too(engine: Engine, node: Node) -> None:
    await store_all(node.memories[1], ITEMS)
    node.memories[1].contents[ITEMS[1].chunk.key][0] ^= 1
    assert engine.match(1, ITEMS) == [COMING] * 3
    async with node.running():
        await node.settle()
    arrived = said(engine.scheduler, Arrived)
    assert [index for told in arrived for index in told.failed] == [1]
    came = [index for told in arrived for index, _, _ in unpack_slots(told.slots)]
    assert sorted(came) == [0, 2]
    engine.say(Unmatch([1]))


def test_a_ticket_number_in_use_is_refused_and_a_closed_one_is_not(
    engine: Engine, node: Node
) -> None:
    node.commit(ITEMS)
    engine.match(1, ITEMS)
    with pytest.raises(FrameError, match="ticket 1"):
        engine.match(1, ITEMS)
    assert node.dram.claims == 3, "the open ticket keeps what it holds"
    engine.say(Unmatch([1]))
    assert engine.match(1, ITEMS) == [HERE] * 3
    engine.say(Unmatch([1]))


def test_beyond_the_most_open_tickets_a_match_is_answered_with_misses(
    engine: Engine, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "TICKETS_MAX", 2)
    node.commit(ITEMS)
    assert engine.match(1, ITEMS) == engine.match(2, ITEMS) == [HERE] * 3
    assert engine.match(3, ITEMS) == [MISS] * 3
    assert len(engine.session._tickets) == 2
    engine.say(Unmatch([1]))
    assert engine.match(4, ITEMS) == [HERE] * 3
    engine.say(Unmatch([2, 4]))
    assert node.dram.claims == 0


# -- the end ----------------------------------------------------------------------------


@pytest.mark.parametrize("leaver", ["scheduler", "rank 0", "rank 1"])
async def test_any_members_loss_ends_the_session(
    sessions: Sessions, node: Node, leaver: str
) -> None:
    """Tickets at once; leased slots when no worker can write to them any more."""
    engine = join_engine(sessions, world_size=2)
    node.commit(ITEMS[:2])
    await store_all(node.memories[0], ITEMS[2:])
    assert engine.match(1, ITEMS) == [HERE, HERE, COMING]
    engine.lease(4)
    members = {"scheduler": engine.scheduler, "rank 0": engine.workers[0]}
    lost = members.get(leaver, engine.workers[1])
    sessions.leave(lost)
    assert node.dram.claims == len(engine.session._tickets) == 0
    assert node.manager.onboarder.depth == {"G3": 0, "G4": 0}, "what only it waited for"
    assert node.dram.leased_bytes == 4 * CHUNK_BYTES, "its workers may still write there"
    left = [worker for worker in engine.workers if worker is not lost]
    assert all(said(worker, Fence) == [Fence()] and not worker.closed for worker in left)
    assert engine.scheduler.closed == (lost is not engine.scheduler)
    if engine.scheduler.closed:
        sessions.leave(engine.scheduler)
    for worker in left:
        assert node.dram.leased_bytes == 4 * CHUNK_BYTES
        engine.session.handle(worker, Fenced())
        assert worker.closed
        sessions.leave(worker)
    assert node.dram.leased_bytes == 0
    assert not sessions.all


def test_a_worker_that_dies_instead_of_answering_frees_the_leases_too(
    sessions: Sessions, node: Node
) -> None:
    engine = join_engine(sessions, world_size=2)
    engine.lease(2)
    for member in (engine.workers[1], engine.workers[0]):
        assert node.dram.leased_bytes == 2 * CHUNK_BYTES
        sessions.leave(member)
    assert node.dram.leased_bytes == 0, "the scheduler itself never writes"
    sessions.leave(engine.scheduler)


def test_a_fence_is_asked_for_once(sessions: Sessions) -> None:
    engine = join_engine(sessions, world_size=3)
    sessions.leave(engine.scheduler)
    sessions.leave(engine.workers[0])
    assert [len(said(worker, Fence)) for worker in engine.workers] == [1, 1, 1]


def test_an_ending_session_takes_no_more_orders(sessions: Sessions, node: Node) -> None:
    engine = join_engine(sessions, world_size=2)
    slots = engine.lease(1)
    sessions.leave(engine.workers[0])
    for message in (Lease(CHUNK_BYTES, 1), commit_of(slots, ITEMS[:1]), Match(1, ONE_GROUP)):
        with pytest.raises(FrameError):
            engine.say(message)
    assert node.dram.leased_bytes == CHUNK_BYTES
    assert not any(node.dram.find(keys_of(ITEMS)))


async def test_nobody_is_told_of_what_comes_after_the_end(engine: Engine, node: Node) -> None:
    await store_all(node.memories[0], ITEMS)
    assert engine.match(1, ITEMS) == [COMING] * 3
    async with node.running():
        engine.sessions.leave(engine.workers[0])
        told = len(engine.scheduler.told)
        await node.settle()
    assert len(engine.scheduler.told) == told
    assert node.dram.claims == 0


def test_an_engine_comes_back_while_its_last_session_still_ends(
    sessions: Sessions, node: Node
) -> None:
    first = join_engine(sessions, world_size=2)
    slots = first.lease(3)
    sessions.leave(first.scheduler)
    sessions.leave(first.workers[0])
    second = join_engine(sessions, world_size=2)
    assert second.session is not first.session
    assert second.session.is_ready
    assert second.session.number > first.session.number
    fresh = second.lease(3)
    assert not {slot.offset for slot in slots} & {slot.offset for slot in fresh}
    with pytest.raises(FrameError, match="not in this engine's lease"):
        second.say(GiveBack(pack(slots)))
    sessions.leave(first.workers[1])
    assert node.dram.leased_bytes == 3 * CHUNK_BYTES, "only the first session's are free"
    assert not second.scheduler.closed


def test_one_engines_end_does_not_concern_another(sessions: Sessions, node: Node) -> None:
    one, other = join_engine(sessions, "one"), join_engine(sessions, "other")
    node.commit(ITEMS)
    one.match(1, ITEMS)
    other.match(1, ITEMS)
    other.lease(2)
    for member in (one.scheduler, *one.workers):
        sessions.leave(member)
        sessions.leave(member)
    assert sessions.all == [other.session]
    assert node.dram.claims == 3
    assert node.dram.leased_bytes == 2 * CHUNK_BYTES
    assert not other.scheduler.closed and not said(other.workers[0], Fence)
    other.say(Unmatch([1]))
