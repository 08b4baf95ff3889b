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

from kvbm.cli.client import AdminClient, Failure
from kvbm.cli.output import moment, print_json
from kvbm.daemon.settings import DaemonSettings
from runtime import telemetry
from runtime.events import EventPlaneSettings
from runtime.events.blocks import (
    BatchError,
    BlockBatch,
    Follower,
    Stored,
    blocks_subject,
    decode_batch,
)
from runtime.events.nats import NatsPlane
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
        asyncio.run(_tail(settings, node, printer))


async def _tail(settings: EventPlaneSettings, node: str, printer: Printer) -> None:
    plane = NatsPlane(settings, "kvbm events tail")
    await plane.start()
    try:
        async with plane.subscribe(blocks_subject(settings.namespace, node)) as subscription:
            try:
                await asyncio.wait_for(subscription.active.wait(), CONNECT_S)
            except TimeoutError:
                reason = plane.status().error
                raise Failure(f"NATS cannot be reached: {reason}; see --nats-url") from None
            sys.stderr.write(f"following {subscription.subject}\n")
            dropped = 0
            async for message in subscription:
                if subscription.dropped_total > dropped:
                    printer.lost(subscription.dropped_total - dropped)
                    dropped = subscription.dropped_total
                try:
                    batch = decode_batch(message.payload)
                except BatchError as error:
                    printer.note(message.subject, f"a message that is no block events: {error}")
                    continue
                if printer.batch(batch):
                    return
    finally:
        await plane.close()


class Printer:
    """Lines of what each node said, with the place in its events kept."""

    def __init__(self, as_json: bool, count: int | None) -> None:
        self._as_json = as_json
        self._left = count
        self._followers: defaultdict[str, Follower] = defaultdict(Follower)

    def batch(self, batch: BlockBatch) -> bool:
        """Print what is new in it. True: as many as were asked for have been printed."""
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
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    return True
        return False

    def note(self, node: str, text: str) -> None:
        if self._as_json:
            print_json({"at": time.time(), "node": node, "note": text})
        else:
            self._line(f"{node}  -- {text}")

    def lost(self, messages: int) -> None:
        self.note("kvbm", f"too slow: {messages} messages dropped here")

    def _event(self, node: str, sequence: int, kind: str, tier: str, keys: list[str]) -> None:
        if self._as_json:
            told = {"at": time.time(), "node": node, "sequence": sequence}
            print_json({**told, "event": kind, "tier": tier, "keys": keys})
            return
        more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
        self._line(f"{node}  #{sequence}  {tier} {kind}  {' '.join(keys[:KEYS_SHOWN])}{more}")

    @staticmethod
    def _line(text: str) -> None:
        sys.stdout.write(f"{moment(time.time())}  {text}\n")
        sys.stdout.flush()
