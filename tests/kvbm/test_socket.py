"""The control socket with real clients at its other end, well-behaved and otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvbm.client import SchedulerClient
from kvbm.daemon import ipc
from kvbm.daemon.ipc import ControlSocket, SocketError
from kvbm.protocol import (
    HERE,
    VERSION,
    Fence,
    Fenced,
    FrameReader,
    FromClient,
    FromDaemon,
    Hello,
    Lease,
    Leased,
    Match,
    MatchGroup,
    Ready,
    Refused,
    Share,
    Welcome,
    decode_from_daemon,
    encode,
)
from kvbm.session import Sessions
from kvbm.stand_in import StandIn
from storage_tiers.testing import make_key, store_all
from tests.kvbm.builders import (
    CHUNK_BYTES,
    WAIT_S,
    Node,
    background,
    chunks_of,
    keys_of,
    until,
)
from tests.kvbm.members import make_hello

MakeNode = Callable[..., Node]
ROOT = Path(__file__).parents[2]
ITEMS = chunks_of("a", 3)


@asynccontextmanager
async def serving(path: Path, node: Node, uid: int | None = None) -> AsyncIterator[Sessions]:
    """The daemon's part in this process."""
    sessions = Sessions(node.manager)
    control = ControlSocket(path, sessions, node.arena, node.meter, uid)
    control.bind()
    offloader, onboarder = node.manager.offloader, node.manager.onboarder
    async with background(control.serve, offloader.run, onboarder.run):
        yield sessions
    await until(lambda: not sessions.all)


@asynccontextmanager
async def engine(path: Path) -> AsyncIterator[StandIn]:
    """A scheduler's and a worker's real client."""
    stand_in = StandIn(path, CHUNK_BYTES)
    await asyncio.to_thread(stand_in.__enter__)
    try:
        yield stand_in
    finally:
        await asyncio.to_thread(stand_in.__exit__)


class Raw:
    """A peer that says whatever bytes it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader()
        self._heard: list[FromDaemon] = []

    def say(self, *messages: FromClient | bytes) -> None:
        for message in messages:
            self._writer.write(message if isinstance(message, bytes) else encode(message))

    async def hear(self) -> FromDaemon | None:
        """The daemon's next message; None once it has closed the connection."""
        async with asyncio.timeout(WAIT_S):
            while not self._heard:
                try:
                    data = await self._reader.read(1 << 16)
                except ConnectionError:
                    return None
                if not data:
                    return None
                self._heard += map(decode_from_daemon, self._frames.feed(data))
        return self._heard.pop(0)

    def hang_up(self) -> None:
        self._writer.close()


@asynccontextmanager
async def raw(path: Path, hello: Hello | None = None) -> AsyncIterator[Raw]:
    """A connection, welcomed if it comes with a hello."""
    peer = Raw(*await asyncio.open_unix_connection(path))
    try:
        if hello is not None:
            peer.say(hello)
            assert isinstance(await peer.hear(), Welcome)
        yield peer
    finally:
        peer.hang_up()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "s"


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


async def assert_works(stand_in: StandIn, name: str) -> None:
    items = chunks_of(name, 2)
    await asyncio.to_thread(stand_in.store, items)
    found = await asyncio.to_thread(stand_in.fetch, keys_of(items))
    assert found == [bytes(item.data) for item in items]


# -- the way of a chunk -----------------------------------------------------------------


