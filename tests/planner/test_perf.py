"""What engines can do: the model, and how it is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.measure import Measurement, Profile, ProfileRefused
from planner.observe import EngineLoad
from planner.perf import Goals, Room, Speed, Work, costs, expect, needed
from tests.planner.builders import GOALS, ROOM, SPEED, WORK, seen


def test_the_time_between_tokens_follows_from_the_share_of_time_that_load_takes() -> None:
    """By hand: a request takes 2000 x 40 us of prefill and 200 x 2100 x 40 ns of decode steps."""
    cost = costs(SPEED, WORK, "aggregated")
    assert cost.prefill_s == pytest.approx(0.08)
    assert cost.decode_s == pytest.approx(0.0168)
    found = expect(SPEED, WORK, 5.0, 1, GOALS, "aggregated")
    assert found.utilisation == pytest.approx(5 * 0.0968)
    assert found.itl_s == pytest.approx(0.007 / (1 - 5 * 0.0968))
    assert found.running == pytest.approx(5 * 200 * found.itl_s)


def test_what_is_cached_in_any_tier_costs_no_engine() -> None:
    bare = needed(SPEED, ROOM, WORK, 60.0, GOALS, most=64)
    for hits in ({"G1": 0.9}, {"G2": 0.5, "G3": 0.4}):
        found = needed(SPEED, ROOM, Work(2000, 200, hits), 60.0, GOALS, most=64)
        assert found.engines < bare.engines / 2


def test_what_is_loaded_makes_its_own_first_token_later() -> None:
    slow = Speed(0.007, 4e-5, load_s={"G3": 1e-4})
    work = Work(2000, 200, {"G3": 0.5})
    assert expect(slow, work, 0.0, 1, GOALS, "prefill").ttft_s == pytest.approx(0.1 + 0.04 + 0.007)
    assert costs(slow, work, "prefill").prefill_s == pytest.approx(0.04)


def test_goals_that_an_idle_engine_misses_ask_for_no_endless_fleet() -> None:
    """The reference's floor got stuck there (its pull request 11624)."""
    hopeless = Goals(ttft_s=0.001, itl_s=0.001, attainment=0.9)
    found = needed(SPEED, ROOM, WORK, 10.0, hopeless, most=1000)
    assert found.engines < 10


def test_kv_that_does_not_fit_asks_for_more_engines() -> None:
    roomy = needed(SPEED, Room(0, 10_000), Work(2000, 2000), 20.0, GOALS, most=64)
    tight = needed(SPEED, Room(50_000, 10_000), Work(2000, 2000), 20.0, GOALS, most=64)
    assert tight.bound == "kv"
    assert tight.engines > roomy.engines


def test_prefill_and_decode_engines_do_their_half_each() -> None:
    both = costs(SPEED, WORK, "aggregated")
    assert costs(SPEED, WORK, "prefill").decode_s == 0
    assert costs(SPEED, WORK, "decode").prefill_s == 0
    assert costs(SPEED, WORK, "prefill").prefill_s == both.prefill_s


@settings(deadline=None, max_examples=25)
@given(
    rates=st.lists(st.floats(0, 300), min_size=2, max_size=8),
    prompt=st.floats(16, 50_000),
    output=st.floats(1, 3000),
    hit=st.floats(0, 1),
    ttft_s=st.floats(0.05, 10),
    itl_s=st.floats(0.005, 0.5),
)
def test_more_load_never_needs_fewer_engines(
    rates: list[float], prompt: float, output: float, hit: float, ttft_s: float, itl_s: float
) -> None:
    goals, work = Goals(ttft_s, itl_s, 0.9), Work(prompt, output, {"G1": hit})
    counts = [needed(SPEED, ROOM, work, rate, goals, most=128).engines for rate in sorted(rates)]
    assert counts == sorted(counts)
    assert all(1 <= count <= 128 for count in counts)


