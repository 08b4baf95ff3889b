"""What strangers and broken peers can say to a node, byte by byte: it costs them the connection."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from kvbm.peers import owner as owner_module
from kvbm.peers import wire
from kvbm.peers.greeting import Greeted, Greeter
from kvbm.peers.network import Announcement, peers_subject
from kvbm.peers.settings import PeerSettings, parse_node
from kvbm.protocol import FrameError, FrameReader, Message, encode
from runtime.events.memory import MemoryPlane
from storage_tiers.base import NOTE_BYTES_MAX, Chunk, Failed
from storage_tiers.testing import make_items, make_key
from storage_tiers.ucx_process import RemoteArena
from tests.kvbm.builders import WAIT_S, until
from tests.kvbm.peer_nodes import TOKEN, PeerNode

NOT_ME = b"n" * 16


@asynccontextmanager
async def stranger(
    node: PeerNode, *, role: str = wire.CONTROL, session: bytes = b""
) -> AsyncIterator[Greeted]:
    """A connection that was let in."""
    greeter = Greeter("stranger", NOT_ME, TOKEN)
    address = ("127.0.0.1", node.port)
    greeted = await greeter.greet(address, role, session=session)
    try:
        yield greeted
    finally:
        greeted.sock.close()


async def ended(greeted: Greeted) -> None:
    """The owner has closed the connection."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(WAIT_S):
        try:
            while await loop.sock_recv(greeted.sock, 1 << 16):
                pass
        except ConnectionError:
            return


async def serves(node: PeerNode) -> None:
    """It goes on giving others what they ask for."""
    items = make_items("still", 2, 4096)
    node.commit(items)
    async with stranger(node) as greeted:
        await wire.say(greeted.sock, claim(1, items[0].chunk.key + items[1].chunk.key))
        while not isinstance(
            answer := wire.decode_from_owner(
                await wire.next_body(greeted.sock, greeted.frames, greeted.bodies)
            ),
            wire.Claimed,
        ):
            pass
        assert len(answer.lent) == 2


def claim(number: int, keys: bytes, hold_s: float = 5.0) -> wire.Claim:
    return wire.Claim(number, keys, hold_s, by_nixl=False)


HELLO = wire.Hello(wire.VERSION, wire.CONTROL, "x", b"", b"n" * 16, b"")
BROKEN: dict[str, bytes] = {
    "no frame": b"GET / HTTP/1.1\r\n\r\n",
    "an empty frame": b"\0\0\0\0",
    "no message": b"\x01\0\0\0\xc1",
    "a frame beyond the bound": (wire.FRAME_BYTES_MAX + 1).to_bytes(4, "little"),
    "a second hello": encode(HELLO),
    "an owner's message": encode(wire.Pulled(1)),
    "bytes without a data connection": encode(wire.Pull(1)),
    "half a key": encode(claim(1, b"k" * 17)),
    "too many keys": encode(claim(1, b"k" * 16 * (wire.KEYS_PER_CLAIM_MAX + 1))),
    "for ever": encode(claim(1, b"k" * 16, hold_s=wire.CLAIM_S_MAX + 1)),
    "for no time": encode(claim(1, b"k" * 16, hold_s=0)),
    "for no number": encode(claim(1, b"k" * 16, hold_s=float("nan"))),
    "one number twice": 2 * encode(claim(1, b"k" * 16)),
    "more claims than may be open": b"".join(encode(claim(n, b"k" * 16)) for n in range(65)),
}