async def test_what_one_engine_stores_another_finds_in_the_same_memory(
    path: Path, node: Node
) -> None:
    async with serving(path, node), engine(path) as one, engine(path) as other:
        assert await asyncio.to_thread(one.fetch, keys_of(ITEMS)) == [None] * 3
        await asyncio.to_thread(one.store, ITEMS)
        await until(lambda: all(node.dram.find(keys_of(ITEMS))))
        await node.settle()
        # Sealed by the daemon over the bytes that the engine wrote through its own mapping.
        assert node.dram.find(keys_of(ITEMS)) == [item.chunk for item in ITEMS]
        for stand_in in (one, other):
            found = await asyncio.to_thread(stand_in.fetch, keys_of(ITEMS))
            assert found == [bytes(item.data) for item in ITEMS]
        assert one.client.epoch == other.client.epoch == node.arena.epoch
        await until(lambda: node.dram.claims == 0)
    assert node.dram.leased_bytes == 0
    for memory in node.memories:
        assert memory.contents.keys() == set(keys_of(ITEMS))


async def test_an_engine_finds_what_only_lower_tiers_have(path: Path, node: Node) -> None:
    await store_all(node.memories[0], ITEMS[:1])
    await store_all(node.memories[1], ITEMS[1:])
    node.memories[1].contents[ITEMS[2].chunk.key][0] ^= 1
    async with serving(path, node), engine(path) as stand_in:
        found = await asyncio.to_thread(stand_in.fetch, keys_of(ITEMS))
        assert found == [ITEMS[0].data, ITEMS[1].data, None]


async def test_a_found_chunk_is_held_until_the_engine_forgets_it(path: Path, node: Node) -> None:
    node.commit(ITEMS)
    async with serving(path, node), engine(path) as stand_in:
        client, keys = stand_in.client, keys_of(ITEMS)
        lookup = client.look_up([MatchGroup(16, 0, b"".join(keys))], keys)
        assert lookup is not None
        await asyncio.to_thread(stand_in.wait, lambda: lookup.answered, "an answer")
        assert list(lookup.states) == [HERE] * 3
        await until(lambda: node.is_idle)
        assert node.dram.claims == 3
        client.forget(lookup)
        client.forget(lookup)
        await until(lambda: node.dram.claims == 0)


async def test_the_arena_is_passed_to_workers_alone(path: Path, node: Node) -> None:
    async with serving(path, node):
        for role, count in (("scheduler", 0), ("worker", 1)):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, str(path))
                await loop.sock_sendall(sock, encode(make_hello(role)))
                got: list[int] = []

                def answered(sock: socket.socket = sock, got: list[int] = got) -> bool:
                    with contextlib.suppress(BlockingIOError):
                        data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
                        got.extend(fds)
                        return bool(data)
                    return False

                await until(answered)
                assert len(got) == count
                for fd in got:
                    assert os.fstat(fd).st_size == os.fstat(node.arena.fd).st_size
                    os.close(fd)


# -- those that end ---------------------------------------------------------------------


async def test_what_a_killed_engine_held_is_free_within_a_second(path: Path, node: Node) -> None:
    async with serving(path, node) as sessions:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.kvbm.holding_child", str(path)),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout is not None
        try:
            async with asyncio.timeout(30):
                assert await child.stdout.readline() == b"holding\n"
            await node.settle()
            assert node.dram.claims == 4
            assert node.dram.leased_bytes > 0
        finally:
            child.kill()
        await until(lambda: not sessions.all, within_s=1.0)
        assert node.dram.claims == node.dram.leased_bytes == 0
        await child.wait()
        async with engine(path) as stand_in:
            await assert_works(stand_in, "after")


async def test_leased_slots_wait_for_a_worker_that_still_writes(path: Path, node: Node) -> None:
    async with serving(path, node) as sessions, raw(path, make_hello()) as worker:
        async with raw(path, make_hello("scheduler")) as scheduler:
            assert isinstance(await scheduler.hear(), Ready)
            assert isinstance(await scheduler.hear(), Share)
            scheduler.say(Lease(CHUNK_BYTES, 2))
            assert isinstance(await scheduler.hear(), Leased)
        assert await worker.hear() == Fence()
        await asyncio.sleep(0.05)
        assert node.dram.leased_bytes == 2 * CHUNK_BYTES
        worker.say(Fenced())
        assert await worker.hear() is None
        await until(lambda: not sessions.all)
        assert node.dram.leased_bytes == 0


