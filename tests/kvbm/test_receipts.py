"""What a receipt says of a lookup, how it is found, and what all of them may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.cli.why import sentences
from kvbm.daemon.receipt_reports import ReceiptReport
from kvbm.protocol import (
    REQUEST_CHARS_MAX,
    FrameError,
    Match,
    MatchGroup,
    Outcome,
    Pace,
    Unmatch,
)
from kvbm.receipts import Receipt
from kvbm.removals import Removals
from kvbm.session import TICKETS_MAX, Sessions
from storage_tiers.base import Key, RemovalReason, TierName
from storage_tiers.testing import make_key
from tests.kvbm.builders import CHUNK_BYTES, Node, chunks_of, keys_of
from tests.kvbm.members import Engine, join_engine

MakeNode = Callable[..., Node]


class Desk:
    """A node with an engine, and the receipts that its session writes."""

    def __init__(self, node: Node, removals: Removals | None = None) -> None:
        self.node = node
        self.sessions = Sessions(node.manager, removals=removals)
        self.receipts = self.sessions.receipts
        self.engine: Engine = join_engine(self.sessions)

    def ask(self, number: int, *keys: list[Key], name: str = "r", window: int = 0) -> Receipt:
        groups = [
            MatchGroup(16, window if place else 0, b"".join(of_group))
            for place, of_group in enumerate(keys)
        ]
        self.engine.say(Match(number, groups, name, Pace()))
        return self.receipts.latest(1)[0]

    def end(self, number: int, **changes: object) -> None:
        told = {"state": "loaded", "local_tokens": 16, "loaded_tokens": 32}
        told |= {"waited_s": 0.25, "load_s": 0.5, "late": ""} | changes
        self.engine.say(Outcome(number, **told))  # type: ignore[arg-type]
        self.engine.say(Unmatch([number]))


@pytest.fixture
def desk(make_node: MakeNode) -> Iterator[Desk]:
    desk = Desk(make_node())
    yield desk
    desk.receipts.check_integrity()


def said(receipt: Receipt) -> str:
    return "\n".join(sentences(ReceiptReport.of(receipt).model_dump(), receipt.asked_at + 90))


# -- what it says -----------------------------------------------------------------------


async def test_what_is_here_what_comes_and_what_is_missing_is_counted(desk: Desk) -> None:
    node, items = desk.node, chunks_of("a", 6)
    node.commit(items[:2])
    await node.memories[0].store(items[2:4])
    await node.memories[1].store(items[5:])
    receipt = desk.ask(1, keys_of(items))
    [group] = receipt.groups
    assert (group.asked, group.here, group.coming, group.missing) == (6, 2, 2, 1)
    assert group.kept == {"G2": 2, "G3": 2, "G4": 1}
    assert (group.first_missing, group.behind_gap, group.removed) == (4, 1, [])
    assert receipt.verdict.tokens == 64 and receipt.outcome is None
    assert "The engine has not said yet" in said(receipt)
    async with node.running():
        await node.settle()
    assert receipt.landed == {"G3": 2} and receipt.failed == receipt.crowded == 0
    assert receipt.last_arrival_s is not None
    desk.end(1)
    assert receipt.late == 0 and receipt.closed_s is not None
    page = said(receipt)
    for line in (
        "had 16 tokens itself, and loaded 32 tokens in 500 ms, after 250 ms in its queue",
        "Of the 96 tokens asked for, the first 64 can be loaded here.",
        "2 were in host memory, and held for the request",
        "1 are in no tier, the first of them chunk 4",
        "1 are kept, but of no use behind one that is not",
        "Of the 2 brought up: 2 came from the SSD.",
    ):
        assert line in page


async def test_what_is_still_coming_when_the_request_goes_on_is_late(desk: Desk) -> None:
    items = chunks_of("a", 3)
    await desk.node.memories[0].store(items)
    receipt = desk.ask(1, keys_of(items))
    desk.end(1, state="computed", loaded_tokens=0, load_s=0.0, late="onboard")
    assert receipt.late == 3
    page = said(receipt)
    assert "and loaded nothing" in page and "what was still on its way" in page
    assert "3 had not come when the request went on" in page


async def test_no_room_in_host_memory_is_told_from_a_tier_that_fails(make_node: MakeNode) -> None:
    desk = Desk(make_node(dram_bytes=4 * CHUNK_BYTES))
    node, items = desk.node, chunks_of("a", 6)
    await node.memories[0].store(items)
    assert len(node.manager.lease(CHUNK_BYTES, 2)) == 2
    receipt = desk.ask(1, keys_of(items))
    await node.memories[0].remove(keys_of(items[:1]))
    async with node.running():
        await node.settle()
    assert (receipt.landed, receipt.failed, receipt.crowded) == ({"G3": 1}, 1, 4)
    assert "1 could not be read, or were damaged, 4 found no room" in said(receipt)


def test_of_a_window_only_the_end_is_needed(desk: Desk) -> None:
    full, window = chunks_of("full", 8), chunks_of("window", 8)
    desk.node.commit(full)
    receipt = desk.ask(1, keys_of(full), keys_of(window), window=2)
    assert receipt.groups[1].missing == 8 and receipt.groups[1].window == 2
    assert "Cache group 1, a window of 2 chunks:" in said(receipt)


async def test_what_a_window_does_not_need_is_not_called_missing(desk: Desk) -> None:
    full, window = chunks_of("full", 8), chunks_of("window", 8)
    desk.node.commit(full)
    await desk.node.memories[0].store(window)
    group = desk.ask(1, keys_of(full), keys_of(window), window=2).groups[1]
    assert (group.coming, group.outside_window, group.missing) == (3, 5, 0)


def test_a_miss_says_where_its_chunks_went(make_node: MakeNode) -> None:
    removals = Removals()
    desk = Desk(make_node(), removals)
    items = chunks_of("a", 5)
    removals.add(TierName.SSD, keys_of(items[:3]), RemovalReason.CAPACITY)
    removals.add(TierName.S3, keys_of(items[3:4]), RemovalReason.AGE)
    receipt = desk.ask(1, keys_of(items))
    [group] = receipt.groups
    found = [(each.tier, each.reason, each.chunks) for each in group.removed]
    assert found == [
        (TierName.SSD, RemovalReason.CAPACITY, 3),
        (TierName.S3, RemovalReason.AGE, 1),
    ]
    page = said(receipt)
    assert "3 were evicted from the SSD to make room" in page
    assert "1 were deleted from S3 because of their age" in page
    assert "1 were never stored here" in page


def test_an_engine_that_leaves_says_nothing_more(desk: Desk) -> None:
    receipt = desk.ask(1, keys_of(chunks_of("a", 2)))
    desk.sessions.leave(desk.engine.scheduler)
    assert receipt.closed_s is not None and receipt.outcome is None
    assert "The engine was gone before it said" in said(receipt)


def test_too_many_open_requests_are_a_reason(desk: Desk) -> None:
    key = keys_of(chunks_of("a", 1))
    for number in range(TICKETS_MAX):
        desk.engine.session._tickets[number] = None  # type: ignore[assignment]
    receipt = desk.ask(TICKETS_MAX, key)
    desk.engine.session._tickets.clear()
    assert receipt.refused and "too many open requests" in said(receipt)


@pytest.mark.parametrize(
    "message",
    [
        Match(1, [MatchGroup(16, 0, make_key("a"))], "x" * (REQUEST_CHARS_MAX + 1)),
        Match(1, [MatchGroup(16, 0, make_key("a"))], "", Pace(token_s=math.inf)),
        Match(1, [MatchGroup(16, 0, make_key("a"))], "", Pace(copy_s=-1.0)),
        Match(1, [MatchGroup(16, 0, make_key("a"))], "", Pace(pair_s=math.nan)),
        Outcome(1, "loaded", -1, 0, 0.0, 0.0, ""),
        Outcome(1, "loaded", 0, 0, math.nan, 0.0, ""),
    ],
)
def test_figures_that_are_none_are_refused(desk: Desk, message: Match | Outcome) -> None:
    with pytest.raises(FrameError):
        desk.engine.say(message)


def test_an_outcome_of_no_ticket_is_ignored(desk: Desk) -> None:
    desk.engine.say(Outcome(7, "ended", 0, 0, 0.0, 0.0, ""))
    assert len(desk.receipts) == 0


# -- finding and keeping ----------------------------------------------------------------


def test_the_exact_name_comes_before_its_beginning_and_that_before_a_part(desk: Desk) -> None:
    key = keys_of(chunks_of("a", 1))
    names = ["a-1", "a-1-x", "b-a-1"]
    for number, name in enumerate(names):
        desk.ask(number, key, name=name)
    find = desk.receipts.find
    assert [receipt.request for receipt in find("a-1")] == ["a-1"]
    assert [receipt.request for receipt in find("a-1-")] == ["a-1-x"]
    assert [receipt.request for receipt in find("a-")] == ["a-1-x", "a-1"]
    assert [receipt.request for receipt in find("-a-")] == ["b-a-1"]
    assert find("c") == []


def test_the_oldest_go_when_the_bytes_are_spent(make_node: MakeNode) -> None:
    desk = Desk(make_node())
    desk.receipts._bytes_max = 20_000
    key = keys_of(chunks_of("a", 1))
    for number in range(50):
        receipt = desk.ask(number, key, name=str(number))
    assert len(desk.receipts) == 20_000 // receipt.size
    assert desk.receipts.used_bytes <= 20_000
    assert desk.receipts.latest(1)[0].request == "49"
    kept = [int(found.request) for found in desk.receipts.latest(100)]
    assert kept == list(range(49, 49 - len(kept), -1))
    desk.receipts.check_integrity()


# -- removals ---------------------------------------------------------------------------

KEYS = st.lists(st.binary(min_size=16, max_size=16).map(Key), min_size=1, max_size=40, unique=True)


@settings(deadline=None)
@given(
    KEYS,
    st.lists(
        st.tuples(st.integers(0, 39), st.sampled_from(TierName), st.sampled_from(RemovalReason)),
        max_size=60,
    ),
)
def test_a_removal_is_remembered_as_the_latest_of_its_key_or_not_at_all(
    keys: list[Key], events: list[tuple[int, TierName, RemovalReason]]
) -> None:
    removals = Removals(rows=16, clock=lambda: 5.0)
    last: dict[Key, tuple[TierName, RemovalReason]] = {}
    for at, tier, reason in events:
        key = keys[at % len(keys)]
        removals.add(tier, [key], reason)
        last[key] = tier, reason
    for key in keys:
        for found in removals.explain([key]):
            assert (found.tier, found.reason) == last[key]
            assert (found.chunks, found.last_at) == (1, 5.0)


def test_many_removals_take_no_more_room_than_few() -> None:
    removals = Removals(rows=64)
    size = removals._table.nbytes
    for number in range(500):
        removals.add(TierName.DRAM, [make_key(f"{number}")], RemovalReason.CAPACITY)
    assert removals._table.nbytes == size
    assert removals.explain([make_key("499")])[0].chunks == 1
