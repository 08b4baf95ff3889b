"""The event plane over ZMQ, without a broker: every program publishes, and listens to its peers.

One task binds the PUB socket, again and again if the address is taken, and sends what is queued;
one task for each peer reads its own SUB socket, which connects for as long as the peer is listed.
A message is `[subject, publisher id, sequence, frame]` with the reference's frame and envelope
(`envelope.py`). The sequence counts the publisher's messages on that subject: PUB drops what a
slow listener has no room for, and the listener counts what is missing. Own messages are delivered
here without a socket. A peer's messages come from the moment it is connected.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from runtime.events.base import SUBSCRIPTION_MESSAGES, Message, PlaneStatus, Subscription, matches
from runtime.events.envelope import (
    PUBLISHER_ID_MAX,
    Envelope,
    WireError,
    decode_envelope,
    decode_frame,
    encode_envelope,
    encode_frame,
)
from runtime.events.outbox import Outbox
from runtime.events.settings import EventPlaneSettings
from runtime.tasks import end

MESSAGE_BYTES_MAX: Final = 64 << 20
SUBJECTS_MAX: Final = 4096  # whose sequences are kept, of one publisher
SOCKETS_MAX: Final = 8192  # each peer takes three
BURST_MESSAGES_MAX: Final = 256
RETRY_S: Final = 0.1  # doubles up to
RETRY_S_MAX: Final = 2.0
CLOSE_LINGER_S: Final = 1.0
HEARTBEAT_S: Final = 5.0
HEARTBEAT_TIMEOUT_S: Final = 15.0
_PARTS: Final = 4

_log = structlog.get_logger()


class ZmqPlane:
    def __init__(self, settings: EventPlaneSettings, name: str) -> None:
        """`name` is this program's in its own log."""
        self._settings = settings
        self._name = name
        self._publisher_id = secrets.randbelow(PUBLISHER_ID_MAX + 1)
        self._sequences: dict[str, int] = {}
        self._outbox = Outbox(settings.queue_messages, settings.queue_bytes)
        self._subscriptions: list[Subscription] = []
        self._peers: dict[str, _Peer] = {}
        self._wake = asyncio.Event()
        self._context: Any = None
        self._async_context: Any = None  # the same one, with sockets that are awaited
        self._listening: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._address: str | None = None
        self._bound = asyncio.Event()
        self._error: str | None = "not bound yet"
        self._missed_total = 0  # of peers that are listed no more
        self._malformed_total = 0

    async def start(self) -> None:
        assert self._task is None, "started already"
        self._context = zmq.Context()
        self._context.max_sockets = SOCKETS_MAX
        self._async_context = zmq.asyncio.Context(self._context)
        self._task = asyncio.create_task(self._run(), name="event-plane-zmq")
        for address in self._settings.zmq_peers:
            self.add_peer(address)
        for subscription in self._subscriptions:
            subscription.active.set()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        await end(task)
        for address in list(self._peers):
            self.remove_peer(address)
        await asyncio.gather(*self._listening, return_exceptions=True)
        # The sockets' linger bounds this wait: what PUB holds is sent, or given up.
        await asyncio.to_thread(self._context.term)
        for subscription in list(self._subscriptions):
            subscription.close()

    @property
    def address(self) -> str | None:
        return self._address

    async def bound(self) -> str:
        await self._bound.wait()
        assert self._address is not None
        return self._address

    def add_peer(self, address: str) -> None:
        if address in self._peers:
            return
        assert self._task is not None, "peers are added to a plane that is started"
        peer = _Peer(address)
        self._peers[address] = peer
        peer.task = asyncio.create_task(self._listen(peer), name=f"event-plane-zmq {address}")
        self._listening.add(peer.task)
        peer.task.add_done_callback(self._listening.discard)

    def remove_peer(self, address: str) -> None:
        peer = self._peers.pop(address, None)
        if peer is not None and peer.task is not None:
            peer.task.cancel()
            self._missed_total += peer.missed_total
            self._malformed_total += peer.malformed_total

    def publish(self, subject: str, payload: bytes) -> bool:
        if not self._outbox.put(Message(subject, payload), self._error):
            return False
        self._wake.set()
        return True

    def subscribe(self, subject: str, limit: int = SUBSCRIPTION_MESSAGES) -> Subscription:
        subscription = Subscription(subject, limit, self._unsubscribe)
        self._subscriptions.append(subscription)
        for peer in self._peers.values():
            peer.subscribe(subject)
        if self._task is not None:
            subscription.active.set()
        return subscription

    def status(self) -> PlaneStatus:
        peers = self._peers.values()
        away = [peer for peer in peers if not peer.connected]
        error = self._error
        if error is None and away:
            error = f"{away[0].address}: {away[0].error}"
            if len(away) > 1:
                error += f", and {len(away) - 1} more of {len(peers)} peers"
        return PlaneStatus(
            kind="zmq",
            connected=self._address is not None and not away,
            error=error,
            published_total=self._outbox.sent_total,
            dropped_total=self._outbox.dropped_total,
            queued=len(self._outbox),
            queue_limit=self._outbox.messages_max,
            missed_total=self._missed_total + sum(peer.missed_total for peer in peers),
            malformed_total=self._malformed_total + sum(peer.malformed_total for peer in peers),
        )

    # -- publishing -----------------------------------------------------------------------

    async def _run(self) -> None:
        publisher = self._context.socket(zmq.PUB)
        publisher.linger = int(CLOSE_LINGER_S * 1000)
        publisher.sndhwm = self._settings.zmq_high_water_messages
        try:
            await self._bind(publisher)
            while True:
                self._wake.clear()
                self._send_burst(publisher)
                if len(self._outbox):
                    await asyncio.sleep(0)
                else:
                    await self._wake.wait()
        finally:
            if self._address is not None:
                while len(self._outbox):
                    self._send_burst(publisher)
            publisher.close()

    async def _bind(self, publisher: Any) -> None:
        retry_s = RETRY_S
        while True:
            try:
                publisher.bind(self._settings.zmq_bind)
            except zmq.ZMQError as error:
                reason = f"{self._settings.zmq_bind}: {error}"
                if reason != self._error:
                    _log.warning("event_plane_unbound", program=self._name, reason=reason)
                self._error = reason
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_S_MAX)
            else:
                self._address = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
                self._error = None
                self._bound.set()
                _log.info("event_plane_bound", program=self._name, address=self._address)
                return

    def _send_burst(self, publisher: Any) -> None:
        """A send to PUB never waits: it goes to each listener that has room."""
        burst = self._outbox.burst(BURST_MESSAGES_MAX)
        for message in burst:
            publisher.send_multipart(self._parts(message), zmq.NOBLOCK)
            self._deliver(message)
        self._outbox.done(len(burst))

    def _parts(self, message: Message) -> list[bytes]:
        if message.subject not in self._sequences and len(self._sequences) >= SUBJECTS_MAX:
            # To listeners this is another publisher: nothing is taken for missing.
            self._sequences.clear()
            self._publisher_id = secrets.randbelow(PUBLISHER_ID_MAX + 1)
        sequence = self._sequences.get(message.subject, 0)
        self._sequences[message.subject] = sequence + 1
        now_ms = time.time_ns() // 1_000_000
        envelope = Envelope(message.subject, self._publisher_id, sequence, now_ms, message.payload)
        return [
            message.subject.encode(),
            self._publisher_id.to_bytes(8, "big"),
            sequence.to_bytes(8, "big"),
            encode_frame(encode_envelope(envelope)),
        ]

    # -- listening ------------------------------------------------------------------------

    async def _listen(self, peer: _Peer) -> None:
        socket = self._async_context.socket(zmq.SUB)
        monitor = None
        try:
            socket.linger = 0
            socket.rcvhwm = self._settings.zmq_high_water_messages
            socket.maxmsgsize = MESSAGE_BYTES_MAX
            socket.reconnect_ivl = int(RETRY_S * 1000)
            socket.reconnect_ivl_max = int(RETRY_S_MAX * 1000)
            socket.heartbeat_ivl = int(HEARTBEAT_S * 1000)
            socket.heartbeat_timeout = int(HEARTBEAT_TIMEOUT_S * 1000)
            for subscription in self._subscriptions:
                socket.subscribe(_prefix(subscription.subject))
            peer.socket = socket
            monitor = socket.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            )
            socket.connect(peer.address)
            async with asyncio.TaskGroup() as group:
                group.create_task(_watch(peer, monitor))
                group.create_task(self._receive(peer, socket))
        except zmq.ZMQError as error:
            # No address at all; the peer stays listed, and away.
            peer.error = str(error)
            _log.warning("event_peer_refused", address=peer.address, reason=peer.error)
        finally:
            peer.socket = None
            peer.connected = False
            if monitor is not None:
                socket.disable_monitor()
                monitor.close(linger=0)
            socket.close(linger=0)

    async def _receive(self, peer: _Peer, socket: Any) -> None:
        while True:
            parts = await socket.recv_multipart()
            try:
                envelope = _decode(parts)
            except WireError as error:
                if not peer.malformed_total:
                    _log.warning("event_malformed", address=peer.address, reason=str(error))
                peer.malformed_total += 1
                continue
            # A list of peers may name this program too; its own messages were delivered.
            if envelope.publisher_id != self._publisher_id:
                peer.note(envelope)
                self._deliver(Message(envelope.topic, envelope.payload))

    def _deliver(self, message: Message) -> None:
        for subscription in self._subscriptions:
            if matches(subscription.subject, message.subject):
                subscription.deliver(message)

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.remove(subscription)
        subscription.active.clear()
        for peer in self._peers.values():
            peer.unsubscribe(subscription.subject)