async def test_a_scheduler_loses_its_connection_with_its_worker(path: Path, node: Node) -> None:
    async with serving(path, node), raw(path, make_hello("scheduler")) as scheduler:
        async with raw(path, make_hello()):
            assert isinstance(await scheduler.hear(), Ready)
            assert isinstance(await scheduler.hear(), Share)
        assert await scheduler.hear() is None


async def test_a_member_whose_engine_ends_while_it_is_welcomed_is_sent_away(
    path: Path, node: Node
) -> None:
    """It has joined, but its transport is not made yet: closing it must not be forgotten."""
    sessions = Sessions(node.manager)
    worker = ipc._Connection(make_hello(), sessions, node.meter)
    scheduler = ipc._Connection(make_hello("scheduler", world_size=1), sessions, node.meter)
    worker.join()
    scheduler.join()
    sessions.leave(worker)
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_unix_connection(lambda: scheduler, sock=ours)
        try:
            async with asyncio.timeout(60):
                while await loop.sock_recv(theirs, 1 << 16):
                    pass
        finally:
            transport.close()
    await until(lambda: not sessions.all)


# -- those that misbehave ---------------------------------------------------------------

NO_UTF_8 = frame(b"\x91\xa6\xff\xff\xff\xff\xff\xff")
NESTED = frame(b"\x92\xa6Fenced" + b"\x91" * 100_000 + b"\xc0")


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"\xff\xff\xff\xff", id="oversized"),
        pytest.param(frame(b"garbage"), id="garbage"),
        pytest.param(frame(b""), id="empty"),
        pytest.param(NO_UTF_8, id="no utf-8"),
        pytest.param(NESTED, id="nested"),
        pytest.param(encode(make_hello("scheduler")), id="second hello"),
        pytest.param(encode(Lease(CHUNK_BYTES, 1)), id="lease before ready"),
        pytest.param(encode(Match(1, [])), id="empty match"),
        pytest.param(encode(Welcome(VERSION, b"", 1)), id="a message of the daemon"),
    ],
)
async def test_a_member_that_breaks_the_protocol_loses_only_its_own_connection(
    path: Path, node: Node, said: bytes
) -> None:
    async with serving(path, node) as sessions, engine(path) as good:
        bad_hello = make_hello("scheduler", engine="bad")
        async with raw(path, bad_hello) as bad:
            bad.say(said)
            assert await bad.hear() is None
        await until(lambda: len(sessions.all) == 1)
        assert node.meter.errors == {("connection", "protocol"): 1}
        await assert_works(good, "good")


async def test_a_worker_that_gives_orders_loses_its_connection(path: Path, node: Node) -> None:
    async with serving(path, node), raw(path, make_hello()) as worker:
        worker.say(Match(1, [MatchGroup(16, 0, make_key("a"))]))
        assert await worker.hear() is None
    assert node.meter.errors == {("connection", "protocol"): 1}


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"\xff\xff\xff\xff", id="oversized"),
        pytest.param(frame(b"garbage"), id="garbage"),
        pytest.param(NO_UTF_8, id="no utf-8"),
        pytest.param(NESTED, id="nested"),
        pytest.param(encode(Lease(CHUNK_BYTES, 1)), id="no hello first"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http"),
        pytest.param(encode(make_hello())[:-1], id="half a hello"),
    ],
)
async def test_a_peer_that_does_not_greet_is_not_let_in(
    path: Path, node: Node, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "HELLO_TIMEOUT_S", 0.2)  # for those that seem to say more
    async with serving(path, node), engine(path) as good:
        async with raw(path) as bad:
            bad.say(said)
            assert await bad.hear() is None
        await until(lambda: node.meter.errors == {("connection", "handshake"): 1})
        await assert_works(good, "good")


