"""KV comes back from every tier, from another engine, and never wrong: two real engines, one node.

Greedy output of a float32 engine is compared token by token with what it computed without help.
The random model's output depends on the whole prompt, so that wrong KV is a wrong token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.demo.client import Answer
from examples.demo.daemon import Daemon
from examples.demo.engine import Engine
from examples.demo.process import free_port
from kvbm.note import Note
from runtime.embedded import EmbeddedS3
from runtime.events.engine_feed import EngineFeedOptions
from storage_tiers.bucket import S3Bucket
from storage_tiers.s3 import S3Tier
from storage_tiers.testing import RecordingListener
from tests.e2e.conftest import BUCKET, MakeDaemon, StartEngines, s3_settings
from tests.e2e.heard import names_heard
from tests.e2e.texts import BLOCK_TOKENS, prompt, reusable
from tests.waiting import wait_until

RELEASE_TIMEOUT_S = 10.0


@dataclass
class Node:
    daemon: Daemon
    a: Engine
    b: Engine
    s3: EmbeddedS3
    events: EngineFeedOptions  # of a's own

    def settle(self) -> None:
        self.daemon.settle()

    def restart(
        self, *, empty_ssd: bool = False, between: Callable[[], None] | None = None
    ) -> None:
        """Stop the daemon, do something to what it kept, start it, wait for the engines."""
        self.daemon.stop()
        if empty_ssd:
            self.daemon.empty_ssd()
        if between is not None:
            between()
        self.daemon.start()
        self.connect()

    def connect(self) -> None:
        wait_until(lambda: self.daemon.engines() == 2, 60.0, "two engines are connected")


@pytest.fixture(scope="module")
def node(llama: Path, s3: EmbeddedS3, engines: StartEngines, make_daemon: MakeDaemon) -> Node:
    daemon = make_daemon(dram="256MiB", ssd="512MiB", s3=s3_settings(s3))
    daemon.start()
    config = {"model": llama, "socket": daemon.socket}
    ports = (free_port(), free_port())
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{ports[0]}",
        "replay_endpoint": f"tcp://*:{ports[1]}",
    }
    with_events = {**config, "arguments": ("--kv-events-config", json.dumps(events))}
    a, b = engines(a=with_events, b=config)
    live, ring = (f"tcp://127.0.0.1:{port}" for port in ports)
    node = Node(daemon, a, b, s3, EngineFeedOptions(live, ring))
    node.connect()
    return node


def same(answer: Answer, cold: Answer) -> bool:
    return answer.tokens == cold.tokens and len(cold.tokens) > 0


def computed_and_kept(node: Node, text: str) -> Answer:
    """The answer without any help, with the prompt's KV now in every tier but G1."""
    before = min(node.daemon.kept_chunks().values())
    cold = node.a.complete(text)
    assert cold.cached_tokens == 0
    chunks = reusable(cold.prompt_tokens) // 32
    wait_until(
        lambda: min(node.daemon.kept_chunks().values()) >= before + chunks, 60.0, "all is stored"
    )
    node.settle()
    node.a.forget()
    return cold


def served(node: Node, engine: Engine, text: str) -> tuple[Answer, set[str]]:
    """An answer, and the tiers that bytes were loaded from for it."""
    before = node.daemon.loaded_bytes()
    answer = engine.complete(text)
    after = node.daemon.loaded_bytes()
    return answer, {tier for tier, size in after.items() if size > before[tier]}


def corrupt_chunks(node: Node) -> dict[str, int]:
    return {tier["tier"]: tier["corrupt"] for tier in node.daemon.tiers()}


def test_from_the_engines_own_memory_and_from_host_memory(node: Node) -> None:
    text = prompt("host")
    cold = node.a.complete(text)
    again = node.a.complete(text)
    node.settle()
    node.a.forget()
    back, tiers = served(node, node.a, text)
    assert same(again, cold) and same(back, cold)
    assert cold.cached_tokens == 0
    assert again.cached_tokens == back.cached_tokens == reusable(cold.prompt_tokens)
    assert tiers == {"G2"}


def test_from_another_engine(node: Node) -> None:
    text = prompt("other")
    cold = computed_and_kept(node, text)
    other, tiers = served(node, node.b, text)
    assert same(other, cold)
    assert other.cached_tokens == reusable(cold.prompt_tokens)
    assert tiers == {"G2"}


def test_a_longer_prompt_takes_the_part_that_is_known(node: Node) -> None:
    text = prompt("longer")
    computed_and_kept(node, text)
    longer = text + prompt("tail", 300)
    helped = node.b.complete(longer)
    node.a.forget()
    node.b.forget()
    assert helped.cached_tokens == reusable(len(text))
    assert same(node.a.complete(longer, cache_salt="without help"), helped)


def test_from_ssd_after_the_daemon_restarted(node: Node) -> None:
    text = prompt("ssd")
    cold = computed_and_kept(node, text)
    node.restart()
    assert node.daemon.kept_chunks()["G2"] == 0
    back, tiers = served(node, node.b, text)
    assert same(back, cold)
    assert back.cached_tokens == reusable(cold.prompt_tokens)
    assert tiers == {"G2", "G3"}


def test_from_s3_after_the_ssd_was_emptied(node: Node) -> None:
    text = prompt("s3")
    cold = computed_and_kept(node, text)
    node.restart(empty_ssd=True)
    assert node.daemon.kept_chunks()["G3"] == 0
    back, tiers = served(node, node.b, text)
    assert same(back, cold)
    assert back.cached_tokens == reusable(cold.prompt_tokens)
    assert tiers == {"G2", "G4"}


