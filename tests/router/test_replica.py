"""Replicas count the same load, whatever the plane does to their messages."""

from __future__ import annotations

import random

import msgspec
import pytest

from router import peers
from router.index import WorkerId
from router.load import Active, ActiveSequences
from router.peers import Changes, Prefilled, decode
from router.replica import ReplicatedLoad
from router.workers import Workers
from runtime.events.base import Message
from runtime.events.memory import MemoryPlane
from tests.router.builders import table, worker

SUBJECT = peers.subject_of("test", "model")


class Net:
    """Carries messages between replicas when told to, as badly as told."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.replicas: dict[str, Replica] = {}
        self.flying: list[tuple[str, bytes]] = []
        self.bad = False
        self.now = 0.0

    def deliver(self) -> None:
        flying, self.flying = self.flying, []
        if self.bad:
            self.dice.shuffle(flying)
        for target, payload in flying:
            fate = self.dice.random() if self.bad else 1.0
            if target not in self.replicas or fate < 0.2:
                continue
            for _ in range(2 if fate < 0.3 else 1):
                self.replicas[target].load.hear(Message(SUBJECT, payload))

    def calm(self) -> None:
        """Long enough for every question to be asked again and answered."""
        self.bad = False
        for _ in range(12):
            self.now += peers.ASK_AGAIN_S
            for one in self.replicas.values():
                one.load.tick()
            self.deliver()


class Replica(MemoryPlane):
    """One router's load, and the plane it speaks through."""

    def __init__(self, net: Net, name: str, epoch: int = 1, workers: int = 3) -> None:
        super().__init__()
        self.net, self.name = net, name
        self.workers: Workers = table(workers)
        self.active = ActiveSequences(self.workers)
        self.load = ReplicatedLoad(
            self.workers,
            self.active,
            self,
            namespace="test",
            model="model",
            name=name,
            epoch=epoch,
            clock=lambda: net.now,
        )
        net.replicas[name] = self

    def publish(self, subject: str, payload: bytes) -> bool:
        assert subject == SUBJECT
        self.net.flying += [(name, payload) for name in self.net.replicas if name != self.name]
        return True

    def columns(self) -> list[list[float]]:
        self.active.check_integrity()
        w = self.workers
        return [w.blocks[:3].tolist(), w.requests[:3].tolist(), w.prefill_tokens[:3].tolist()]


def sequence(row: int, dice: random.Random) -> Active:
    return Active(row, [dice.randrange(40) for _ in range(5)], 1, 100.0, 0.5)


@pytest.mark.parametrize("seed", range(8))
async def test_a_lossy_plane_leaves_no_trace(seed: int) -> None:
    net = Net(seed)
    replicas = [Replica(net, name) for name in "abc"]
    dice = random.Random(seed)
    running: list[tuple[Replica, str]] = []
    for number in range(600):
        net.bad = True
        net.now += 0.05
        if dice.random() < 0.4 or not running:
            one = dice.choice(replicas)
            running.append((one, f"r{number}"))
            assert one.load.begin(f"r{number}", sequence(dice.randrange(3), dice))
        else:
            one, name = dice.choice(running)
            match dice.randrange(3):
                case 0:
                    one.load.prefilled(name)
                case 1:
                    one.load.grow(name, 2)
                case _:
                    running.remove((one, name))
                    assert one.load.end(name)
        for one in replicas:
            one.load.flush()
        net.deliver()
    assert any(one.load.counts.gaps for one in replicas), "nothing went wrong"
    net.calm()
    first, *others = [one.columns() for one in replicas]
    assert sum(first[1]) == len(running)
    assert all(other == first for other in others)


async def test_a_late_router_learns_what_runs_and_a_silent_one_is_forgotten() -> None:
    net, dice = Net(1), random.Random(1)
    old = Replica(net, "old")
    for number in range(300):  # more than one message of state
        assert old.load.begin(str(number), sequence(number % 3, dice))
    net.calm()
    late = Replica(net, "late")
    net.calm()
    assert late.columns() == old.columns() and late.load.counts.states_taken == 1
    del net.replicas["old"]
    net.now += peers.SILENCE_S + 1
    late.load.tick()
    assert late.columns() == [[0.0] * 3] * 3 and late.load.counts.silent == 1
    net.replicas["old"] = old  # it was only cut off
    net.calm()
    assert late.columns() == old.columns()


async def test_a_router_that_starts_again_takes_nothing_along() -> None:
    net, dice = Net(2), random.Random(2)
    other, one = Replica(net, "other"), Replica(net, "one", epoch=1)
    one.load.begin("lost", sequence(0, dice))
    net.calm()
    assert other.columns()[1] == [1, 0, 0]
    again = Replica(net, "one", epoch=2)
    again.load.begin("new", sequence(2, dice))
    net.calm()
    assert other.columns()[1] == again.columns()[1] == [0, 0, 1]
    one.load.flush()  # a message of the run before, late
    net.deliver()
    assert other.columns()[1] == [0, 0, 1]


async def test_long_requests_are_never_dropped_while_their_router_lives() -> None:
    net, dice = Net(3), random.Random(3)
    one, other = Replica(net, "one"), Replica(net, "other")
    one.load.begin("long", sequence(1, dice))
    for _ in range(50):
        net.now += 100.0
        for each in (one, other):
            each.load.flush()
        net.deliver()
    assert other.columns()[1] == one.columns()[1] == [0, 1, 0]


async def test_a_sequence_on_a_worker_not_heard_of_yet_counts_when_it_comes() -> None:
    net, dice = Net(4), random.Random(4)
    one, other = Replica(net, "one"), Replica(net, "other", workers=2)
    one.load.begin("early", sequence(2, dice))
    one.load.begin("over", sequence(2, dice))
    net.calm()
    one.load.grow("early", 3)
    one.load.end("over")
    net.calm()
    assert other.columns()[1] == [0, 0] + [0] * (len(other.columns()[1]) - 2)
    other.workers.add(worker(3))
    other.load.worker_added(WorkerId(3))
    assert other.columns() == one.columns()
    ended = one.load.worker_removed(one.workers.remove(WorkerId(3)))
    assert ended == ["early"]
    net.calm()
    assert sum(other.columns()[1]) == 0


async def test_malformed_messages_are_counted_and_do_nothing() -> None:
    one = Replica(Net(5), "one")
    for payload in (b"", b"\xc1", b"\x93\xa3ask", b"\x92\xa3ask\x01"):
        one.load.hear(Message(SUBJECT, payload))
    assert one.load.counts.malformed == 4


def test_what_older_routers_tell_of_a_first_token_is_understood() -> None:
    told = decode(msgspec.msgpack.encode(["changes", "r", 1, 0, [["prefilled", "a"]]]))
    assert told == Changes("r", 1, 0, [Prefilled("a", timed=True)])