async def test_a_silent_peer_is_sent_away(
    path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "HELLO_TIMEOUT_S", 0.1)
    async with serving(path, node), raw(path) as silent:
        assert await silent.hear() is None
    assert node.meter.errors == {("connection", "handshake"): 1}


async def test_a_refused_peer_is_told_why(path: Path, node: Node) -> None:
    async with serving(path, node), raw(path, make_hello("scheduler")) as first:
        async with raw(path) as second:
            second.say(make_hello("scheduler"))
            refused = await second.hear()
            assert isinstance(refused, Refused)
            assert "scheduler connected already" in refused.reason
            assert await second.hear() is None
        assert node.meter.errors == {("connection", "refused"): 1}
        async with raw(path, make_hello()):
            assert isinstance(await first.hear(), Ready), "the first one is still there"


async def test_a_client_of_another_protocol_learns_what_to_do(path: Path, node: Node) -> None:
    old = make_hello("scheduler", version=VERSION + 1)
    client = SchedulerClient(str(path), lambda: old, [1])
    async with serving(path, node):
        client.start()
        try:
            await until(lambda: "upgrade both sides" in client._link.problem)
            client.pump()
            assert not client.ready
            assert client.look_up([MatchGroup(16, 0, make_key("a"))], [make_key("a")]) is None
        finally:
            await asyncio.to_thread(client.close)


async def test_another_users_process_is_refused(path: Path, node: Node) -> None:
    async with serving(path, node, uid=os.getuid() + 1) as sessions:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.connect(str(path))
            peer.sendall(encode(make_hello()))
            peer.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(WAIT_S):
                heard = await loop.sock_recv(peer, 1 << 16)
                with contextlib.suppress(ConnectionResetError):
                    assert await loop.sock_recv(peer, 1 << 16) == b""
        [refused] = map(decode_from_daemon, FrameReader().feed(heard))
        assert isinstance(refused, Refused)
        assert f"user {os.getuid()} may not use" in refused.reason
        assert not sessions.all
    assert node.meter.errors == {("connection", "refused"): 1}


async def test_a_peer_that_does_not_read_its_answers_loses_its_connection(
    path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "UNREAD_BYTES_MAX", 1 << 16)
    keys = b"".join(make_key(index) for index in range(1000))
    async with serving(path, node) as sessions, engine(path) as good:
        async with raw(path, make_hello("scheduler", engine="deaf")) as deaf:
            for ticket in range(1000):
                deaf.say(Match(ticket, [MatchGroup(16, 0, keys)]))
            await until(lambda: node.meter.errors == {("connection", "protocol"): 1})
        await until(lambda: len(sessions.all) == 1)
        await assert_works(good, "good")


async def test_connections_beyond_the_bound_are_closed_and_counted(
    path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "CONNECTIONS_MAX", 2)
    async with serving(path, node), raw(path, make_hello("scheduler")), raw(path) as second:
        async with raw(path) as third:
            assert await third.hear() is None
        assert node.meter.errors == {("accept", "too_many_connections"): 1}
        second.say(make_hello())
        assert isinstance(await second.hear(), Welcome)
        second.hang_up()
        await until(lambda: node.meter.errors)

        async def welcomed() -> bool:
            async with raw(path) as later:
                later.say(make_hello(engine="later"))
                return isinstance(await later.hear(), Welcome)

        async with asyncio.timeout(WAIT_S):
            while not await welcomed():
                await asyncio.sleep(0.01)


# -- the socket itself ------------------------------------------------------------------


def mode_of(path: Path) -> int | None:
    """Who may use it; None if it is not there."""
    return path.stat().st_mode & 0o777 if path.exists() else None


async def test_the_socket_is_its_users_alone_and_goes_with_the_daemon(
    path: Path, node: Node
) -> None:
    async with serving(path, node), raw(path, make_hello()):
        assert mode_of(path) == 0o600
        assert mode_of(path.parent) == 0o700
    assert mode_of(path) is None


