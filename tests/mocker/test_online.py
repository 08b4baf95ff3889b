"""A trace on real processes and planes, against the same in virtual time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mocker.compare import Scene, replay
from mocker.online import OnlineSettings, replay_online, tokens_of
from mocker.trace import TraceEntry
from runtime.hashing import block_hashes

SCENE = Scene(engines=2, engines_per_node=1, block_tokens=128)


def conversations(count: int) -> list[TraceEntry]:
    """Three long prompts that come back, one after another, with another end each time."""
    return [
        TraceEntry(1200.0 * n, 512 * 7, 8, (*range(n % 3 * 10, n % 3 * 10 + 6), 1000 + n))
        for n in range(count)
    ]


async def test_what_the_router_believes_is_what_engines_find() -> None:
    entries = conversations(18)
    run = await replay_online(OnlineSettings(SCENE, speedup=4.0), entries, "kv")
    records = run.result.records
    assert [record.request_id for record in records] == list(range(18))
    assert all(len(r.token_times_ps) == 8 and r.outcome == "finished" for r in records)
    assert run.feed.is_exact and run.feed.events_total > 0
    assert len(run.feed.nodes) == 2 and not run.feed.malformed_total
    found = {r.request_id: r.cached_tokens.get("G1", 0) for r in records}
    # Events come late, and nothing is evicted here: what the router believes is there.
    assert all(run.believed[number] <= found[number] for number in range(18))
    assert sum(believed == 6 * 512 for believed in run.believed.values()) >= 6
    assert set(found.values()) <= {0, 6 * 512}
    offline = replay(SCENE, entries, "kv").figures()["hit_rate"]["G1"]
    assert offline >= run.result.figures()["hit_rate"]["G1"] > offline / 2


def test_equal_ids_are_equal_tokens() -> None:
    one = conversations(1)[0]
    other = replace(one, hash_ids=(*one.hash_ids[:6], 77), input_tokens=512 * 6 + 100)
    first, second = (block_hashes(tokens_of(entry), 512) for entry in (one, other))
    assert len(second) == 6 and np.array_equal(first[:6], second)
    assert len(set(first.tolist())) == 7
