"""Policies side by side: the production router in virtual time, and what is told of it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mocker.compare import POLICIES, Scene, replay, table
from mocker.plot import plot
from mocker.replay import Replay
from mocker.routing import RouterPolicy, Routing, speed_of
from mocker.trace import TraceEntry, requests
from router.index import Outcome
from router.selector import PolicyName

COMPARED: tuple[PolicyName, ...] = ("round-robin", "kv-blocks", "kv")


def shared_prefixes(count: int = 200, seed: int = 3) -> list[TraceEntry]:
    """Some long prompts that come back, with an end of their own each time."""
    dice = random.Random(seed)
    entries: list[TraceEntry] = []
    for number in range(count):
        stem = dice.randrange(30)
        ids = (*range(stem * 100, stem * 100 + 12), 10_000 + number)
        entries.append(TraceEntry(120.0 * number, 512 * len(ids), dice.randrange(20, 60), ids))
    return entries


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_every_request(policy: PolicyName) -> None:
    entries = shared_prefixes(60)
    result = replay(Scene(engines=3), entries, policy)
    assert len(result.records) == len(entries) and not result.refused
    assert replay(Scene(engines=3), entries, policy).figures() == result.figures(), "same seed"


def test_prompts_that_come_back_are_found_where_they_were() -> None:
    entries = shared_prefixes()
    hit_rates = {
        policy: sum(replay(Scene(engines=4), entries, policy).figures()["hit_rate"].values())
        for policy in COMPARED
    }
    assert hit_rates["kv"] > hit_rates["round-robin"] + 0.05, hit_rates
    assert hit_rates["kv-blocks"] > hit_rates["round-robin"], hit_rates


def test_the_routers_index_is_the_engines_caches_after_a_replay() -> None:
    """With small caches, so that much was evicted: what the router believes is what is there."""
    scene = Scene(engines=3, block_tokens=512)
    fleet = scene.fleet()
    policy = RouterPolicy(fleet, Routing("kv"), 1)
    run = Replay(fleet, policy, requests(shared_prefixes(300), 512), listen=True)
    result = run.run()
    assert set(+policy.outcomes) == {Outcome.DONE}
    computed = sum(totals.tokens_computed for totals in result.engines)
    cached = sum(record.cached_tokens.get("G1", 0) for record in result.records)
    wanted = sum(record.prompt_tokens + record.output_tokens - 1 for record in result.records)
    assert computed + cached == wanted
    for _, request in requests(shared_prefixes(12), 512):
        blocks = request.prompt_tokens // 512
        request.chain.extend(blocks)
        held = [
            len(worker.engine.pool.match(request.chain.hashes, blocks)) for worker in run.workers
        ]
        assert policy.found_blocks(request) == held and any(held)


def test_speeds_by_the_wall_clock_of_an_engine_that_runs_faster() -> None:
    fleet = Scene().fleet()
    slow, fast = (speed_of(fleet.engine, fleet.tiers, speedup) for speedup in (1.0, 10.0))
    assert fast.prefill_s_per_token == pytest.approx(slow.prefill_s_per_token / 10)
    assert fast.step_s_per_block == pytest.approx(slow.step_s_per_block / 10)
    assert fast.load_latency_s == pytest.approx([one / 10 for one in slow.load_latency_s])


def test_the_routers_seconds_are_the_engines() -> None:
    fleet = Scene().fleet()
    speed, step = speed_of(fleet.engine, fleet.tiers), fleet.engine.timing
    prefill_s = (step.prefill_ps(4000, 1000) - step.prefill_ps(0, 0) + step.weights_ps) / 1e12
    expected = speed.prefill_s_per_token * 4000
    expected += speed.prefill_s_per_token2 * (5000**2 - 1000**2) / 2
    assert prefill_s == pytest.approx(expected, rel=1e-3)


def test_the_command_prints_a_table_and_json_and_draws(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": e.timestamp_ms, "input_length": e.input_tokens}
        | {"output_length": e.output_tokens, "hash_ids": e.hash_ids}
        for e in shared_prefixes(40)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "kvbm.cli.__main__", "bench", "replay", "--trace", str(trace)]
    command += ["--policy", "kv", "--policy", "random", "--engines", "2", "--rate", "2"]
    picture = tmp_path / "replay.svg"
    done = subprocess.run(
        [*command, "--plot", str(picture)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *people, told = done.stdout.splitlines()
    assert len(people) == 3 and people[1].split()[0] == "kv"
    assert json.loads(told)["policies"]["kv"]["requests"] == 40
    assert ET.parse(picture).getroot().tag.endswith("svg")
    trace.write_text('{"timestamp": 1}\n')
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "line 1: without input_length" in done.stderr


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="llama-8b-h100"):
        Scene(machine="abacus").fleet()
    with pytest.raises(ValueError, match="no policy"):
        plot("nothing", {"kv": []})
    assert "policy" in table({})