@dataclass(slots=True)
class _Peer:
    """One publisher that is listened to, and the place in its messages."""

    address: str
    task: asyncio.Task[None] | None = None
    socket: Any = None
    connected: bool = False
    error: str = "not connected yet"
    missed_total: int = 0
    malformed_total: int = 0
    expected: dict[tuple[int, str], int] = field(default_factory=dict)

    def note(self, envelope: Envelope) -> None:
        """Count what is missing before this message of its publisher and subject."""
        place = (envelope.publisher_id, envelope.topic)
        expected = self.expected.get(place)
        if expected is None:
            if len(self.expected) >= SUBJECTS_MAX:
                self.expected.clear()
        elif envelope.sequence > expected:
            self.missed_total += envelope.sequence - expected
        self.expected[place] = envelope.sequence + 1

    def subscribe(self, subject: str) -> None:
        if self.socket is not None:
            self.socket.subscribe(_prefix(subject))

    def unsubscribe(self, subject: str) -> None:
        if self.socket is not None:
            self.socket.unsubscribe(_prefix(subject))


async def _watch(peer: _Peer, monitor: Any) -> None:
    while True:
        event = await recv_monitor_message(monitor)
        peer.connected = event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        peer.error = "" if peer.connected else "disconnected"
        _log.info("event_peer", address=peer.address, connected=peer.connected)


def _decode(parts: list[bytes]) -> Envelope:
    """Raises WireError, also if the parts contradict the envelope."""
    if len(parts) != _PARTS:
        raise WireError(f"a message of {len(parts)} parts, not {_PARTS}")
    subject, publisher_id, sequence, frame = parts
    envelope = decode_envelope(decode_frame(frame))
    if (
        subject != envelope.topic.encode(errors="surrogatepass")
        or publisher_id != envelope.publisher_id.to_bytes(8, "big")
        or sequence != envelope.sequence.to_bytes(8, "big")
    ):
        raise WireError("the parts of a message contradict its envelope")
    return envelope


def _prefix(subject: str) -> bytes:
    """What ZMQ can filter by: the part before the first wildcard."""
    ends = [place for place in (subject.find("*"), subject.find(">")) if place >= 0]
    return subject[: min(ends)].encode() if ends else subject.encode()
