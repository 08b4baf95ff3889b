"""The admin API and the metrics, served for real over a node made of plain values."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvbm.daemon.admin import AdminError, AdminServer, create_app
from kvbm.daemon.metrics import DURATION, SPECS, Metrics, metrics_page
from kvbm.daemon.view import EventsStatus, QueueStatus, SessionStatus
from storage_tiers.base import RecoveryReport, TierName, TierUsage

ROOT = Path(__file__).parents[2]


@dataclass
class Node:
    """A `NodeView` of values."""

    checks: dict[str, str | None] = field(default_factory=lambda: {"G3": None})
    broken: bool = False

    def tiers(self) -> list[TierUsage]:
        if self.broken:
            raise RuntimeError("a bug")
        return [
            TierUsage(TierName.DRAM, "memcpy", 1 << 30, 1 << 20, 16),
            TierUsage(
                TierName.SSD,
                "nixl-posix",
                1 << 40,
                1 << 30,
                1000,
                stored_bytes_total=5,
                loaded_bytes_total=6,
                evictions_total={"capacity": 7, "age": 8},
                corrupt_total=9,
                errors_total={"load": 10},
            ),
        ]

    def readiness(self) -> dict[str, str | None]:
        return self.checks

    def recovery(self) -> list[RecoveryReport]:
        return [RecoveryReport(TierName.SSD, 1000, 1 << 30, {"checksum": 2}, 0.5)]

    def sessions(self) -> list[SessionStatus]:
        return [
            SessionStatus("s1", "scheduler", "engine-a", 0, 42, 1.5, claims=3, leased_bytes=4096),
            SessionStatus("s2", "worker", "engine-a", 0, 43, 1.5, claims=0, leased_bytes=0),
            SessionStatus("s3", "worker", "engine-a", 1, 44, 1.5, claims=0, leased_bytes=0),
        ]

    def queues(self) -> list[QueueStatus]:
        return [QueueStatus("offload_ssd", 11, 4096)]

    def events(self) -> EventsStatus:
        return EventsStatus(published_total=12, dropped_total=13)


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics("1.2.3", "node-1")
    metrics.lookup(TierName.DRAM, "hit", 100)
    metrics.lookup(TierName.DRAM, "miss", 50)
    metrics.transfer("G2", "G3", 1000, 0.003)
    metrics.transfer("G2", "G3", 1000, 0)
    metrics.dropped("offload_ssd", "full", 4)
    metrics.error("onboard", "timeout")
    return metrics


@pytest.fixture
async def client(node: Node, metrics: Metrics) -> AsyncIterator[httpx2.AsyncClient]:
    server = AdminServer(create_app(node, metrics), "127.0.0.1", 0)
    await server.start()
    async with httpx2.AsyncClient(base_url=server.url) as client:
        yield client
    await server.stop()


async def test_alive_and_version(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "alive"}
    version = (await client.get("/version")).json()
    assert (version["name"], version["version"], version["node"]) == (
        "kvbm-daemon",
        "1.2.3",
        "node-1",
    )


async def test_readiness_names_what_is_not_ready(client: httpx2.AsyncClient, node: Node) -> None:
    ready = await client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "checks": {"G3": "ok"}}
    node.checks["G4"] = "bucket kv-cache: access denied"
    refused = await client.get("/readyz")
    assert refused.status_code == 503
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["detail"] == "G4: bucket kv-cache: access denied"
    assert refused.json()["checks"] == {"G3": "ok", "G4": "bucket kv-cache: access denied"}


async def test_tiers_tell_what_they_hold_and_did(client: httpx2.AsyncClient) -> None:
    body = (await client.get("/v1/tiers")).json()
    assert body["node"] == "node-1"
    dram, ssd = body["tiers"]
    assert (dram["tier"], dram["hits"], dram["misses"]) == ("G2", 100, 50)
    assert ssd == {
        "tier": "G3",
        "mover": "nixl-posix",
        "capacity_bytes": 1 << 40,
        "used_bytes": 1 << 30,
        "chunks": 1000,
        "hits": 0,
        "misses": 0,
        "stored_bytes": 5,
        "loaded_bytes": 6,
        "evictions": {"capacity": 7, "age": 8},
        "corrupt": 9,
        "errors": {"load": 10},
    }
    assert body["queues"] == [{"name": "offload_ssd", "depth": 11, "limit": 4096}]


async def test_recovery_and_sessions(client: httpx2.AsyncClient) -> None:
    (report,) = (await client.get("/v1/recovery")).json()["reports"]
    assert (report["tier"], report["chunks"], report["dropped"]) == ("G3", 1000, {"checksum": 2})
    sessions = (await client.get("/v1/sessions")).json()["sessions"]
    assert [session["role"] for session in sessions] == ["scheduler", "worker", "worker"]
    assert sessions[0]["leased_bytes"] == 4096


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v2/tiers", 404), ("POST", "/v1/tiers", 405)]
)
async def test_errors_are_problems(
    client: httpx2.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["type"], body["status"], body["instance"]) == ("about:blank", status, path)
    assert body["title"]


async def test_a_bug_is_a_problem_and_the_server_lives(
    client: httpx2.AsyncClient, node: Node
) -> None:
    node.broken = True
    response = await client.get("/v1/tiers")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert "bug" not in response.text
    node.broken = False
    assert (await client.get("/v1/tiers")).status_code == 200


async def test_the_schema_describes_every_route(client: httpx2.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    routes = {"/healthz", "/readyz", "/metrics", "/version"}
    assert set(paths) == routes | {"/v1/tiers", "/v1/recovery", "/v1/sessions"}


async def test_metrics_tell_what_is_counted_and_what_is_the_case(
    client: httpx2.AsyncClient,
) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert values["kvbm_build_info", "1.2.3", "node-1"] == 1
    assert values["kvbm_ready", "G3"] == 1
    assert values["kvbm_tier_capacity_bytes", "G2"] == 1 << 30
    assert values["kvbm_tier_blocks", "G3"] == 1000
    assert values["kvbm_evictions_total", "G3", "capacity"] == 7
    assert values["kvbm_corrupt_chunks_total", "G3"] == 9
    assert values["kvbm_tier_errors_total", "G3", "load"] == 10
    assert values["kvbm_lookup_blocks_total", "G2", "hit"] == 100
    assert values["kvbm_transfer_bytes_total", "G2", "G3"] == 2000
    assert values["kvbm_transfer_duration_seconds_count", "G2", "G3"] == 1
    assert values["kvbm_dropped_chunks_total", "full", "offload_ssd"] == 4
    assert values["kvbm_queue_depth", "offload_ssd"] == 11
    assert values["kvbm_errors_total", "onboard", "timeout"] == 1
    assert values["kvbm_sessions", "worker"] == 2
    assert values["kvbm_claims",] == 3
    assert values["kvbm_leased_bytes",] == 4096
    assert values["kvbm_events_published_total",] == 12
    assert values["kvbm_events_dropped_total",] == 13


async def test_every_metric_of_the_table_is_served_and_no_other(
    client: httpx2.AsyncClient,
) -> None:
    text = (await client.get("/metrics")).text
    served = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    assert served - {f"{DURATION}_created"} == {spec.name for spec in SPECS}


def test_metric_names_carry_their_unit_and_kind() -> None:
    for spec in SPECS:
        assert spec.name.startswith("kvbm_")
        assert spec.name.endswith("_total") is (spec.kind == "counter"), spec.name


def test_the_documentation_is_that_of_the_code() -> None:
    page = (ROOT / "docs/METRICS.md").read_text()
    assert page == metrics_page(), "run: python -m kvbm.daemon.metrics > docs/METRICS.md"


# -- serving ------------------------------------------------------------------------------


async def test_a_taken_port_is_told_with_the_setting_to_change(node: Node) -> None:
    first = AdminServer(create_app(node, Metrics("1", "n")), "127.0.0.1", 0)
    await first.start()
    second = AdminServer(create_app(node, Metrics("1", "n")), "127.0.0.1", first.port)
    with pytest.raises(AdminError, match=r"in use.*change admin\.host or admin\.port"):
        await second.start()
    await second.stop()
    await first.stop()
    await first.stop()


async def test_an_address_that_is_none_is_told(node: Node) -> None:
    server = AdminServer(create_app(node, Metrics("1", "n")), "256.0.0.1", 0)
    with pytest.raises(AdminError, match=r"cannot listen on 256\.0\.0\.1 port 0"):
        await server.start()


async def test_signals_stay_the_daemons(node: Node) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    server = AdminServer(create_app(node, Metrics("1", "n")), "127.0.0.1", 0)
    await server.start()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    await server.stop()


async def test_stopping_does_not_wait_for_a_client_that_stays_connected(node: Node) -> None:
    server = AdminServer(create_app(node, Metrics("1", "n")), "127.0.0.1", 0)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b"200 OK" in await reader.readline()
    async with asyncio.timeout(5):
        await server.stop()
    writer.close()
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncio.open_connection("127.0.0.1", server.port)
