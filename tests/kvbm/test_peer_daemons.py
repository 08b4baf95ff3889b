"""Daemons as processes that read from each other: found, killed, hung, damaged, evicting.

UCX is told to use TCP where a read has to be caught under way: with it the owner's UCX process
takes part in every read, so that stopping that process holds the read for as long as it takes.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from examples.demo.daemon import Daemon, DaemonConfig
from examples.demo.process import free_port
from kvbm.protocol import HERE, MatchGroup
from kvbm.stand_in import TOKENS_PER_CHUNK, StandIn
from runtime.embedded import EmbeddedNats
from storage_tiers.base import Key, StoreItem
from storage_tiers.testing import make_items
from tests.kvbm.peer_nodes import TOKEN
from tests.waiting import wait_until

CHUNK = 256 << 10
DEADLINE_S = 3.0
WAIT_S = 90.0
"""NIXL's import reads much from a disk that may be busy."""


class Node:
    """A daemon with peers, at an address that stays the same."""

    def __init__(self, folder: Path, name: str, port: int, peers: dict[str, Any], **config: Any):
        self.runtime = Path(tempfile.mkdtemp(prefix="kvbm-test-"))
        self.address = f"127.0.0.1:{port}"
        settings = {"dram": "64MiB", "ssd": None, **config}
        self.daemon = Daemon(
            DaemonConfig(
                folder=folder / name,
                socket=self.runtime / "s",
                logs=folder / name,
                records=folder / name,
                node=name,
                peers={"port": port, "token": TOKEN, "deadline": DEADLINE_S, **peers},
                **settings,
            )
        )

    def peer(self) -> dict[str, Any]:
        """The only peer, as this daemon sees it."""
        [peer] = self.status()["peers"]
        return dict(peer)

    def status(self) -> dict[str, Any]:
        return self.daemon._get("/v1/peers")

    def knows(self, chunks: int, mover: str) -> None:
        def is_so() -> bool:
            peers = self.status()["peers"]
            return any(p["chunks"] >= chunks and p["mover"] == mover for p in peers)

        wait_until(is_so, WAIT_S, f"{chunks} chunks known of a peer, to be read by {mover}")

    def tier(self) -> dict[str, Any]:
        return next(tier for tier in self.daemon.tiers() if tier["tier"] == "peer")

    def ucx(self) -> int:
        """The pid of its UCX process, the only child a daemon has."""
        pid = self.daemon.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def engine(self) -> StandIn:
        return StandIn(self.daemon.socket, CHUNK, lease_chunks=64)


MakeNode = Callable[..., Node]


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[MakeNode]:
    """Nodes that are started, and end with the test."""
    with ExitStack() as running:

        def make(
            name: str, *, nodes: Sequence[str] = (), mover: str = "plain", **config: Any
        ) -> Node:
            port = config.pop("port", None) or free_port()
            peers = {"nodes": list(nodes), "mover": mover}
            node = Node(tmp_path, name, port, peers, **config)
            running.callback(shutil.rmtree, node.runtime, ignore_errors=True)
            running.callback(node.daemon.process.kill)
            node.daemon.start()
            return node

        yield make


def keys_of(items: Sequence[StoreItem]) -> list[Key]:
    return [item.chunk.key for item in items]


def bytes_of(items: Sequence[StoreItem]) -> list[bytes | None]:
    return [bytes(item.data) for item in items]


def stored(node: Node, items: Sequence[StoreItem]) -> None:
    """Have an engine of this node store the chunks."""
    with node.engine() as engine:
        engine.store(items)
        wait_until(
            lambda: node.daemon.kept_chunks()["G2"] >= len(items), WAIT_S, "the chunks are kept"
        )


