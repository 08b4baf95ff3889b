"""Strangers on the control socket of a real daemon: frames nobody should send, and other users.

Whatever is said, in whatever order, costs at most the connection it was said on: the daemon lives,
takes back what was lent, serves its other engines, and has counted and logged the breach.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbm import protocol
from kvbm.fingerprint import key_of, namespace_of
from kvbm.protocol import (
    FRAME_BYTES_MAX,
    Commit,
    Fenced,
    FrameReader,
    FromClient,
    GiveBack,
    Hello,
    Lease,
    Loaded,
    Match,
    MatchGroup,
    Ready,
    Refused,
    Unmatch,
    decode_from_daemon,
    encode,
)
from kvbm.stand_in import StandIn
from storage_tiers.base import KEY_BYTES, StoreItem
from storage_tiers.testing import make_items
from tests.faults.conftest import CHUNK, WAIT_S, Watched, keys_of, making_daemons
from tests.kvbm.members import make_hello
from tests.waiting import wait_until

EXAMPLES = 60
ENGINE = "fuzz"

numbers = st.one_of(st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, 64))
slots = st.one_of(
    st.binary(max_size=120),
    st.integers(0, 4).flatmap(lambda n: st.binary(min_size=29 * n, max_size=29 * n)),
)
keys = st.one_of(st.binary(max_size=70), st.integers(0, 4).map(lambda n: bytes(KEY_BYTES * n)))
groups = st.lists(st.builds(MatchGroup, numbers, numbers, keys), max_size=4)
hellos = st.builds(
    Hello,
    st.sampled_from([protocol.VERSION, 0, 1 << 40]),
    st.sampled_from(["scheduler", "worker", "", "root"]),
    st.text(max_size=8),
    numbers,
    numbers,
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
    st.lists(numbers, max_size=4),
    st.booleans(),
    numbers,
)
messages = st.one_of(
    st.builds(Match, numbers, groups),
    st.builds(Unmatch, st.lists(numbers, max_size=4)),
    st.builds(Lease, st.one_of(st.just(CHUNK), numbers), numbers),
    st.builds(Commit, keys, keys, st.lists(numbers, max_size=4), slots),
    st.builds(GiveBack, slots),
    st.builds(Loaded, numbers, numbers),
    st.just(Fenced()),
    hellos,
)


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A frame with one thing wrong: cut, a byte changed, a false or far too large length."""
    whole = bytearray(encode(draw(messages)))
    what = draw(st.sampled_from(["cut", "flip", "length", "oversized"]))
    if what == "cut":
        return bytes(whole[: draw(st.integers(0, len(whole) - 1))])
    if what == "flip":
        whole[draw(st.integers(4, len(whole) - 1))] ^= draw(st.integers(1, 255))
    elif what == "length":
        whole[:4] = struct.pack("<I", draw(st.integers(0, 2 * len(whole))))
    else:
        whole[:4] = struct.pack("<I", draw(st.integers(FRAME_BYTES_MAX + 1, (1 << 32) - 1)))
    return bytes(whole)


frames = st.one_of(
    messages.map(encode),
    spoilt(),
    st.binary(max_size=200).map(framed),
    st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=8)
    .filter(lambda value: not isinstance(value, int) or -(1 << 63) <= value < 1 << 64)
    .map(lambda value: framed(_packed(value))),
)


