"""What a plane is still to send: a queue with two bounds, which drops what is new when it is full.

The publisher's side is `put`, which costs an append. The sender's looks at the first messages with
`burst`, sends them, and says `done`: until then they are kept, so that a sender whose connection
broke begins again with the same ones. A message's number counts all that were ever put.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice

import structlog

from runtime.events.base import Message

_log = structlog.get_logger()


class Outbox:
    """All methods are called from one event loop."""

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        assert messages_max > 0 and bytes_max > 0
        self.messages_max = messages_max
        self.empty = asyncio.Event()
        self.empty.set()
        self.sent_total = 0
        self.dropped_total = 0  # for want of room, or as the sender could not send them
        self.first_number = 0  # of the first message that waits
        self._bytes_max = bytes_max
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self._full = False

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message, trouble: str | None) -> bool:
        """False, and counted, if there is no room; `trouble` is what is logged as the reason."""
        size_bytes = len(message.payload)
        if len(self._messages) >= self.messages_max or self._bytes + size_bytes > self._bytes_max:
            if not self._full:
                _log.warning("event_queue_full", messages=len(self._messages), error=trouble)
            self._full = True
            self.dropped_total += 1
            return False
        self._messages.append(message)
        self._bytes += size_bytes
        self.empty.clear()
        return True

    def burst(self, count_max: int) -> list[Message]:
        """The first messages, which stay where they are."""
        return list(islice(self._messages, count_max))

    def done(self, count: int, *, dropped: int = 0) -> None:
        """The first `count` are sent, but for `dropped` of them."""
        assert 0 <= dropped <= count <= len(self._messages)
        for _ in range(count):
            self._bytes -= len(self._messages.popleft().payload)
        self.first_number += count
        self.sent_total += count - dropped
        self.dropped_total += dropped
        if not self._messages:
            assert self._bytes == 0
            self._full = False
            self.empty.set()
