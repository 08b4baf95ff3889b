"""`kvbm events tail --router`: the stream in words."""

from __future__ import annotations

import numpy as np
import pytest

from kvbm.cli.event_feed import StreamPrinter
from runtime.events import Message
from runtime.events.envelope import Envelope, encode_envelope
from runtime.events.router_event import Cleared, KvCacheEvent, KvCacheEventData, RouterEvent
from runtime.events.router_event import Removed as RouterRemoved
from runtime.events.router_event import Stored as RouterStored
from runtime.events.router_wire import encode_msgpack


def test_what_routers_are_told_is_said_with_every_gap(capsys: pytest.CaptureFixture[str]) -> None:
    names = np.arange(1, 7, dtype=np.uint64)
    told: list[tuple[int, KvCacheEventData, str]] = [
        (7, RouterStored(None, names, names), "worker"),
        (8, RouterRemoved(names[:1]), "cache_owner"),
        (11, Cleared(), "worker"),
        (12, Cleared(), "worker"),
    ]
    printer = StreamPrinter(as_json=False, count=3)
    ended = []
    for sequence, data, domain in told:
        event = RouterEvent(0xAB, KvCacheEvent(0, data, 2), residency_domain=domain)
        envelope = Envelope("kv-events", 0x1F, sequence, 0, encode_msgpack(event))
        ended.append(printer.message(Message("s", encode_envelope(envelope))))
        if ended[-1]:
            break
    assert ended == [False, False, True]
    assert not printer.message(Message("s", b"nonsense"))
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    first = " ".join(f"{n:016x}" for n in range(1, 5))
    assert lines[:-1] == [
        "1f  -- seen first, at event 7",
        f"1f  #7  worker ab.2 device stored after the start: {first} and 2 more",
        f"1f  #8  owner ab.2 device removed: {1:016x}",
        "1f  -- gap: 2 events missed",
        "1f  #11  worker ab.2 device cleared",
    ]
    assert "no event for routers" in lines[-1]
