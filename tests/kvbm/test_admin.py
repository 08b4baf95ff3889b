"""The admin API and the metrics, served for real over a node made of plain values."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvbm.daemon.admin import create_app
from kvbm.daemon.metrics import DURATION, SPECS, Metrics, daemon_metrics_page
from runtime.web.server import WebServer
from storage_tiers.base import TierName
from tests.kvbm.plain_node import KEY, PARENT, Node
from tests.plain_http import PLAIN

ROOT = Path(__file__).parents[2]


TOKEN = "a-token-of-16-up"


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
    server = WebServer(create_app(node, node, metrics), "127.0.0.1", 0, section="admin")
    await server.start()
    async with httpx2.AsyncClient(base_url=server.url, verify=PLAIN) as client:
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
        "requests": {},
        "rates": [
            {"window_s": 10, "in_bytes_per_s": 5.0, "out_bytes_per_s": 6.0},
            {"window_s": 60, "in_bytes_per_s": 1.0, "out_bytes_per_s": 2.0},
        ],
    }
    assert body["queues"] == [{"name": "offload_ssd", "depth": 11, "limit": 4096}]


async def test_recovery_and_sessions(client: httpx2.AsyncClient) -> None:
    (report,) = (await client.get("/v1/recovery")).json()["reports"]
    assert (report["tier"], report["chunks"], report["dropped"]) == ("G3", 1000, {"checksum": 2})
    sessions = (await client.get("/v1/sessions")).json()["sessions"]
    assert [session["role"] for session in sessions] == ["scheduler", "worker", "worker"]
    assert sessions[0]["leased_bytes"] == 4096


async def test_peers_tell_who_they_are_and_why_not(client: httpx2.AsyncClient) -> None:
    body = (await client.get("/v1/peers")).json()
    connected, refused = body["peers"]
    assert (connected["node"], connected["mover"], connected["chunks"]) == (
        "node-7",
        "nixl-ucx",
        12,
    )
    assert (refused["connected"], refused["problem"]) == (False, "refused")
    assert (body["readers"], body["lent_bytes"]) == (["node-7"], 4096)


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
    schema = (await client.get("/openapi.json")).json()
    routes = {f"{method} {path}" for path, item in schema["paths"].items() for method in item}
    probes = {"get /healthz", "get /readyz", "get /metrics", "get /version"}
    nouns = (
        *("tiers", "recovery", "sessions", "peers", "stream", "node", "chunks/{key}"),
        *("quarantine", "policies", "governor", "receipts", "receipts/{request_id}"),
        *("curve", "what-if"),
    )
    reads = {f"get /v1/{noun}" for noun in (*nouns, "drain", "scrub")}
    actions = ("drain", "resume", "flush", "scrub", "quarantine/clear")
    assert routes == probes | reads | {f"post /v1/{action}" for action in actions}
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            assert operation["description"], path
            described = operation["responses"]
            assert "422" not in described, "bad input is a problem of status 400"
            assert ("security" in operation) == path.startswith("/v1/"), path
            assert ("default" in described) == path.startswith("/v1/"), path
            assert ("403" in described) == (method == "post"), path
    problem = schema["components"]["schemas"]["Problem"]
    assert {"type", "title", "status", "detail", "instance"} == set(problem["required"])


async def test_a_chunk_is_found_by_its_key_in_hex(client: httpx2.AsyncClient) -> None:
    for text in (KEY.hex(), KEY.hex().upper()):
        body = (await client.get(f"/v1/chunks/{text}")).json()
        assert body["key"] == KEY.hex()
        dram, ssd = body["residencies"]
        assert (dram["tier"], dram["claims"], ssd["tier"], ssd["claims"]) == ("G2", 2, "G3", None)
        assert (dram["length"], dram["position"], dram["parent"]) == (4096, 3, PARENT.hex())
        assert dram["sealed"] and dram["checksum"] == "0000000000000abc"
        note = body["note"]
        assert (note["domain"], note["parent"]) == (f"{0xD0:016x}", f"{0xAB:016x}")
        assert note["blocks"] == [f"{1:016x}", f"{2:016x}"]


@pytest.mark.parametrize(
    ("key", "status"), [(PARENT.hex(), 404), ("abc", 400), ("z" * 32, 400), ("a" * 33, 400)]
)
async def test_a_chunk_that_is_nowhere_is_a_problem(
    client: httpx2.AsyncClient, key: str, status: int
) -> None:
    response = await client.get(f"/v1/chunks/{key}")
    assert response.status_code == status == response.json()["status"]
    assert response.headers["content-type"] == "application/problem+json"


async def test_what_is_out_of_use_and_how_tiers_choose_is_told(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/v1/quarantine")).json() == {
        "total": 7,
        "entries": [
            {
                "tier": "G3",
                "key": KEY.hex(),
                "at": 1.5e9,
                "why": "the bytes do not match the checksum",
                "held_bytes": 4096,
            }
        ],
    }
    (policy,) = (await client.get("/v1/policies")).json()["policies"]
    assert policy == {
        "tier": "G3",
        "admission": "value",
        "eviction": "value",
        "budget_per_day": 7 << 30,
        "budget_unit": "bytes",
    }
    node = (await client.get("/v1/node")).json()
    assert (node["node"], node["process"]["pid"]) == ("node-1", 42)
    assert node["handover"]["reason"] == "dram.handover is false"
    assert (node["handover"]["adopted_chunks"], node["handover"]["dropped"]) == (5, {"corrupt": 1})
    assert (await client.get("/v1/scrub")).json() == {"latest": None}
    assert (await client.get("/v1/drain")).json()["left_chunks"] == 3


# -- actions and who may ask --------------------------------------------------------------


async def test_actions_reach_the_node_with_their_deadline(
    client: httpx2.AsyncClient, node: Node
) -> None:
    assert (await client.post("/v1/drain")).json()["draining"] is True
    assert (await client.post("/v1/resume")).json()["draining"] is False
    assert (await client.post("/v1/flush?deadline_s=2.5")).json()["seconds"] == 2.5
    assert (await client.post("/v1/scrub?deadline_s=0")).json()["damaged_chunks"] == 1
    assert (await client.post("/v1/scrub?tier=G3&deadline_s=1")).json()["tier"] == "G3"
    assert (await client.post("/v1/quarantine/clear")).json() == {"cleared": 1, "freed_bytes": 4096}
    assert (await client.post(f"/v1/quarantine/clear?key={KEY.hex()}")).json()["cleared"] == 1
    assert node.asked == [
        *("drain", "resume", ("flush", 2.5), ("scrub", "G2", 0), ("scrub", "G3", 1)),
        *(("clear", None), ("clear", KEY)),
    ]
    for bad in ("-1", "1e9", "nan", "soon"):
        assert (await client.post(f"/v1/flush?deadline_s={bad}")).status_code == 400
    assert (await client.post("/v1/scrub?tier=G9")).status_code == 400
    assert (await client.post("/v1/quarantine/clear?key=xyz")).status_code == 400
    for method in (client.post, client.get):
        refused = await method("/v1/scrub?tier=G4")
        assert refused.status_code == 404
        assert "G2, G3" in refused.json()["detail"]
    assert len(node.asked) == 7


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:9470"},
        {"origin": "https://evil.example"},
        {"host": "evil.example", "origin": "http://evil.example"},
        {"host": ""},
    ],
)
async def test_a_web_page_cannot_act(
    client: httpx2.AsyncClient, node: Node, headers: dict[str, str]
) -> None:
    refused = await client.post("/v1/drain", headers=headers)
    assert refused.status_code == 403
    assert "loopback" in refused.json()["detail"]
    assert not node.asked


@pytest.fixture
async def guarded(node: Node, metrics: Metrics) -> AsyncIterator[httpx2.AsyncClient]:
    server = WebServer(create_app(node, node, metrics, TOKEN), "127.0.0.1", 0, section="admin")
    await server.start()
    async with httpx2.AsyncClient(base_url=server.url, verify=PLAIN) as client:
        yield client
    await server.stop()


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong-token-here", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "\xe9"]
)
async def test_with_a_token_nothing_below_v1_is_answered_without_it(
    guarded: httpx2.AsyncClient, node: Node, given: str
) -> None:
    headers = {b"authorization": given.encode("latin-1")} if given else {}
    for method, path in (("GET", "/v1/tiers"), ("GET", "/v1/chunks/x"), ("POST", "/v1/drain")):
        refused = await guarded.request(method, path, headers=headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.headers["content-type"] == "application/problem+json"
        assert TOKEN not in refused.text
    assert not node.asked
    for path in ("/healthz", "/readyz", "/metrics", "/version"):
        assert (await guarded.get(path)).status_code == 200


async def test_the_token_opens_everything_from_anywhere(
    guarded: httpx2.AsyncClient, node: Node
) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert (await guarded.get("/v1/tiers", headers=headers)).status_code == 200
    elsewhere = {**headers, "host": "node-1.example:9470"}
    assert (await guarded.post("/v1/drain", headers=elsewhere)).status_code == 200
    assert node.asked == ["drain"]


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
    assert values["kvbm_stream_events_total",] == 39
    assert values["kvbm_stream_answers_total", "snapshot"] == 12
    assert values["kvbm_announced_blocks", "G3"] == 20
    assert values["kvbm_announced_blocks", "G1"] == values["kvbm_engine_blocks", "5.0"] == 8
    assert values["kvbm_unannounced_chunks",] == 5
    assert values["kvbm_engines_heard",] == 1


async def test_what_routers_are_told_is_shown(client: httpx2.AsyncClient) -> None:
    found = (await client.get("/v1/stream")).json()["stream"]
    assert found["stream"]["publisher"] == "1f"
    assert found["tiers"]["blocks"] == {"G2": 10, "G3": 20, "G4": 30}
    assert [engine["worker"] for engine in found["engines"]] == ["5.0", "5.1"]


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
    assert page == daemon_metrics_page(), "run: python -m kvbm.daemon.metrics > docs/METRICS.md"
