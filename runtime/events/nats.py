"""The event plane over NATS.

One task owns the connection: it connects, subscribes, sends what is queued in bursts confirmed by
the server, and begins anew when the connection breaks, for as long as the plane is open. Messages
leave the queue only when the server has confirmed them, so a server's restart costs none while
the queue has room; those of an unconfirmed burst are sent again. A full queue drops new messages
and counts them. With `nats_durable` block events are kept in a stream of JetStream besides
(`jetstream.py`): a burst then waits for its confirmations too, but never for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator
from typing import Any, Final

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from runtime.events.base import (
    SUBSCRIPTION_MESSAGES,
    HistoryUnavailable,
    Message,
    PlaneStatus,
    Subscription,
)
from runtime.events.jetstream import STREAM_RETRY_S, EventStream
from runtime.events.outbox import Outbox
from runtime.events.settings import EventPlaneSettings
from runtime.nats_client import CLOSE_TIMEOUT_S, connect, shut
from runtime.tasks import end

CONNECT_TIMEOUT_S: Final = 5.0
CONFIRM_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 0.1  # doubles up to
RETRY_S_MAX: Final = 2.0
BURST_MESSAGES_MAX: Final = 256

_log = structlog.get_logger()


class NatsPlane:
    def __init__(self, settings: EventPlaneSettings, name: str) -> None:
        """`name` is how the connection shows in the server's own tools."""
        self._settings = settings
        self._name = name
        self._outbox = Outbox(settings.queue_messages, settings.queue_bytes)
        self._publisher = secrets.token_hex(8)
        self._subscriptions: set[Subscription] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._client: Client | None = None  # while connected
        self._stream: EventStream | None = None  # of this connection, or the last
        self._error: str | None = "not connected yet"
        self._unconfirmed_total = 0  # on earlier connections
        self._faults_total = 0

    async def start(self) -> None:
        assert self._task is None, "started already"
        self._task = asyncio.create_task(self._run(), name="event-plane-nats")

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        if self._client is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._outbox.empty.wait()
        await end(task)
        for subscription in list(self._subscriptions):
            subscription.close()

    def publish(self, subject: str, payload: bytes) -> bool:
        if not self._outbox.put(Message(subject, payload), self._error):
            return False
        self._wake.set()
        return True

    def subscribe(self, subject: str, limit: int = SUBSCRIPTION_MESSAGES) -> Subscription:
        subscription = Subscription(subject, limit, self._unsubscribe)
        self._subscriptions.add(subscription)
        self._wake.set()
        return subscription

    def history(self, subject: str, since_s: float) -> AsyncGenerator[Message, None]:
        if not self._settings.nats_durable:
            raise HistoryUnavailable("nothing is kept: nats_durable is not set")
        if self._stream is None or self._client is None:
            raise HistoryUnavailable(self._error or "not connected")
        return self._stream.history(subject, since_s)

    def status(self) -> PlaneStatus:
        stream = self._stream
        return PlaneStatus(
            kind="nats",
            connected=self._client is not None,
            error=self._error or (stream.trouble if stream is not None else None),
            published_total=self._outbox.sent_total,
            dropped_total=self._outbox.dropped_total,
            queued=len(self._outbox),
            queue_limit=self._outbox.messages_max,
            unconfirmed_total=self._unconfirmed_total
            + (stream.unconfirmed_total if stream is not None else 0),
            faults_total=self._faults_total,
        )

    # -- the one task ---------------------------------------------------------------------

    async def _run(self) -> None:
        retry_s = RETRY_S
        while True:
            client = None
            try:
                client = await connect(self._settings, self._name, CONNECT_TIMEOUT_S, self._woken)
                _log.info("event_plane_connected", server=client.connected_url.netloc)
                retry_s = RETRY_S
                await self._serve(client)
            except (NatsError, OSError, TimeoutError, ValueError) as error:
                self._lost(str(error) or type(error).__name__)
            except Exception as error:  # noqa: BLE001 (task border: events must not end a program)
                self._faults_total += 1
                _log.exception("event_plane_failed")
                self._lost(f"{type(error).__name__}: {error}")
            finally:
                self._client = None
                if client is not None:
                    await shut(client)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_S_MAX)

    async def _serve(self, client: Client) -> None:
        subscribed: dict[Subscription, Any] = {}
        stream = await self._open_stream(client)
        self._client, self._error = client, None
        try:
            while client.is_connected:
                self._wake.clear()
                await self._follow_subscriptions(client, subscribed)
                if stream is not None:
                    await stream.ensure()
                if not await self._send_burst(client, stream):
                    # A stream that is in trouble is looked at again, also if nothing happens.
                    look_s = STREAM_RETRY_S if stream is not None and stream.trouble else None
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(look_s):
                            await self._wake.wait()
        finally:
            for subscription in subscribed:
                subscription.active.clear()
        raise ConnectionError("the connection was closed")

    async def _open_stream(self, client: Client) -> EventStream | None:
        if not self._settings.nats_durable:
            return None
        if self._stream is not None:
            self._unconfirmed_total += self._stream.unconfirmed_total
        self._stream = EventStream(self._settings, client, self._publisher)
        await self._stream.start()
        return self._stream

    async def _follow_subscriptions(
        self, client: Client, subscribed: dict[Subscription, Any]
    ) -> None:
        for subscription in subscribed.keys() - self._subscriptions:
            await subscribed.pop(subscription).unsubscribe()
        fresh = self._subscriptions - subscribed.keys()
        for subscription in fresh:
            subscribed[subscription] = await client.subscribe(
                subscription.subject, cb=_delivery(subscription)
            )
        if fresh:
            await client.flush(timeout=CONFIRM_TIMEOUT_S)
            for subscription in fresh:
                subscription.active.set()

    async def _send_burst(self, client: Client, stream: EventStream | None) -> bool:
        """Send some of what is queued; False if nothing was."""
        outbox = self._outbox
        burst = outbox.burst(BURST_MESSAGES_MAX)
        if not burst:
            return False
        too_large = 0
        for number, message in enumerate(burst, outbox.first_number):
            if len(message.payload) > client.max_payload:
                too_large += 1
                _log.warning(
                    "event_too_large",
                    subject=message.subject,
                    size_bytes=len(message.payload),
                    limit_bytes=client.max_payload,
                )
            elif stream is not None and stream.keeps(message.subject):
                await stream.send(number, message)
            else:
                await client.publish(message.subject, message.payload)
        await client.flush(timeout=CONFIRM_TIMEOUT_S)
        if stream is not None:
            await stream.settle()
        outbox.done(len(burst), dropped=too_large)
        return True

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
        self._wake.set()

    async def _woken(self) -> None:
        self._wake.set()

    def _lost(self, reason: str) -> None:
        if self._error != reason:
            _log.warning("event_plane_disconnected", reason=reason, url=self._settings.nats_url)
        self._error = reason


def _delivery(subscription: Subscription) -> Any:
    async def deliver(message: Msg) -> None:
        subscription.deliver(Message(message.subject, message.data))

    return deliver
