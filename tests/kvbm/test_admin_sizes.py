"""The admin API about tiers of other sizes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest

from kvbm.daemon.admin import create_app
from kvbm.daemon.metrics import Metrics
from runtime.web.server import WebServer
from storage_tiers.base import TierName
from tests.kvbm.plain_node import Node
from tests.plain_http import PLAIN


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
async def client(node: Node) -> AsyncIterator[httpx2.AsyncClient]:
    metrics = Metrics("1.2.3", "node-1")
    server = WebServer(create_app(node, node, metrics), "127.0.0.1", 0, section="admin")
    await server.start()
    async with httpx2.AsyncClient(base_url=server.url, verify=PLAIN) as client:
        yield client
    await server.stop()


@pytest.mark.parametrize(
    ("query", "status", "asked"),
    [
        ("tier=G2&add=256GiB", 200, (TierName.DRAM, None, 256 << 30)),
        ("tier=G2&add=%2B1MiB", 200, (TierName.DRAM, None, 1 << 20)),
        ("tier=G3&add=-64GiB", 200, (TierName.SSD, None, -64 << 30)),
        ("tier=G2&size=1TiB", 200, (TierName.DRAM, 1 << 40, 0)),
        ("tier=G2&size=0", 200, (TierName.DRAM, 0, 0)),
        ("tier=G4&add=1GiB", 409, (TierName.S3, None, 1 << 30)),
        ("tier=G2&size=1", 503, (TierName.DRAM, 1, 0)),
        ("tier=G2", 400, None),
        ("tier=G2&add=1GiB&size=1GiB", 400, None),
        ("tier=G2&add=256G", 400, None),
        ("tier=G2&add=--1GiB", 400, None),
        ("tier=G9&add=1GiB", 400, None),
        ("add=1GiB", 400, None),
    ],
)
async def test_a_size_is_asked_about(
    node: Node, client: httpx2.AsyncClient, query: str, status: int, asked: object
) -> None:
    response = await client.get(f"/v1/what-if?{query}")
    assert response.status_code == status, response.text
    assert node.asked == ([] if asked is None else [asked])
    body = response.json()
    if status == 200:
        assert body["answer"]["gain"] == {"value": 0.5, "error": 0.01}
        assert body["answer"]["flows"][0]["saved_s"] is None
    else:
        assert body["detail"]


async def test_the_curve_is_told_unless_lookups_are_not_watched(
    node: Node, client: httpx2.AsyncClient
) -> None:
    body = (await client.get("/v1/curve")).json()
    assert body["points"] == [{"size_bytes": 1 << 30, "hit_rate": {"value": 0.5, "error": 0.01}}]
    assert body["tiers"][0]["found"] == 0.4 and body["sample"]["keys_max"] == 1024
    assert "kvbm_sample_rate 0.25" in (await client.get("/metrics")).text
    node.broken = True
    assert (await client.get("/v1/curve")).status_code == 404
