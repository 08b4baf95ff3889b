"""The event plane over NATS.

One task owns the connection: it connects, subscribes, sends what is queued in bursts confirmed by
the server, and begins anew when the connection breaks, for as long as the plane is open. Messages
leave the queue only when the server has confirmed them, so a server's restart costs none while
the queue has room; those of an unconfirmed burst are sent again. A full queue drops new messages
and counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from itertools import islice
from typing import Any, Final

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from runtime.events.base import SUBSCRIPTION_MESSAGES, Message, PlaneStatus, Subscription
from runtime.events.settings import EventPlaneSettings

CONNECT_TIMEOUT_S: Final = 5.0
CONFIRM_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 2.0
RETRY_S: Final = 0.1  # doubles up to
RETRY_S_MAX: Final = 2.0
BURST_MESSAGES_MAX: Final = 256
_PING_INTERVAL_S: Final = 10

_log = structlog.get_logger()


class NatsPlane:
    def __init__(self, settings: EventPlaneSettings, name: str) -> None:
        """`name` is how the connection shows in the server's own tools."""
        self._settings = settings
        self._name = name
        self._queue: deque[Message] = deque()
        self._queued_bytes = 0
        self._full = False
        self._subscriptions: set[Subscription] = set()
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connected = False
        self._error: str | None = "not connected yet"
        self._published_total = 0
        self._dropped_total = 0

    async def start(self) -> None:
        assert self._task is None, "started already"
        self._task = asyncio.create_task(self._run(), name="event-plane-nats")

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        if self._connected and self._queue:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), CLOSE_TIMEOUT_S)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for subscription in list(self._subscriptions):
            subscription.close()

    def publish(self, subject: str, payload: bytes) -> bool:
        if (
            len(self._queue) >= self._settings.queue_messages
            or self._queued_bytes + len(payload) > self._settings.queue_bytes
        ):
            if not self._full:
                _log.warning("event_queue_full", messages=len(self._queue), error=self._error)
            self._full = True
            self._dropped_total += 1
            return False
        self._queue.append(Message(subject, payload))
        self._queued_bytes += len(payload)
        self._wake.set()
        return True

    def subscribe(self, subject: str, limit: int = SUBSCRIPTION_MESSAGES) -> Subscription:
        subscription = Subscription(subject, limit, self._unsubscribe)
        self._subscriptions.add(subscription)
        self._wake.set()
        return subscription

    def status(self) -> PlaneStatus:
        return PlaneStatus(
            kind="nats",
            connected=self._connected,
            error=self._error,
            published_total=self._published_total,
            dropped_total=self._dropped_total,
            queued=len(self._queue),
            queue_limit=self._settings.queue_messages,
        )

    # -- the one task ---------------------------------------------------------------------

    async def _run(self) -> None:
        retry_s = RETRY_S
        while True:
            client = Client()
            try:
                await self._connect(client)
                retry_s = RETRY_S
                await self._serve(client)
            except (NatsError, OSError, TimeoutError, ValueError) as error:
                self._lost(str(error) or type(error).__name__)
            except Exception as error:  # noqa: BLE001 (task border: events must not end a program)
                self._lost(f"{type(error).__name__}: {error}")
            finally:
                self._connected = False
                await _shut(client)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_S_MAX)

    async def _connect(self, client: Client) -> None:
        settings = self._settings
        options: dict[str, Any] = {}
        if settings.nats_user is not None and settings.nats_password is not None:
            options["user"] = settings.nats_user
            options["password"] = settings.nats_password.get_secret_value()
        if settings.nats_credentials is not None:
            options["user_credentials"] = str(settings.nats_credentials)
        causes: list[Exception] = []

        async def note(error: Exception) -> None:
            causes[:] = [error]

        async def wake() -> None:
            self._wake.set()

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await client.connect(
                    servers=settings.nats_urls,
                    name=self._name,
                    allow_reconnect=False,  # `_run` does it, and subscribes again
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_TIMEOUT_S,
                    ping_interval=_PING_INTERVAL_S,
                    error_cb=note,
                    closed_cb=wake,
                    disconnected_cb=wake,
                    **options,
                )
        except (NatsError, TimeoutError) as error:
            # "No servers available" says less than what the last of them answered.
            raise (causes[0] if causes else error) from error
        self._connected = True
        self._error = None
        _log.info("event_plane_connected", server=client.connected_url.netloc)

    async def _serve(self, client: Client) -> None:
        subscribed: dict[Subscription, Any] = {}
        try:
            while client.is_connected:
                self._wake.clear()
                await self._follow_subscriptions(client, subscribed)
                if not await self._send_burst(client):
                    await self._wake.wait()
        finally:
            for subscription in subscribed:
                subscription.active.clear()
        raise ConnectionError("the connection was closed")

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

    async def _send_burst(self, client: Client) -> bool:
        """Send some of what is queued; False if nothing was."""
        burst = list(islice(self._queue, BURST_MESSAGES_MAX))
        if not burst:
            self._full = False
            self._empty.set()
            return False
        too_large = 0
        for message in burst:
            if len(message.payload) > client.max_payload:
                too_large += 1
                _log.warning(
                    "event_too_large",
                    subject=message.subject,
                    size_bytes=len(message.payload),
                    limit_bytes=client.max_payload,
                )
                continue
            await client.publish(message.subject, message.payload)
        await client.flush(timeout=CONFIRM_TIMEOUT_S)
        for message in burst:
            assert self._queue[0] is message
            self._queue.popleft()
            self._queued_bytes -= len(message.payload)
        self._published_total += len(burst) - too_large
        self._dropped_total += too_large
        return True

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
        self._wake.set()

    def _lost(self, reason: str) -> None:
        if self._error != reason:
            _log.warning("event_plane_disconnected", reason=reason, url=self._settings.nats_url)
        self._error = reason


def _delivery(subscription: Subscription) -> Any:
    async def deliver(message: Msg) -> None:
        subscription.deliver(Message(message.subject, message.data))

    return deliver


async def _shut(client: Client) -> None:
    """Close, whatever state the client is in."""
    with contextlib.suppress(NatsError, OSError, TimeoutError, AttributeError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await client.close()