@pytest.mark.parametrize("said", BROKEN.values(), ids=list(BROKEN))
async def test_a_peer_that_breaks_the_protocol_loses_its_connection(said: bytes) -> None:
    node = PeerNode()
    async with node.running():
        async with stranger(node) as greeted:
            await asyncio.get_running_loop().sock_sendall(greeted.sock, said)
            await ended(greeted)
        assert node.meter.errors["peer_connection", "protocol"] == 1
        await serves(node)


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\n\r\n", encode(claim(1, b"")), (1 << 17).to_bytes(4, "little"), b""],
    ids=["http", "no hello", "too long", "nothing"],
)
async def test_a_stranger_without_a_hello_is_not_let_in(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_module, "GREET_TIMEOUT_S", 0.2)
    node = PeerNode()
    async with node.running():
        stream, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(said)
        async with asyncio.timeout(WAIT_S):
            await stream.read(-1)  # to its end, which only the owner makes
        writer.close()
        errors = node.meter.errors
        assert errors["peer_connection", "handshake"] + errors["peer_connection", "lost"] == 1
        await serves(node)


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (wire.Hello(99, wire.CONTROL, "x", b"", b"n" * 16, b""), "upgrade both sides"),
        (wire.Hello(wire.VERSION, wire.CONTROL, "x", b"", b"n" * 16, b"guess"), "token"),
    ],
    ids=["another version", "another token"],
)
async def test_a_refused_peer_is_told_why(hello: wire.Hello, why: str) -> None:
    node = PeerNode()
    async with node.running():
        stream, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(encode(hello))
        async with asyncio.timeout(WAIT_S):
            bodies = list(FrameReader().feed(await stream.read(-1)))
        challenge, refused = (wire.decode_from_owner(body) for body in bodies)
        assert isinstance(challenge, wire.Challenge) and isinstance(refused, wire.Refused)
        assert why in refused.reason
        writer.close()
        assert node.meter.errors["peer_connection", "refused"] == 1


async def test_bytes_are_given_only_for_open_claims_of_the_same_reader() -> None:
    node = PeerNode()
    items = make_items("mine", 1, 4096)
    node.commit(items)
    async with node.running(), stranger(node) as greeted:
        await wire.say(greeted.sock, claim(1, items[0].chunk.key))
        await until(lambda: node.dram.claims == 1)
        with pytest.raises(FrameError, match="control connection is gone"):
            async with stranger(node, role=wire.DATA, session=b"s" * 16):
                pass
        session = greeted.welcome.session
        async with stranger(node, role=wire.DATA, session=session) as data:
            await wire.say(data.sock, wire.Pull(2))
            answer = await wire.next_body(data.sock, data.frames, data.bodies)
            assert wire.decode_from_owner(answer) == wire.Pulled(0)
            await wire.say(data.sock, wire.Pull(1))
            loop, received = asyncio.get_running_loop(), bytearray()
            frame = encode(wire.Pulled(4096))
            async with asyncio.timeout(WAIT_S):
                while len(received) < len(frame) + 4096:
                    received += await loop.sock_recv(data.sock, 1 << 16)
            assert received == frame + bytes(items[0].data)


async def test_random_bytes_do_no_harm() -> None:
    source = random.Random(3)
    node = PeerNode()
    async with node.running():
        for _ in range(40):
            async with stranger(node) as greeted:
                said = bytearray(encode(claim(1, b"k" * 64)))
                for _ in range(source.randrange(1, 6)):
                    said[source.randrange(len(said))] = source.randrange(256)
                await asyncio.get_running_loop().sock_sendall(greeted.sock, bytes(said))
        await serves(node)
        await until(lambda: node.network.owner.readers == [])


def test_messages_survive_the_wire() -> None:
    messages: list[Message] = [
        wire.Challenge(1, b"i" * 16, b"n" * 16),
        wire.Welcome("node", b"i" * 16, b"s" * 16, 1 << 30, b"p" * 32),
        wire.Serves(RemoteArena(b"metadata", 1 << 40)),
        wire.Claimed(7, [wire.Lent(0, 4096, 8192, (1 << 64) - 1, bytes(16), 3)], [1, 2]),
        wire.Gone(b"k" * 32),
    ]
    for message in messages:
        (body,) = FrameReader().feed(encode(message))
        assert wire.decode_from_owner(body) == message


def test_what_is_lent_says_all_of_the_chunk() -> None:
    chunk = Chunk(make_key("a"), 8192, (1 << 64) - 1, make_key("parent"), 3)
    assert wire.Lent.of(0, 4096, chunk).chunk(chunk.key) == chunk
    root = Chunk(make_key("a"), 8192, 5, None, 0, b"its note")
    found = wire.Lent.of(0, 4096, root).chunk(root.key)
    assert found == root and found.note == root.note


def test_nodes_of_before_there_were_notes_understand_each_other() -> None:
    now = wire.Lent(0, 4096, 8192, 5, bytes(16), 3, b"note")
    before = (0, 4096, 8192, 5, bytes(16), 3)
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(before), type=wire.Lent)
    assert read == wire.Lent(*before) and read.note == b""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(now), type=_Before).position == 3