def test_notes_in_s3_name_blocks_as_the_engines_own_events_do(node: Node) -> None:
    """The daemon of the connector that made them told no router; another node reads them."""
    text = prompt("noted")
    cold = computed_and_kept(node, text)
    names = names_heard(node.a, node.events, text)
    assert len(names) >= reusable(cold.prompt_tokens) // BLOCK_TOKENS
    asyncio.run(noted_in_s3(node.s3, set(names)))


async def noted_in_s3(server: EmbeddedS3, wanted: set[int]) -> None:
    """Wait until a tier that just opened knows notes of all these blocks, from objects alone."""
    listener = RecordingListener()
    tier = S3Tier(bucket_of(server), 1 << 40, listener, node="reader", prefix="kvbm/")
    await tier.open()
    try:
        async with asyncio.timeout(RELEASE_TIMEOUT_S * 3):
            while True:
                notes = [Note.decode(note) for note in listener.notes.values()]
                if wanted <= {name for note in notes for name in note.chain.tolist()}:
                    return
                await asyncio.sleep(0.1)
    finally:
        await tier.close()


def test_vllm_tells_where_its_hits_came_from(node: Node) -> None:
    """Runs after the tests above, which took KV from each tier."""
    by_source: dict[str, float] = {}
    loaded: dict[str, float] = {}
    for engine in (node.a, node.b):
        for labels, value in engine.metrics("vllm:prompt_tokens_cached_by_source_total").items():
            source = labels.partition('source="')[2].partition('"')[0]
            by_source[source] = by_source.get(source, 0) + value
        for labels, value in engine.metrics("vllm:kvbm_loaded_chunks_total").items():
            tier = labels.partition('tier="')[2].partition('"')[0]
            loaded[tier] = loaded.get(tier, 0) + value
    assert by_source["host"] > 0 and by_source["disk"] > 0
    assert by_source["external_unspecified"] > 0, "S3"
    assert loaded["G2"] > 0 and loaded["G3"] > 0 and loaded["G4"] > 0
    assert max(node.a.metrics("vllm:kvbm_connected").values()) == 1


def test_a_flipped_bit_on_the_ssd_is_found_and_another_tier_serves(node: Node) -> None:
    text = prompt("flipped ssd")
    cold = computed_and_kept(node, text)
    node.restart(between=lambda: flip_extents(node.daemon.ssd_folder / "extents"))
    back, tiers = served(node, node.b, text)
    assert same(back, cold)
    assert back.cached_tokens == reusable(cold.prompt_tokens)
    assert corrupt_chunks(node)["G3"] > 0
    assert "G4" in tiers


def test_flipped_bits_on_ssd_and_s3_are_found_and_computed_again(node: Node) -> None:
    text = prompt("flipped everywhere")
    cold = computed_and_kept(node, text)

    def flip() -> None:
        flip_extents(node.daemon.ssd_folder / "extents")
        assert asyncio.run(flip_objects(node.s3)) > 0

    node.restart(between=flip)
    back = node.b.complete(text)
    assert same(back, cold)
    assert back.cached_tokens == 0
    found = corrupt_chunks(node)
    assert found["G3"] > 0 and found["G4"] > 0
    node.settle()
    node.b.forget()
    again = node.b.complete(text)
    assert same(again, cold)
    assert again.cached_tokens == reusable(cold.prompt_tokens), "it was stored anew"


def test_a_reset_cache_is_never_used_again(node: Node) -> None:
    text = prompt("reset")
    cold = computed_and_kept(node, text)
    node.a.disown()
    wait_until(lambda: node.daemon.engines() == 2, 60.0, "the engine is connected anew")
    mine = node.a.complete(text)
    assert same(mine, cold)
    assert mine.cached_tokens == 0
    others = node.b.complete(text)
    assert same(others, cold)
    assert others.cached_tokens == reusable(cold.prompt_tokens), "another engine's is untouched"
    node.settle()
    node.a.forget()
    assert node.a.complete(text).cached_tokens == reusable(cold.prompt_tokens), "what came after"


def test_a_killed_engine_leaves_no_claim_and_no_lease(node: Node) -> None:
    """Runs last: one engine is gone after it."""
    node.b.complete(prompt("last words"))
    before = node.daemon.leased_bytes()
    node.b.kill()
    wait_until(lambda: node.daemon.engines() == 1, RELEASE_TIMEOUT_S, "its session ended")
    wait_until(lambda: node.daemon.leased_bytes() < before, RELEASE_TIMEOUT_S, "leases are back")
    assert node.daemon.claims() == 0
    text = prompt("after it")
    cold = computed_and_kept(node, text)
    back, tiers = served(node, node.a, text)
    assert same(back, cold) and tiers == {"G2"}, "the other engine is not disturbed"


def flip_extents(extents: Path) -> None:
    """One bit in every 16 KiB that hold anything."""
    with extents.open("r+b") as file:
        offset = 0
        while page := file.read(16384):
            if any(page):
                file.seek(offset + 100)
                file.write(bytes([page[100] ^ 1]))
            offset += len(page)
            file.seek(offset)


async def flip_objects(server: EmbeddedS3) -> int:
    """One bit near the begin of every 16 KiB of every object; how many objects."""
    bucket = bucket_of(server)
    await bucket.open()
    try:
        objects = await bucket.list_after("", "")
        for listed in objects:
            body = bytearray(await bucket.get_range(listed.name, 0, listed.size_bytes))
            for at in range(100, len(body), 16384):
                body[at] ^= 1
            await bucket.put(listed.name, body)
    finally:
        await bucket.close()
    return len(objects)


def bucket_of(server: EmbeddedS3) -> S3Bucket:
    return S3Bucket(
        BUCKET,
        endpoint_url=server.endpoint_url,
        region=server.region,
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
    )