def looks(true: Speed, work: Work, rates: list[float]) -> list[EngineLoad]:
    """What an engine of that speed shows in half a minute at each rate."""
    found = []
    for rate in rates:
        e = expect(true, work, rate, 1, GOALS, "aggregated")
        if e.utilisation > 0.9:
            continue
        steps = 30 / e.itl_s
        found.append(
            EngineLoad(
                *("a", "aggregated", "serving", e.running, 0.0),
                *(e.kv_tokens / 300_000, 300_000, 30.0),
                computed_tokens=30 * rate * work.computed_tokens,
                itl_s=30.0,
                intervals=steps,
            )
        )
    return found


def test_the_speed_of_engines_is_learnt_from_what_they_do() -> None:
    measured = Measurement("aggregated", None, looks_max=256, looks_min=5)
    rates = [1.0, 2.0, 4.0, 6.0, 7.0, 8.0]
    for at, work in enumerate((WORK, Work(500, 800), Work(4000, 50))):
        for number, one in enumerate(looks(SPEED, work, [r * 0.9**at for r in rates])):
            measured.add(seen(30.0 * number, [one]), work)
    found = measured.speed()
    assert found is not None
    assert found.step_s == pytest.approx(SPEED.step_s, rel=0.05)
    assert found.token_s == pytest.approx(SPEED.token_s, rel=0.1)


def test_a_profile_rules_until_engines_say_otherwise() -> None:
    wrong = Speed(SPEED.step_s * 2, SPEED.token_s * 2, kv_token_s=SPEED.kv_token_s * 2)
    measured = Measurement("aggregated", wrong, looks_max=256, looks_min=5)
    assert measured.speed() == wrong
    for number in range(40):
        rate = 1.0 + number % 8
        for one in looks(SPEED, WORK, [rate]):
            measured.add(seen(30.0 * number, [one]), WORK)
    found = measured.speed()
    assert found is not None
    assert found.step_s == pytest.approx(SPEED.step_s, rel=0.3)


def test_without_a_profile_and_looks_nothing_is_claimed() -> None:
    measured = Measurement("aggregated", None, looks_max=256, looks_min=5)
    for one in looks(SPEED, WORK, [2.0]):
        measured.add(seen(0.0, [one]), WORK)
    assert measured.looks == 1
    assert measured.speed() is None


def test_a_profile_is_read_as_the_speed_it_was_measured_at(tmp_path: Path) -> None:
    true = Speed(0.01, 5e-5, 1e-9, 1e-4, 2e-8)
    prefill = [[n, n * true.token_s + n * n / 2 * true.pair_s] for n in (256, 1024, 4096, 16384)]
    decode = [
        [s, kv, true.step_s + s * true.sequence_s + kv * true.kv_token_s]
        for s in (1, 16, 64)
        for kv in (1000, 50_000)
    ]
    path = tmp_path / "profile.json"
    path.write_text(f'{{"prefill": {prefill}, "decode": {decode}, "kv_tokens": 400000}}')
    profile = Profile.read(path)
    found = profile.speed()
    assert found.token_s == pytest.approx(true.token_s, rel=0.01)
    assert found.pair_s == pytest.approx(true.pair_s, rel=0.01)
    assert found.step_s == pytest.approx(true.step_s, rel=0.01)
    assert found.sequence_s == pytest.approx(true.sequence_s, rel=0.01)
    assert profile.room == Room(400_000, 256)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "object"),
        ('{"prefill": [[1, 1]], "decode": [[1, 1, 1], [2, 2, 2]]}', "at least 2"),
        ('{"prefill": [[1, -1], [2, 1]], "decode": []}', "> 0"),
        ('{"prefill": [], "decode": [], "speed": 1}', "unknown field"),
    ],
)
def test_a_profile_of_no_use_is_refused_with_the_reason(
    tmp_path: Path, text: str, why: str
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ProfileRefused, match=why):
        Profile.read(path)
