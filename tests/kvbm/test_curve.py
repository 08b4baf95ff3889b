"""The curve and what it answers, against brute force and against tiers with all keys."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from benchmarks.workloads import Request, synthetic
from kvbm.curve import Curve
from kvbm.manager import Wanted
from kvbm.protocol import Pace
from kvbm.what_if import COMPUTED, SizedTier, what_if
from storage_tiers.base import Chunk, Key, TierName
from storage_tiers.miniature import USE, replay
from storage_tiers.policy import EvictionPolicy, LruPolicy
from storage_tiers.testing import make_key
from storage_tiers.value import ValuePolicy

CHUNK = 1 << 20
TOKENS = 16
PACE = Pace(token_s=1e-3, pair_s=1e-6)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_curve(keys_max: int = 4096, window_s: float = 1e9) -> tuple[Curve, Clock]:
    clock = Clock()
    return Curve(keys_max, 1 << 60, window_s, clock=clock), clock


def ask(curve: Curve, keys: Sequence[Key], place: int = 0, **changes: int) -> None:
    group = {"tokens_per_chunk": TOKENS, "window": 0, "chunk_bytes": CHUNK, **changes}
    curve.asked([Wanted(keys=keys, **group)], [np.full(len(keys), place, np.uint8)], PACE)


def key_of(block: int, seed: int = 0) -> Key:
    return Key(hashlib.blake2b(f"{seed}.{block}".encode(), digest_size=15).digest() + b"\0")


def lru(*sizes: int, byte_s: float | None = 1e-9) -> list[SizedTier]:
    names = (TierName.DRAM, TierName.SSD, TierName.S3)
    return [
        SizedTier(name, size * CHUNK, LruPolicy, byte_s)
        for name, size in zip(names, sizes, strict=False)
    ]


def feed(curve: Curve, clock: Clock, requests: Sequence[Request], seed: int = 0) -> None:
    named: dict[int, Key] = {}
    for clock.now_s, blocks in requests:
        for block in blocks:
            if block not in named:
                named[block] = key_of(block, seed)
        ask(curve, [named[block] for block in blocks])
    curve.check_integrity()


def test_the_curve_of_few_keys_is_exact() -> None:
    """Chains of ten, twenty of them in turn: all found from 200 chunks on, nothing below."""
    curve, clock = make_curve()
    for turn in range(60):
        clock.now_s += 1
        ask(curve, [make_key(f"{turn % 20}/{i}") for i in range(10)])
    below, half, above = curve.hit_rates([150 * CHUNK, 202 * CHUNK, 400 * CHUNK])
    assert below.value == 0 and below.error == 0
    assert above.value == pytest.approx(2 / 3) and above.error == 0
    assert half.value <= above.value
    curve.check_integrity()


def test_what_was_found_is_told_by_place_and_old_lookups_fade() -> None:
    curve, clock = make_curve(window_s=100.0)
    keys = [make_key(i) for i in range(6)]
    ask(curve, keys)
    ask(curve, keys, place=2)
    assert curve.found() == pytest.approx([0.5, 0, 0.5])
    clock.now_s += 300
    ask(curve, keys, place=1)
    faded = np.exp(-3)
    whole = 1 + 2 * faded
    assert curve.found() == pytest.approx([faded / whole, 1 / whole, faded / whole])
    (rate,) = curve.hit_rates([64 * CHUNK])
    assert rate.value == pytest.approx((1 + faded) / whole)
    curve.check_integrity()


def test_chunks_stored_without_being_asked_for_take_room() -> None:
    curve, _ = make_curve()
    ask(curve, [make_key("a")])
    curve.stored([Chunk(make_key(i), CHUNK, 0, None, i) for i in range(50)])
    ask(curve, [make_key("a")])
    ask(curve, [make_key(45)])
    small, large = curve.hit_rates([40 * CHUNK, 80 * CHUNK])
    assert small.value == 0 and large.value == pytest.approx(2 / 3)
    recent = curve.uses()
    assert recent.asked == 3 and len(recent.uses) == 53
    told = what_if(recent, lru(40), TierName.DRAM, 80 * CHUNK)
    assert told.hit_now.value == 0 and told.hit_then.value == pytest.approx(2 / 3)


def test_groups_share_their_tokens_and_a_window_has_none() -> None:
    curve, _ = make_curve()
    whole = [Wanted(TOKENS, 0, [make_key(f"{g}{i}") for i in range(4)], CHUNK) for g in "ab"]
    window = Wanted(TOKENS, 2, [make_key(f"w{i}") for i in range(4)], CHUNK)
    curve.asked([*whole, window], [np.zeros(4, np.uint8)] * 3, PACE)
    uses = curve.uses().uses
    assert uses["tokens"].sum() == 4 * TOKENS
    assert uses["prefill_s"].sum() == pytest.approx(PACE.prefill_s(0, 4 * TOKENS), rel=1e-5)
    assert uses["position"].tolist() == [0, 1, 2, 3] * 3
    assert len(set(uses["chain"].tolist())) == 3


def test_a_larger_tier_takes_from_slower_ones_and_from_the_engine() -> None:
    """Ten chains of ten asked for in turn: G2 holds them all or none of them."""
    curve, clock = make_curve()
    for turn in range(100):
        clock.now_s += 1
        ask(curve, [make_key(f"{turn % 10}/{i}") for i in range(10)])
    tiers = [*lru(50), SizedTier(TierName.SSD, 200 * CHUNK, LruPolicy, 3e-9)]
    told = what_if(curve.uses(), tiers, TierName.DRAM, 120 * CHUNK)
    (flow,) = told.flows
    assert (flow.source, flow.target) == ("G3", "G2")
    assert told.gain.value == 0 and told.hit_now.value == told.hit_then.value == 0.9
    assert flow.chunks.value == pytest.approx(9) and flow.tokens.value == pytest.approx(9 * TOKENS)
    assert flow.saved_s is not None
    assert flow.saved_s.value == pytest.approx(9 * CHUNK * 2e-9)

    alone = what_if(curve.uses(), lru(50), TierName.DRAM, 120 * CHUNK)
    (flow,) = alone.flows
    assert (flow.source, flow.target) == (COMPUTED, "G2") and alone.gain.value == 0.9
    assert flow.saved_s is not None
    prefill_s = 0.9 * PACE.prefill_s(0, 10 * TOKENS)
    assert flow.saved_s.value == pytest.approx(prefill_s - 9 * CHUNK * 1e-9, rel=1e-4)

    smaller = what_if(curve.uses(), lru(120), TierName.DRAM, 50 * CHUNK)
    assert smaller.gain.value == -0.9 and smaller.flows[0].target == COMPUTED
    assert smaller.flows[0].saved_s is not None and smaller.flows[0].saved_s.value < 0
    unmeasured = what_if(curve.uses(), lru(50, byte_s=None), TierName.DRAM, 120 * CHUNK)
    assert unmeasured.flows[0].saved_s is None


def test_the_gain_is_told_by_tenant() -> None:
    """Two tenants ask in turn, one for twice as much."""
    curve, _ = make_curve()
    for _ in range(10):
        for chain, tag in (("a", 1), ("b", 1), ("c", 2)):
            ask(curve, [make_key(f"{chain}{i}", tag) for i in range(10)])
    tenants = {1: "acme", 2: "beta"}
    told = what_if(curve.uses(), lru(10), TierName.DRAM, 40 * CHUNK, tenants=tenants)
    assert told.gain.value == pytest.approx(0.9)
    gains = {name: gain.value for name, gain in told.by_tenant.items()}
    assert gains == {"acme": pytest.approx(0.6), "beta": pytest.approx(0.3)}


def test_what_is_sooner_computed_than_loaded_saves_nothing() -> None:
    curve, _ = make_curve()
    for _ in range(4):
        ask(curve, [make_key(i) for i in range(10)])
    told = what_if(curve.uses(), lru(1, byte_s=1.0), TierName.DRAM, 120 * CHUNK)
    assert told.flows[0].saved_s is not None and told.flows[0].saved_s.value == 0


def test_the_log_is_bounded_and_says_from_when_on_it_counts() -> None:
    curve, clock = make_curve(256)
    dice = random.Random(1)
    for _ in range(400):
        clock.now_s += 1
        first = dice.randrange(5000)
        ask(curve, [key_of(first + i) for i in range(20)])
    recent = curve.uses()
    assert 0 < recent.first < len(recent.uses) <= 4 * 256
    assert recent.seconds == pytest.approx(clock.now_s - recent.uses["at_s"][recent.first], abs=2)
    assert recent.asked == pytest.approx(20 * recent.seconds, abs=40)
    # A window shorter than the log bounds it as well.
    short, clock = make_curve(window_s=100.0)
    for _ in range(400):
        clock.now_s += 1
        ask(short, [key_of(dice.randrange(50))])
    recent = short.uses()
    assert recent.asked == pytest.approx(100, abs=1) and recent.seconds == 100


def test_so_many_uses_are_told_and_whole_keys_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key makes up more than are told; it is told nevertheless, or not at all."""
    monkeypatch.setattr("kvbm.curve.USES_TOLD", 100)
    curve, _ = make_curve()
    for number in range(300):
        ask(curve, [key_of(0), key_of(1 + number % 40)])
    recent = curve.uses()
    keys, counts = np.unique(recent.uses["key"], return_counts=True)
    assert 0 < len(keys) < 41 and 0 < recent.rate < 1
    assert set(counts.tolist()) <= {300, 8, 7}
    assert len(recent.uses) <= 100 or counts.tolist() == [300]
    assert recent.asked == 600


