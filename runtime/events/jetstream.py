"""The JetStream stream that keeps a deployment's block events for a while, beside the live ones.

The stream listens to the subjects that block events have anyway, so listeners get them as they
come, whether they are kept or not. A publisher asks for each to be confirmed; one that the stream
did not confirm in time is counted and not sent again. After a connection that broke the same
messages come again under the same numbers, by which the stream tells what it has already.

Reading what is kept costs the server a consumer that is gone when the reading ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from runtime.events.base import HistoryUnavailable, Message, matches
from runtime.events.blocks import blocks_subject
from runtime.events.node_stream import TOPIC
from runtime.events.settings import EventPlaneSettings

REQUEST_TIMEOUT_S: Final = 5.0
ACK_TIMEOUT_S: Final = 2.0
ACK_TIMEOUT_SICK_S: Final = 0.1  # after one that was missed: live events go on
STREAM_RETRY_S: Final = 5.0
DUPLICATES_S: Final = 120.0  # for so long the stream knows what it has
FETCH_MESSAGES: Final = 128
CONSUMER_IDLE_S: Final = 60.0
_NO_RESPONDERS: Final = "503"
_JETSTREAM_OFF: Final = {10039, 10076}  # for the account; for the server
_OVERLAP: Final = 10065

_log = structlog.get_logger()


def durable_subjects(namespace: str) -> list[str]:
    """Block events of all nodes, and those that the reference's components publish themselves."""
    return [blocks_subject(namespace, "*"), f"namespace.{namespace}.component.*.{TOPIC}"]