class Fetching(threading.Thread):
    """An engine of this node that asks for the chunks, meanwhile."""

    def __init__(self, node: Node, items: Sequence[StoreItem]) -> None:
        super().__init__(daemon=True)
        self._node, self._items = node, items
        self.found: list[bytes | None] = []
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        with self._node.engine() as engine:
            began = time.monotonic()
            self.found = engine.fetch(keys_of(self._items))
            self.seconds = time.monotonic() - began

    def end(self) -> None:
        self.join(WAIT_S)
        assert not self.is_alive(), "an engine waits for ever"
        assert len(self.found) == len(self._items)
        for found, item in zip(self.found, self._items, strict=True):
            assert found is None or found == bytes(item.data), "wrong KV"


def held(node: Node, owner: Node, items: Sequence[StoreItem]) -> Fetching:
    """A fetch on `node` that is in the middle of reading from `owner`, and stays there."""
    os.kill(owner.ucx(), signal.SIGSTOP)
    fetching = Fetching(node, items)
    wait_until(lambda: owner.status()["lent_bytes"] > 0, WAIT_S, "the chunks are lent")
    return fetching


@pytest.mark.parametrize(("mover", "moved_by"), [("plain", "tcp"), ("auto", "nixl-ucx")])
def test_what_an_engine_of_one_node_stored_an_engine_of_another_gets(
    make_node: MakeNode, mover: str, moved_by: str
) -> None:
    first = make_node("first", mover=mover)
    second = make_node("second", nodes=[first.address], mover=mover, ssd="256MiB")
    items = make_items("across", 64, CHUNK)
    stored(first, items)
    second.knows(len(items), moved_by)
    with second.engine() as engine:
        assert engine.fetch(keys_of(items)) == bytes_of(items)
        assert second.daemon.loaded_bytes()["peer"] == len(items) * CHUNK
        assert second.tier()["mover"] == moved_by
        wait_until(
            lambda: second.daemon.kept_chunks()["G3"] == len(items), WAIT_S, "its SSD has them too"
        )
        assert engine.fetch(keys_of(items)) == bytes_of(items)  # from its own memory now
        assert second.daemon.loaded_bytes()["peer"] == len(items) * CHUNK
    assert second.tier()["errors"] == {}
    wait_until(lambda: first.status()["lent_bytes"] == 0, WAIT_S, "all claims are back")


def test_nodes_find_each_other_over_nats(make_node: MakeNode, tmp_path: Path) -> None:
    with EmbeddedNats(tmp_path / "nats") as nats:
        events = {
            "plane": "nats",
            "nats_url": nats.url,
            "nats_user": nats.user,
            "nats_password": nats.password,
        }
        first, second = (make_node(name, events=events) for name in ("first", "second"))
        items = make_items("found", 8, CHUNK)
        stored(first, items)
        second.knows(len(items), "tcp")
        assert second.peer()["found_by"] == "events"
        with second.engine() as engine:
            assert engine.fetch(keys_of(items)) == bytes_of(items)


