"""Differences of counters: what happened between two looks, and nothing that did not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.observe import Counters, EngineSnapshot, Observer, Snapshot, Traffic
from tests.planner.builders import engine


def counters(requests: float, *, cached: float = 0.0) -> Counters:
    """Of engines whose prompts have 100 tokens and answers 10."""
    return Counters(
        arrived=requests,
        prompts=requests,
        prompt_tokens=100 * requests,
        output_tokens=10 * requests,
        cached_tokens={"G1": cached},
        ttft_s=0.5 * requests,
        first_tokens=requests,
        itl_s=0.02 * requests,
        intervals=requests,
    )


def test_the_second_look_tells_what_happened_since_the_first() -> None:
    observer = Observer()
    first = observer.take(Snapshot(10.0, (engine("a", counters(5)), engine("b", counters(7)))))
    assert first.traffic is None
    after = (engine("a", counters(15, cached=600)), engine("b", counters(17)))
    found = observer.take(Snapshot(15.0, after))
    assert found.traffic is not None
    assert found.traffic.requests_per_s == pytest.approx(4.0)
    assert found.traffic.prompt_tokens == pytest.approx(100)
    assert found.traffic.output_tokens == pytest.approx(10)
    assert found.traffic.hits == {"G1": pytest.approx(0.3)}
    assert found.traffic.ttft_s == pytest.approx(0.5)
    assert [e.computed_tokens for e in found.engines] == [pytest.approx(400), pytest.approx(1000)]


def test_an_engine_that_was_started_anew_is_counted_from_nothing() -> None:
    observer = Observer()
    observer.take(Snapshot(0.0, (engine("a", counters(1000)),)))
    found = observer.take(Snapshot(5.0, (engine("a", counters(3)),)))
    assert found.traffic is not None
    assert found.traffic.requests == 3


def test_an_engine_that_is_first_seen_with_a_long_past_brings_none_of_it() -> None:
    observer = Observer()
    observer.take(Snapshot(0.0, (engine("a", counters(10)),)))
    both = (engine("a", counters(12)), engine("old", counters(1e6)))
    found = observer.take(Snapshot(5.0, both))
    assert found.traffic is not None
    assert found.traffic.requests == 2
    assert found.engines[1].seconds is None


def test_a_gap_in_reading_is_made_up_for() -> None:
    observer = Observer()
    observer.take(Snapshot(0.0, (engine("a", counters(10)),)))
    assert observer.take(Snapshot(5.0, (engine("a", None),))).traffic is None
    found = observer.take(Snapshot(10.0, (engine("a", counters(14)),)))
    assert found.traffic is not None
    assert found.traffic.requests == 4


def test_prefill_and_decode_engines_tell_of_a_request_their_half_each() -> None:
    """The decode engine has the whole prompt from elsewhere: that is nobody's hit."""

    def look(requests: float) -> tuple[EngineSnapshot, ...]:
        prompt = counters(requests, cached=30 * requests)
        prefill = replace(engine("p", prompt), role="prefill")
        answer = replace(prompt, cached_tokens={"G2": 100 * requests}, output_tokens=9 * requests)
        decode = replace(engine("d", replace(answer, itl_s=4 * requests)), role="decode")
        return replace(prefill, counters=replace(prompt, output_tokens=requests)), decode

    observer = Observer()
    observer.take(Snapshot(0.0, look(0)))
    found = observer.take(Snapshot(5.0, look(10))).traffic
    assert found is not None
    assert (found.requests, found.prompts, found.prompt_tokens) == (10, 10, 100)
    assert (found.output_tokens, found.hits, found.itl_s) == (9, {"G1": 0.3}, 4)


def test_prompts_that_no_frontend_has_seen_tell_nothing_of_users() -> None:
    """Such as those by which a launcher sees that an idle engine computes."""
    observer = Observer()
    observer.take(Snapshot(0.0, (engine("a", counters(0)),), {"f": Counters()}))
    found = observer.take(Snapshot(5.0, (engine("a", counters(1)),), {"f": Counters()})).traffic
    assert found is not None
    assert (found.requests, found.prompts, found.output_tokens, found.hits) == (0, 0, None, {})


def test_frontends_tell_what_arrives_and_engines_what_they_did() -> None:
    """What waits in a frontend for room is load, too."""
    observer = Observer()
    at_first = Snapshot(0.0, (engine("a", counters(0)),), {"f": Counters()})
    observer.take(at_first)
    frontends = {
        "f": Counters(arrived=20, prompts=20, prompt_tokens=2000, ttft_s=9, first_tokens=6)
    }
    found = observer.take(Snapshot(5.0, (engine("a", counters(6)),), frontends))
    assert isinstance(found.traffic, Traffic)
    assert found.traffic.requests == 20
    assert found.traffic.prompts == 6
    assert found.traffic.ttft_s == pytest.approx(1.5)
    assert found.traffic.output_tokens == pytest.approx(10)
