"""NATS that goes away and comes back under a running daemon."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from examples.demo.process import free_port
from kvbm.stand_in import StandIn
from runtime.embedded import EmbeddedNats
from storage_tiers.testing import make_items
from tests.faults.conftest import CHUNK, WAIT_S, MakeWatched, keys_of
from tests.waiting import wait_until


def test_nats_that_goes_away_costs_events_only_and_is_told(
    make_daemon: MakeWatched, tmp_path: Path
) -> None:
    with EmbeddedNats(tmp_path / "nats", port=free_port()) as nats:
        events = {
            "plane": "nats",
            "nats_url": nats.url,
            "nats_user": nats.user,
            "nats_password": nats.password,
            "queue_messages": 10,
            "batch_events": 1,
        }
        daemon = make_daemon(events=events)
        daemon.start()
        wait_until(lambda: daemon.counted("kvbm_events_connected") == 1, WAIT_S, "connected")
        nats.stop()
        wait_until(lambda: daemon.counted("kvbm_events_connected") == 0, WAIT_S, "it is seen")
        items = make_items("without nats", 100, CHUNK)
        with StandIn(daemon.socket, CHUNK) as engine:
            engine.store(items)
            daemon.await_kept("G3", len(items))
            assert engine.fetch(keys_of(items)) == [bytes(item.data) for item in items]
        lost = ("kvbm_event_messages_dropped_total", "kvbm_events_dropped_total")
        wait_until(lambda: sum(map(daemon.counted, lost)) > 0, WAIT_S, "what is lost is counted")
        assert daemon.said("event_plane_disconnected")
        nats.start()
        wait_until(lambda: daemon.counted("kvbm_events_connected") == 1, WAIT_S, "it is back")
        daemon.process.check()


def test_a_nats_server_of_the_daemons_own_lives_and_ends_with_it(make_daemon: MakeWatched) -> None:
    port = free_port()
    events = {
        "plane": "nats",
        "nats_embedded": True,
        "nats_url": f"nats://127.0.0.1:{port}",
        "nats_user": "kvbm",
        "nats_password": 'quoted "and" long',
    }
    daemon = make_daemon(events=events)
    for _ in range(2):  # a restart brings it back where it was
        daemon.start()
        wait_until(lambda: daemon.counted("kvbm_events_connected") == 1, WAIT_S, "connected")
        assert daemon.said("nats_started")
        daemon.stop()
        with (
            pytest.raises(ConnectionRefusedError),
            socket.create_connection(("127.0.0.1", port), 1.0),
        ):
            pass