def test_an_owner_killed_in_the_middle_of_a_read_costs_misses(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    first = make_node("first", mover="auto")
    second = make_node("second", nodes=[first.address], mover="auto")
    items = make_items("killed", 16, CHUNK)
    stored(first, items)
    second.knows(len(items), "nixl-ucx")
    fetching = held(second, first, items)
    first.daemon.process.kill()
    fetching.end()
    assert fetching.found == [None] * len(items)
    assert second.tier()["errors"]["load"] > 0
    wait_until(lambda: not second.peer()["connected"], WAIT_S, "it is seen to be away")
    own = make_items("own", 16, CHUNK)
    stored(second, own)  # it goes on serving
    with second.engine() as engine:
        assert engine.fetch(keys_of(own)) == bytes_of(own)
    first.daemon.start()
    stored(first, items)
    second.knows(len(items), "nixl-ucx")
    with second.engine() as engine:
        assert engine.fetch(keys_of(items)) == bytes_of(items)


def test_a_reader_killed_in_the_middle_of_a_read_gives_its_claims_back(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    first = make_node("first", mover="auto", dram="16MiB")
    second = make_node("second", nodes=[first.address], mover="auto")
    items = make_items("reader", 8, CHUNK)
    stored(first, items)
    second.knows(len(items), "nixl-ucx")
    held(second, first, items)
    second.daemon.process.kill()
    wait_until(lambda: first.status()["lent_bytes"] == 0, WAIT_S, "the claims are back")
    assert first.status()["readers"] == []
    os.kill(first.ucx(), signal.SIGCONT)
    others = make_items("others", 48, CHUNK, chained=False)
    with first.engine() as engine:
        engine.store(others)  # what was claimed can be evicted
        last = others[-8:]
        assert [engine.fetch([key])[0] for key in keys_of(last)] == bytes_of(last)


def test_an_owner_that_hangs_costs_the_deadline_and_no_more(make_node: MakeNode) -> None:
    first = make_node("first")
    second = make_node("second", nodes=[first.address])
    items = make_items("hangs", 16, CHUNK)
    stored(first, items)
    second.knows(len(items), "tcp")
    os.kill(first.daemon.process.pid, signal.SIGSTOP)
    try:
        fetching = Fetching(second, items)
        fetching.end()
        assert fetching.found == [None] * len(items)
        assert second.tier()["errors"]["load"] == len(items)
        assert second.tier()["chunks"] == 0, "nobody else is to wait for it"
        again = Fetching(second, items)
        again.end()
        assert again.found == [None] * len(items)
        assert second.tier()["errors"]["load"] == len(items), "it was not asked again"
    finally:
        os.kill(first.daemon.process.pid, signal.SIGCONT)
    second.knows(len(items), "tcp")
    with second.engine() as engine:
        assert engine.fetch(keys_of(items)) == bytes_of(items)


@pytest.mark.parametrize(("mover", "moved_by"), [("plain", "tcp"), ("auto", "nixl-ucx")])
def test_bytes_damaged_in_the_owners_memory_are_never_given_to_an_engine(
    make_node: MakeNode, mover: str, moved_by: str
) -> None:
    first = make_node("first", mover=mover)
    second = make_node("second", nodes=[first.address], mover=mover)
    items = make_items("damaged", 8, CHUNK)
    with first.engine() as engine:
        engine.store(items)
        second.knows(len(items), moved_by)
        assert engine.fetch(keys_of(items)) == bytes_of(items)
        lookup = engine.client.look_up(
            [MatchGroup(TOKENS_PER_CHUNK, 0, b"".join(keys_of(items)))], keys_of(items)
        )
        assert lookup is not None and engine._arena is not None
        engine.wait(lambda: lookup.answered, "the slots are known")
        assert lookup.states[3] == HERE
        slot, _ = lookup.slot(3) or pytest.fail("the chunk is not here")
        engine._arena.view(slot.offset, slot.length)[CHUNK // 2] ^= 1
        engine.client.forget(lookup)
        engine.client.pump()
        with second.engine() as reader:
            expected = bytes_of(items)
            expected[3] = None
            assert reader.fetch(keys_of(items)) == expected
        assert second.tier()["corrupt"] == 1
        [entry] = second.daemon._get("/v1/quarantine")["entries"]
        assert (entry["tier"], entry["key"]) == ("peer", items[3].chunk.key.hex())
        wait_until(
            lambda: first.daemon._get("/v1/quarantine")["total"] == 1, WAIT_S, "the owner knows"
        )


def test_an_owner_that_evicts_meanwhile_gives_right_bytes_or_none(make_node: MakeNode) -> None:
    first = make_node("first", dram="16MiB")
    second = make_node("second", nodes=[first.address])
    items = make_items("evicted", 40, CHUNK, chained=False)
    stored(first, items)
    second.knows(len(items), "tcp")
    fetching = [Fetching(second, [item]) for item in items]
    with first.engine() as engine:
        for round_ in range(4):
            engine.store(make_items(f"others {round_}", 60, CHUNK, chained=False))
    for one in fetching:
        one.end()
    wait_until(lambda: first.status()["lent_bytes"] == 0, WAIT_S, "all claims are back")
    assert second.tier()["corrupt"] == 0