def _packed(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError):
        return b"\xc1"  # msgpack's byte that means nothing


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One for all frames: what one example leaves behind meets the next."""
    with making_daemons(tmp_path_factory.mktemp("socket")) as make:
        daemon = make(ssd=None)
        daemon.start()
        yield daemon
        daemon.process.check()


class Peer:
    """A connection that says anything."""

    def __init__(self, daemon: Watched, hello: FromClient | bytes | None) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(WAIT_S)
        self._sock.connect(str(daemon.socket))
        self._frames = FrameReader()
        if hello is not None:
            self.say(hello if isinstance(hello, bytes) else encode(hello))

    def say(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # sent away before
            self._sock.sendall(data)

    def hear(self, kind: type) -> None:
        """Wait for a message of this kind."""
        while True:
            for body in self._frames.feed(self._sock.recv(1 << 16) or pytest.fail("sent away")):
                if isinstance(decode_from_daemon(body), kind):
                    return

    def leave(self) -> None:
        """Say no more, and wait until the daemon has closed too: it may not keep us for ever."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while self._sock.recv(1 << 16):
                pass
        self._sock.close()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    said=st.lists(st.tuples(st.booleans(), frames), min_size=1, max_size=12),
    greets=st.sampled_from(["engine", "engine", "scheduler", "worker", "nobody"]),
)
def test_frames_that_nobody_should_send_cost_their_connection_at_most(
    daemon: Watched, said: list[tuple[bool, bytes]], greets: str
) -> None:
    """Each frame goes to the scheduler's or the worker's connection of an engine, ready or not."""
    hello = make_hello("scheduler", engine=ENGINE, group_bytes=[CHUNK])
    work = make_hello("worker", engine=ENGINE, group_bytes=[CHUNK])
    first = Peer(daemon, hello if greets in {"engine", "scheduler"} else None)
    second = Peer(daemon, work if greets in {"engine", "worker"} else None)
    if greets == "engine":
        first.hear(Ready)
    for to_first, data in said:
        (first if to_first else second).say(data)
    first.leave()
    second.leave()
    daemon.process.check()


def test_after_all_that_everything_was_taken_back_and_told(daemon: Watched) -> None:
    wait_until(lambda: daemon.engines() == 0, WAIT_S, "no engine is left")
    items = make_items("after the fuzz", 8, CHUNK)
    with StandIn(daemon.socket, CHUNK) as engine:
        engine.store(items)
        assert engine.fetch(keys_of(items)) == [bytes(item.data) for item in items]
    wait_until(lambda: daemon.leased_bytes() == 0, WAIT_S, "no slot is lent")
    assert daemon.counted("kvbm_claims") == 0
    assert daemon.counted("kvbm_errors_total", op="connection", kind="protocol") > 0
    assert daemon.counted("kvbm_errors_total", op="connection", kind="handshake") > 0
    assert daemon.said("protocol_violation") and daemon.said("handshake_failed")
    assert "Traceback" not in daemon.process.log.read_text()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_process_of_another_user_is_refused_although_it_can_connect(daemon: Watched) -> None:
    daemon.socket.chmod(0o666)
    daemon.socket.parent.chmod(0o755)
    said = encode(make_hello("scheduler", engine="stranger"))
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(30); "
        "s.connect(sys.argv[1]); s.sendall(bytes.fromhex(sys.argv[2])); "
        "sys.stdout.buffer.write(s.recv(1 << 16))"
    )
    heard = subprocess.run(
        [sys.executable, "-I", "-c", script, str(daemon.socket), said.hex()],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        timeout=WAIT_S,
        check=True,
        cwd="/",
    )
    (refused,) = map(decode_from_daemon, FrameReader().feed(heard.stdout))
    assert isinstance(refused, Refused) and "user 65534 may not use" in refused.reason
    daemon.await_counted("kvbm_errors_total", op="connection", kind="refused")
    assert any("user 65534" in line["reason"] for line in daemon.said("peer_refused"))


def test_engines_whose_layouts_differ_share_a_daemon_and_no_chunk(daemon: Watched) -> None:
    """Equal tokens, so equal block hashes; another layout, so another fingerprint."""
    hashes = [index.to_bytes(32, "big") for index in range(6)]
    fingerprints = [{"model": "m", "layout": layout} for layout in ("NHD", "HND")]
    stores = [
        [
            StoreItem(replace(item.chunk, key=key_of(namespace_of(how), digest, 0)), item.data)
            for item, digest in zip(
                make_items(str(length), 6, length, chained=False), hashes, strict=True
            )
        ]
        for length, how in zip((CHUNK, CHUNK // 2), fingerprints, strict=True)
    ]
    with StandIn(daemon.socket, CHUNK) as large, StandIn(daemon.socket, CHUNK // 2) as small:
        large.store(stores[0])
        assert small.fetch(keys_of(stores[1])) == [None] * 6
        small.store(stores[1])
        for engine, items in ((large, stores[0]), (small, stores[1])):
            wait_until(partial(_gives, engine, items), WAIT_S, "its own chunks")


def _gives(engine: StandIn, items: list[StoreItem]) -> bool:
    return engine.fetch(keys_of(items)) == [bytes(item.data) for item in items]