@pytest.mark.parametrize("policy", [LruPolicy, ValuePolicy])
def test_the_truth_lies_inside_the_bound_in_95_of_100_runs(
    policy: Callable[[], EvictionPolicy],
) -> None:
    """Two workloads, other hashes each time; `make bench-what-if` does more of it on a trace."""
    inside: list[bool] = []
    bounds: list[float] = []
    for name in ("chats", "documents"):
        requests = synthetic()[name][:800]
        rows = [
            (at_s, 0, n, int.from_bytes(key_of(b)[:8], "little"), 0, CHUNK, i, 0, 0, True)
            for n, (at_s, blocks) in enumerate(requests)
            for i, b in enumerate(blocks)
        ]
        hits = {s: replay(np.array(rows, USE), policy(), s * CHUNK) for s in (600, 1600)}
        for seed in range(6):
            curve, clock = make_curve(1024)
            feed(curve, clock, requests, seed)
            recent = curve.uses()
            now, then = (float(hits[size][-recent.asked :].mean()) for size in (600, 1600))
            tier = SizedTier(TierName.DRAM, 600 * CHUNK, policy, None)
            slack = curve.sideways(600 * CHUNK), curve.sideways(1600 * CHUNK)
            told = what_if(recent, [tier], TierName.DRAM, 1600 * CHUNK, slack=slack)
            for truth, estimate in (
                (now, told.hit_now),
                (then, told.hit_then),
                (then - now, told.gain),
            ):
                inside.append(abs(truth - estimate.value) <= estimate.error)
                bounds.append(estimate.error)
            if policy is LruPolicy and recent.asked == len(rows):
                (rate,) = curve.hit_rates([600 * CHUNK])
                inside.append(abs(rate.value - now) <= rate.error)
    assert np.mean(inside) >= 0.95
    assert np.mean(bounds) < 0.12, "a bound that says something"
