"""The admin API about requests: receipts by name, and what loads are judged by."""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import quote

import httpx2
import pytest

from kvbm.daemon.admin import create_app
from kvbm.daemon.metrics import Metrics
from runtime.web.server import WebServer
from tests.kvbm.plain_node import Node
from tests.plain_http import PLAIN


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    node = Node()
    server = WebServer(
        create_app(node, node, Metrics("1.2.3", "node-1")), "127.0.0.1", 0, section="admin"
    )
    await server.start()
    async with httpx2.AsyncClient(base_url=server.url, verify=PLAIN) as client:
        yield client
    await server.stop()


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("cmpl-one", 200, ""),
        ("chat/three", 200, ""),
        ("two", 200, ""),
        ("cmpl", 409, "names 2 requests: cmpl-two, cmpl-one"),
        ("four", 404, "the latest 3 lookups are kept"),
        ("x" * 257, 400, "256"),
    ],
)
async def test_a_receipt_is_found_by_a_part_of_its_requests_name(
    client: httpx2.AsyncClient, name: str, status: int, said: str
) -> None:
    response = await client.get(f"/v1/receipts/{quote(name, safe='')}")
    body = response.json()
    assert response.status_code == status
    if status == 200:
        [receipt] = body["receipts"]
        assert name in receipt["request"] and receipt["refused"] == "too many open requests"
    else:
        assert said in body["detail"]


async def test_the_latest_receipts_come_first(client: httpx2.AsyncClient) -> None:
    body = (await client.get("/v1/receipts?limit=2")).json()
    assert body["kept"] == 3
    assert [receipt["request"] for receipt in body["receipts"]] == ["chat/three", "cmpl-two"]
    assert (await client.get("/v1/receipts?limit=0")).status_code == 400


async def test_what_loads_are_judged_by_is_told(client: httpx2.AsyncClient) -> None:
    body = (await client.get("/v1/governor")).json()
    assert body["mode"] == "auto"
    assert body["tiers"][0] == {
        "tier": "G3",
        "begin_s": 0.01,
        "bytes_per_s": 1e9,
        "samples": 4,
        "measured_s_ago": 1.5,
        "queued_bytes": 4096,
    }
    [engine] = body["engines"]
    assert engine["tokens_per_s_at_32k"] == 8e3 and engine["load_bytes_per_s"] is None