class EventStream:
    """The stream as one connection sees it. `trouble` says why nothing is kept, if so."""

    def __init__(self, settings: EventPlaneSettings, client: Client, publisher: str) -> None:
        """`publisher` is this program's for as long as its messages' numbers count up."""
        self.trouble: str | None = "the stream was not asked for yet"
        self.unconfirmed_total = 0
        self.name = f"kvbm-{settings.namespace}-events"
        self._settings = settings
        self._client = client
        self._publisher = publisher
        self._subjects = durable_subjects(settings.namespace)
        self._inbox = client.new_inbox()
        self._waiting: set[bytes] = set()  # numbers, as the inbox's subject ends with them
        self._settled = asyncio.Event()
        self._is_open = False
        self._tried_s = -STREAM_RETRY_S

    def keeps(self, subject: str) -> bool:
        return any(matches(pattern, subject) for pattern in self._subjects)

    async def start(self) -> None:
        """Once per connection."""
        await self._client.subscribe(f"{self._inbox}.*", cb=self._confirmed)

    async def ensure(self) -> None:
        """Make the stream, or make it as it is set here; tried again after a while."""
        now_s = time.monotonic()
        if self._is_open or now_s < self._tried_s + STREAM_RETRY_S:
            return
        self._tried_s = now_s
        try:
            await self._make()
        except (NatsError, TimeoutError) as error:
            self._fail(_reason(error, self.name))
        else:
            self._is_open, self.trouble = True, None
            _log.info("event_stream_ready", stream=self.name, subjects=self._subjects)

    async def send(self, number: int, message: Message) -> None:
        """Publish it, to be confirmed."""
        place = b"%d" % number
        self._waiting.add(place)
        await self._client.publish(
            message.subject,
            message.payload,
            reply=f"{self._inbox}.{number}",
            headers={"Nats-Msg-Id": f"{self._publisher}-{number}"},
        )

    async def settle(self) -> None:
        """Until what was sent is confirmed, or not in time; what is not is counted."""
        if not self._waiting:
            return
        self._settled.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ACK_TIMEOUT_S if self._is_open else ACK_TIMEOUT_SICK_S):
                await self._settled.wait()
        if self._waiting:
            count = len(self._waiting)
            self._waiting.clear()
            self._unkept(count, f"the stream {self.name} does not confirm what is published")

    async def history(self, subject: str, since_s: float) -> AsyncGenerator[Message, None]:
        """See `SupportsHistory`."""
        stream = self._client.jetstream(timeout=REQUEST_TIMEOUT_S)
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_TIME,
            opt_start_time=datetime.fromtimestamp(since_s, UTC),
            ack_policy=AckPolicy.NONE,
            inactive_threshold=CONSUMER_IDLE_S,
            mem_storage=True,
            num_replicas=1,
        )
        try:
            reader = await stream.pull_subscribe(subject, stream=self.name, config=config)
            consumer = await reader.consumer_info()
        except (NatsError, TimeoutError, OSError) as error:
            raise HistoryUnavailable(_reason(error, self.name)) from error
        try:
            left, expected = consumer.num_pending or 0, 1
            while left > 0:
                for found in await reader.fetch(min(left, FETCH_MESSAGES), REQUEST_TIMEOUT_S):
                    place = found.metadata
                    if place.sequence.consumer != expected:
                        raise HistoryUnavailable(f"a message of {self.name} was lost on its way")
                    expected += 1
                    # What retention deletes meanwhile is not pending any more.
                    left = min(left - 1, place.num_pending)
                    yield Message(found.subject, found.data)
        except (NatsError, TimeoutError, OSError) as error:
            raise HistoryUnavailable(_reason(error, self.name)) from error
        finally:
            with contextlib.suppress(NatsError, TimeoutError, OSError):
                await reader.unsubscribe()
                await stream.delete_consumer(self.name, consumer.name)

    # -- within ---------------------------------------------------------------------------

    async def _make(self) -> None:
        settings = self._settings
        manager = self._client.jetstream(timeout=REQUEST_TIMEOUT_S)
        wanted = StreamConfig(
            name=self.name,
            subjects=self._subjects,
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.OLD,
            storage=StorageType.FILE,
            max_age=settings.nats_durable_age,
            max_bytes=settings.nats_durable_bytes,
            num_replicas=settings.nats_durable_replicas,
            duplicate_window=min(DUPLICATES_S, settings.nats_durable_age),
        )
        try:
            await manager.stream_info(self.name)
        except NotFoundError:
            # Another program may be making it at the same moment: the same is no error.
            await manager.add_stream(wanted)
        else:
            await manager.update_stream(wanted)

    async def _confirmed(self, message: Msg) -> None:
        number = message.subject.rpartition(".")[2].encode()
        if number not in self._waiting:
            return  # too late
        self._waiting.discard(number)
        reason = _refusal(message, self.name)
        if reason is not None:
            self._unkept(1, reason)
        if not self._waiting:
            self._settled.set()

    def _unkept(self, count: int, reason: str) -> None:
        self.unconfirmed_total += count
        if self._is_open:  # else it is known already, and better, why
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        if reason != self.trouble:
            _log.warning("event_stream_trouble", stream=self.name, reason=reason)
        self.trouble = reason
        self._is_open = False


def _refusal(message: Msg, stream: str) -> str | None:
    """Why an answer to a message is no confirmation."""
    if message.headers and message.headers.get("Status") == _NO_RESPONDERS:
        return f"no stream takes what is published; {stream} is gone"
    try:
        answer: Any = msgspec.json.decode(message.data)
        error = answer.get("error")
    except (msgspec.DecodeError, AttributeError):
        return f"what {stream} answers is no confirmation"
    return None if error is None else f"{stream}: {error.get('description', error)}"


def _reason(error: Exception, stream: str) -> str:
    code = error.err_code if isinstance(error, APIError) else None
    is_off = isinstance(error, NoRespondersError) or code in _JETSTREAM_OFF
    if is_off or (isinstance(error, ServiceUnavailableError) and code is None):
        return (
            "JetStream is not enabled on the NATS server: add `jetstream {}` to its configuration "
            "or start it with -js, or set nats_durable to false"
        )
    if code == _OVERLAP:
        return (
            f"another stream keeps some of the subjects of {stream} already: delete it, or give "
            "this deployment another namespace"
        )
    if isinstance(error, TimeoutError):
        return f"JetStream gave no answer about {stream}"
    if isinstance(error, APIError):
        return f"{stream}: {error.description}"
    return f"{stream}: {str(error) or type(error).__name__}"