class _Before(msgspec.Struct, frozen=True, array_like=True):
    """`wire.Lent`, as it was."""

    index: int
    offset: int
    length: int
    checksum: int
    parent: bytes
    position: int


@pytest.mark.parametrize(
    "have",
    [wire.Have(b"k" * 16, b""), wire.Have(b"k" * 15, b""), wire.Have(b"k" * 16, bytes(8))],
    ids=["lists that differ", "half a key", "no length"],
)
def test_contents_that_are_none_are_refused(have: wire.Have) -> None:
    with pytest.raises(FrameError):
        wire.unpack_have(have)


@pytest.mark.parametrize("node", ["host", "host:", ":1", "host:0", "host:65536", "::1:5", "a b:1"])
def test_an_address_that_is_none_is_refused(node: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_node(node)


def test_addresses_are_hosts_and_ports() -> None:
    assert parse_node("node-7.example:9471") == ("node-7.example", 9471)
    assert parse_node("[fe80::1]:1") == ("fe80::1", 1)


@pytest.mark.parametrize("settings", [{}, {"token": "short"}], ids=["no token", "a short one"])
def test_peers_are_not_without_a_token(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="token"):
        PeerSettings.model_validate(settings)


@pytest.mark.parametrize(
    ("host", "port"),
    [("", 9471), ("127.0.0.1", 0), ("h" * 300, 9471)],
)
async def test_announcements_that_cannot_be_followed_are_counted(host: str, port: int) -> None:
    plane = MemoryPlane()
    node = PeerNode(plane=plane)
    async with node.running():
        await until(lambda: plane._subscriptions)
        said = Announcement("other", NOT_ME, host, port)
        plane.publish(peers_subject("test", "other"), msgspec.msgpack.encode(said))
        await until(lambda: node.meter.errors["peer_announcement", "malformed"] == 1)
        assert node.network.status() == []


@pytest.mark.parametrize("host", ["h" * 70, "a\0b", "..", "no.such.host.invalid"])
async def test_a_host_that_is_none_is_a_peer_that_is_away(host: str) -> None:
    plane = MemoryPlane()
    node = PeerNode(plane=plane)
    async with node.running():
        await until(lambda: plane._subscriptions)
        said = Announcement("other", NOT_ME, host, 9471)
        plane.publish(peers_subject("test", "other"), msgspec.msgpack.encode(said))
        await until(
            lambda: [s.problem for s in node.network.status()] not in ([], ["not connected yet"])
        )
        await serves(node)


async def test_an_owner_that_lends_nonsense_is_dropped() -> None:
    """One that knows the token, and is broken."""
    items = make_items("nonsense", 1, 4096)
    key = items[0].chunk.key
    nonsense = [
        wire.Lent(1, 0, 4096, 0, bytes(16), 0),  # was not asked for
        wire.Lent(0, -1, 4096, 0, bytes(16), 0),
        wire.Lent(0, 0, 4097, 0, bytes(16), 0),  # more than there is room for
        wire.Lent(0, 0, 4096, -1, bytes(16), 0),
        wire.Lent(0, 0, 4096, 0, b"short", 0),
        wire.Lent(0, 0, 4096, 0, bytes(16), 1 << 40),
        wire.Lent(0, 0, 4096, 0, bytes(16), 0, bytes(NOTE_BYTES_MAX + 1)),
    ]

    async def lend(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(wire.Challenge(wire.VERSION, b"o" * 16, wire.new_nonce())))
        frames = FrameReader()
        while data := await stream.read(1 << 16):
            for body in frames.feed(data):
                message = wire.decode_from_reader(body)
                if isinstance(message, wire.Hello):
                    proof = wire.proof(TOKEN, "owner", message.nonce)
                    writer.write(encode(wire.Welcome("o", b"o" * 16, b"s" * 16, 1 << 20, proof)))
                    writer.write(encode(wire.Have(key, (4096).to_bytes(8, "little"))))
                elif isinstance(message, wire.Claim):
                    writer.write(encode(wire.Claimed(message.number, [nonsense.pop()], [])))
        writer.close()

    server = await asyncio.start_server(lend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader = PeerNode("reader", nodes_at=[f"127.0.0.1:{port}"])
    async with reader.running():
        while nonsense:
            await until(lambda: reader.knows(items))
            [outcome], _ = await reader.load(items)
            assert isinstance(outcome, Failed)
        assert reader.meter.errors["peer", "lost"] == 7
    server.close()