async def test_a_socket_left_by_a_dead_daemon_is_replaced(path: Path, node: Node) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    assert mode_of(path) is not None
    async with serving(path, node), engine(path) as stand_in:
        await assert_works(stand_in, "a")


async def test_a_second_daemon_at_the_same_place_does_not_start(
    path: Path, make_node: MakeNode
) -> None:
    node, other = make_node(), make_node()
    async with serving(path, node):
        with pytest.raises(SocketError, match="another daemon listens"):
            async with serving(path, other):
                pass
        async with engine(path) as stand_in:
            await assert_works(stand_in, "a")
            assert stand_in.client.epoch == node.arena.epoch


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_socket_is_not_removed(path: Path, node: Node, kind: str) -> None:
    path.parent.mkdir()
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    control = ControlSocket(path, Sessions(node.manager), node.arena, node.meter)
    with pytest.raises(SocketError, match="is no socket"):
        control.bind()
    assert path.exists()


def test_a_path_too_long_for_a_socket_is_refused_with_its_name(tmp_path: Path, node: Node) -> None:
    path = tmp_path / ("x" * 120)
    control = ControlSocket(path, Sessions(node.manager), node.arena, node.meter)
    with pytest.raises(SocketError, match="xxx"):
        control.bind()


async def test_stopping_sends_everyone_away(path: Path, node: Node) -> None:
    async with contextlib.AsyncExitStack() as peers:
        async with serving(path, node):
            members = [
                await peers.enter_async_context(raw(path, make_hello(role)))
                for role in ("scheduler", "worker")
            ]
            members.append(await peers.enter_async_context(raw(path)))
            await asyncio.sleep(0.02)
        for member in members:
            while await member.hear() is not None:
                pass
    assert node.dram.leased_bytes == 0


# -- without a daemon -------------------------------------------------------------------


async def test_without_the_daemon_every_lookup_is_a_miss_until_it_is_back(
    path: Path, make_node: MakeNode
) -> None:
    first, second = make_node(), make_node()
    first.commit(ITEMS)
    keys = keys_of(ITEMS)
    groups = [MatchGroup(16, 0, b"".join(keys))]
    async with contextlib.AsyncExitStack() as stack:
        async with serving(path, first):
            stand_in = await stack.enter_async_context(engine(path))
            client = stand_in.client
            await assert_works(stand_in, "before")
            lookup = client.look_up(groups, keys)
            assert lookup is not None
            await asyncio.to_thread(stand_in.wait, lambda: lookup.answered, "an answer")
            assert client.holds(lookup)
            assert client.take_slots(0, 1)
        await asyncio.to_thread(stand_in.wait, lambda: not client.ready, "the end is noticed")
        assert not client.holds(lookup)
        assert list(lookup.states) == [0] * 3 and not lookup.rows
        assert client.look_up(groups, keys) is None
        assert client.take_slots(0, 1) == []
        client.commit([])
        client.forget(lookup)
        await until(lambda: client._link.problem)
        async with serving(path, second):
            await asyncio.to_thread(stand_in.wait, lambda: client.ready, "it has come back")
            assert client.epoch == second.arena.epoch != first.arena.epoch
            assert await asyncio.to_thread(stand_in.fetch, keys) == [None] * 3
            await assert_works(stand_in, "after")


async def test_a_client_started_before_its_daemon_finds_it(path: Path, node: Node) -> None:
    stand_in = StandIn(path, CHUNK_BYTES)
    entering = asyncio.ensure_future(asyncio.to_thread(stand_in.__enter__))
    try:
        await until(lambda: stand_in.client._link.problem)
        async with serving(path, node):
            async with asyncio.timeout(WAIT_S):
                await entering
            await assert_works(stand_in, "a")
    finally:
        await asyncio.wait([entering])
        await asyncio.to_thread(stand_in.__exit__)
