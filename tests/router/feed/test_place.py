"""The place in a stream: each event once, in order, whatever becomes of them on their way."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.place import Place

KEYS = 5
RING = 4


def met(publisher: int = 1, ahead_bytes: int = 1000) -> Place:
    place = Place(ahead_bytes)
    place.meet(publisher)
    return place


def test_nothing_comes_out_before_a_snapshot_and_then_what_it_lacks() -> None:
    place = met()
    assert [*place.hear(4, b"4"), *place.hear(5, b"5"), *place.hear(6, b"6")] == []
    assert not place.has_gap  # what is missing is not a gap but everything
    assert place.resume(5) == [b"5", b"6"]
    assert place.next == 7


def test_late_and_double_events_come_out_once_and_in_order() -> None:
    place = met()
    place.resume(0)
    assert place.hear(1, b"1") == ()
    assert place.has_gap and place.behind == 2
    assert place.hear(1, b"1") == ()
    assert place.hear(0, b"0") == [b"0", b"1"]
    assert place.hear(0, b"0") == ()
    assert place.duplicates_total == 2 and place.gaps_total == 1
    assert not place.has_gap and place.behind == 0


def test_while_held_events_wait_whether_a_snapshot_comes_or_not() -> None:
    place = met()
    place.resume(0)
    place.hold()
    assert place.hear(0, b"0") == () and not place.has_gap
    assert place.release() == [b"0"]
    place.hold()
    assert place.hear(1, b"1") == ()
    assert place.resume(2) == []
    assert place.hear(2, b"2") == (b"2",)


def test_what_waits_is_bounded_and_the_oldest_goes() -> None:
    place = met(ahead_bytes=4)
    place.resume(0)
    for sequence in range(1, 8):
        place.hear(sequence, b"x")
        place.check_integrity()
    assert place.dropped_total == 3
    assert place.hear(0, b"0") == [b"0"]
    assert place.has_gap and place.next == 1
    assert place.hear(1, b"too long") == [b"too long"]


def test_another_run_of_the_daemon_has_a_place_of_its_own() -> None:
    place = met()
    place.resume(10)
    place.hear(12, b"12")
    place.meet(2)
    assert place.next is None and place.behind == 0
    assert place.resume(0) == []
    assert place.hear(0, b"0") == (b"0",)


class PlaceMachine(RuleBasedStateMachine):
    """A node that sets keys, a network that loses, doubles and reorders, and one who follows."""

    def __init__(self) -> None:
        super().__init__()
        self.publisher = 1
        self.said: list[bytes] = []  # by this run of the node
        self.state: dict[int, bytes] = {}
        self.network: list[tuple[int, int, bytes]] = []
        self.place = met(ahead_bytes=12)
        self.known: dict[int, bytes] = {}
        self.snapshot: tuple[int, int, dict[int, bytes]] | None = None
        self.expected = 0  # what must come out next

    def apply(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            assert payload == self.said[self.expected]
            self.expected += 1
            self.known[payload[0]] = payload

    @rule(key=st.integers(0, KEYS - 1))
    def happen(self, key: int) -> None:
        payload = bytes([key, len(self.said) % 256, self.publisher % 256])
        self.state[key] = payload
        self.network.append((self.publisher, len(self.said), payload))
        self.said.append(payload)

    @rule(keeps=st.booleans())
    def restart(self, keeps: bool) -> None:
        self.publisher += 1
        self.said = []
        if not keeps:
            self.state = {}

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, min(3, len(self.network) - 1)))
        publisher, sequence, payload = self.network[at]
        if data.draw(st.sampled_from([True, True, True, False])):
            del self.network[at]  # otherwise it comes again
        if publisher == self.place.publisher:
            out = self.place.hear(sequence, payload)
            if publisher == self.publisher:
                self.apply(out)
            else:  # of a run that has ended: nobody can check it, and a snapshot will come
                self.expected += len(out)

    @precondition(lambda self: self.network)
    @rule()
    def lose(self) -> None:
        del self.network[0]

    @precondition(lambda self: self.place.publisher != self.publisher)
    @rule()
    def learn(self) -> None:
        """Discovery tells of the new run."""
        self.snapshot = None
        self.place.meet(self.publisher)

    @precondition(lambda self: self.place.next is not None and self.snapshot is None)
    @rule()
    def replay(self) -> None:
        if self.place.publisher != self.publisher or self.place.next is None:
            return
        first = self.place.next
        if first >= max(0, len(self.said) - RING):
            for sequence in range(first, len(self.said)):
                self.apply(self.place.hear(sequence, self.said[sequence]))
            assert self.place.next == len(self.said)
            assert self.known == self.state

    @precondition(lambda self: self.snapshot is None)
    @rule()
    def begin_snapshot(self) -> None:
        self.place.hold()
        self.snapshot = (self.publisher, len(self.said), dict(self.state))

    @precondition(lambda self: self.snapshot is not None)
    @rule(comes=st.booleans())
    def end_snapshot(self, comes: bool) -> None:
        assert self.snapshot is not None
        (publisher, following, state), self.snapshot = self.snapshot, None
        if not comes or publisher != self.publisher:
            out = self.place.release()
            if self.place.publisher == self.publisher:
                self.apply(out)
            return
        if publisher != self.place.publisher:
            self.place.meet(publisher)
        self.known, self.expected = state, following
        self.apply(self.place.resume(following))

    @invariant()
    def what_is_known_is_what_was_said_up_to_here(self) -> None:
        self.place.check_integrity()
        if self.place.publisher == self.publisher and self.place.next is not None:
            assert self.place.next == self.expected
            if self.place.next == len(self.said):
                assert self.known == self.state
                assert not self.place.has_gap


TestPlace = PlaceMachine.TestCase
TestPlace.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
