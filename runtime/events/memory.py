"""The event plane within one process, and the one that leads nowhere.

`MemoryPlane` gives tests and single-process programs the real plane's behaviour, bounds included;
publisher and subscribers share the one object. `NullPlane` is what a node without listeners uses.
"""

from __future__ import annotations

from runtime.events.base import SUBSCRIPTION_MESSAGES, Message, PlaneStatus, Subscription, matches


class MemoryPlane:
    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._published_total = 0

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        for subscription in list(self._subscriptions):
            subscription.close()

    def publish(self, subject: str, payload: bytes) -> bool:
        self._published_total += 1
        message = Message(subject, payload)
        for subscription in self._subscriptions:
            if matches(subscription.subject, subject):
                subscription.deliver(message)
        return True

    def subscribe(self, subject: str, limit: int = SUBSCRIPTION_MESSAGES) -> Subscription:
        subscription = Subscription(subject, limit, self._subscriptions.remove)
        subscription.active.set()
        self._subscriptions.append(subscription)
        return subscription

    def status(self) -> PlaneStatus:
        return PlaneStatus(
            kind="memory",
            connected=True,
            error=None,
            published_total=self._published_total,
            dropped_total=0,
            queued=0,
            queue_limit=0,
        )


class NullPlane:
    """Takes everything and delivers nothing."""

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def publish(self, subject: str, payload: bytes) -> bool:
        return True

    def subscribe(self, subject: str, limit: int = SUBSCRIPTION_MESSAGES) -> Subscription:
        subscription = Subscription(subject, limit, lambda _: None)
        subscription.active.set()
        return subscription

    def status(self) -> PlaneStatus:
        return PlaneStatus(
            kind="none",
            connected=True,
            error=None,
            published_total=0,
            dropped_total=0,
            queued=0,
            queue_limit=0,
        )
