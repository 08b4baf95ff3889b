"""Where `kvbm events tail` finds NATS, and how it prints what comes. NATS is imported here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

import msgspec

from kvbm.cli.client import AdminClient, Failure
from kvbm.cli.output import moment, print_json
from kvbm.daemon.settings import DaemonSettings
from runtime import telemetry
from runtime.events import EventPlaneSettings, Message, node_stream, router_event
from runtime.events.blocks import (
    BatchError,
    BlockBatch,
    Follower,
    Stored,
    blocks_subject,
    decode_batch,
)
from runtime.events.envelope import WireError, decode_envelope
from runtime.events.nats import NatsPlane
from runtime.events.router_event import RouterEvent
from runtime.events.router_wire import decode_msgpack, encode_json
from runtime.settings import SettingsError

CONNECT_S: Final = 5.0
KEYS_SHOWN: Final = 4


def event_settings(
    config: Path | None, nats_url: str | None, namespace: str | None, url: str, token: str | None
) -> EventPlaneSettings:
    """How to reach NATS. Raises Failure."""
    overrides: dict[str, object] = {"events.plane": "nats"}
    if nats_url is not None:
        overrides["events.nats_url"] = nats_url
    if namespace is not None:
        overrides["events.namespace"] = namespace
    try:
        loaded = DaemonSettings.load(config, overrides=overrides)
        if nats_url is None and "events.nats_url" not in loaded.origins:
            with AdminClient(url, token) as client:
                process = client.get("/v1/node")["process"]
            if process["events_url"] is None:
                raise Failure(
                    f"the daemon at {url} publishes no events: its events.plane is "
                    f"{process['events_plane']}; name another server with --nats-url"
                )
            overrides["events.nats_url"] = process["events_url"]
            if "events.namespace" not in loaded.origins:
                overrides["events.namespace"] = process["events_namespace"]
            loaded = DaemonSettings.load(config, overrides=overrides)
    except SettingsError as error:
        raise Failure(str(error)) from error
    return loaded.value.events


def follow(settings: EventPlaneSettings, node: str, printer: Printer) -> None:
    """Print events until Ctrl-C, or as many as the printer wants. Raises Failure."""
    telemetry.configure("console", "error", sys.stderr, os.environ)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_listen(settings, blocks_subject(settings.namespace, node), printer))


async def _listen(
    settings: EventPlaneSettings, subject: str, printer: Printer | StreamPrinter
) -> None:
    plane = NatsPlane(settings, "kvbm events tail")
    await plane.start()
    try:
        async with plane.subscribe(subject) as subscription:
            try:
                async with asyncio.timeout(CONNECT_S):
                    await subscription.active.wait()
            except TimeoutError:
                reason = plane.status().error
                raise Failure(f"NATS cannot be reached: {reason}; see --nats-url") from None
            sys.stderr.write(f"following {subscription.subject}\n")
            dropped = 0
            async for message in subscription:
                if subscription.dropped_total > dropped:
                    printer.lost(subscription.dropped_total - dropped)
                    dropped = subscription.dropped_total
                if printer.message(message):
                    return
    finally:
        await plane.close()


def follow_stream(settings: EventPlaneSettings, printer: StreamPrinter) -> None:
    """Print what routers are told until Ctrl-C, or as much as wanted. Raises Failure."""
    telemetry.configure("console", "error", sys.stderr, os.environ)
    subject = node_stream.blocks_subject(settings.namespace)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_listen(settings, subject, printer))


class _Lines:
    """Lines for people, or JSON, as many as are wanted."""

    def __init__(self, as_json: bool, count: int | None) -> None:
        self._as_json = as_json
        self._left = count

    def note(self, node: str, text: str) -> None:
        if self._as_json:
            print_json({"at": time.time(), "node": node, "note": text})
        else:
            self._line(f"{node}  -- {text}")

    def lost(self, messages: int) -> None:
        self.note("kvbm", f"too slow: {messages} messages dropped here")

    def _is_last(self) -> bool:
        """Whether as many as were asked for have been printed with this one."""
        if self._left is not None:
            self._left -= 1
        return self._left == 0

    @staticmethod
    def _line(text: str) -> None:
        sys.stdout.write(f"{moment(time.time())}  {text}\n")
        sys.stdout.flush()


class Printer(_Lines):
    """Lines of what each node said, with the place in its events kept."""

    def __init__(self, as_json: bool, count: int | None) -> None:
        super().__init__(as_json, count)
        self._followers: defaultdict[str, Follower] = defaultdict(Follower)

    def message(self, message: Message) -> bool:
        """Print what is new in it. True: as many as were asked for have been printed."""
        try:
            return self.batch(decode_batch(message.payload))
        except BatchError as error:
            self.note(message.subject, f"a message that is no block events: {error}")
            return False

    def batch(self, batch: BlockBatch) -> bool:
        known = batch.node in self._followers
        followed = self._followers[batch.node].follow(batch)
        if followed.restarted:
            what = "restarted" if known else "seen first"
            self.note(batch.node, f"{what}, at event {batch.first_sequence}")
        if followed.missed is not None and not (followed.restarted and not known):
            missed = followed.missed
            self.note(
                batch.node, f"gap: {len(missed)} events missed, {missed.start} to {missed[-1]}"
            )
        sequence = batch.first_sequence + len(batch.events) - len(followed.events)
        for number, event in enumerate(followed.events, sequence):
            kind = "stored" if isinstance(event, Stored) else "removed"
            self._event(batch.node, number, kind, event.tier, [key.hex() for key in event.keys])
            if self._is_last():
                return True
        return False

    def _event(self, node: str, sequence: int, kind: str, tier: str, keys: list[str]) -> None:
        if self._as_json:
            told = {"at": time.time(), "node": node, "sequence": sequence}
            print_json({**told, "event": kind, "tier": tier, "keys": keys})
            return
        self._line(f"{node}  #{sequence}  {tier} {kind}  {_shortened(keys)}")


class StreamPrinter(_Lines):
    """Lines of what routers are told, with the place in each publisher's events kept."""

    def __init__(self, as_json: bool, count: int | None) -> None:
        super().__init__(as_json, count)
        self._next: dict[int, int] = {}

    def message(self, message: Message) -> bool:
        """Print one event. True: as many as were asked for have been printed."""
        try:
            envelope = decode_envelope(message.payload)
            event = decode_msgpack(envelope.payload)
        except WireError as error:
            self.note(message.subject, f"a message that is no event for routers: {error}")
            return False
        publisher = f"{envelope.publisher_id:x}"
        expected = self._next.get(envelope.publisher_id)
        if expected is None:
            self.note(publisher, f"seen first, at event {envelope.sequence}")
        elif envelope.sequence != expected:
            self.note(publisher, f"gap: {envelope.sequence - expected} events missed")
        self._next[envelope.publisher_id] = envelope.sequence + 1
        if self._as_json:
            told = {"at": time.time(), "publisher": publisher, "sequence": envelope.sequence}
            print_json({**told, **msgspec.json.decode(encode_json(event))})
        else:
            self._line(f"{publisher}  #{envelope.sequence}  {_described(event)}")
        return self._is_last()


def _described(event: RouterEvent) -> str:
    holder = "worker" if event.residency_domain == "worker" else "owner"
    who = f"{holder} {event.worker_id:x}.{event.event.dp_rank} {event.storage_tier.value}"
    match event.event.data:
        case router_event.Stored(parent, names):
            after = "the start" if parent is None else f"{parent:016x}"
            return f"{who} stored after {after}: {_shortened([f'{n:016x}' for n in names])}"
        case router_event.Removed(names):
            return f"{who} removed: {_shortened([f'{n:016x}' for n in names])}"
        case router_event.Cleared():
            return f"{who} cleared"


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - KEYS_SHOWN} more" if len(names) > KEYS_SHOWN else ""
    return f"{' '.join(names[:KEYS_SHOWN])}{more}"
