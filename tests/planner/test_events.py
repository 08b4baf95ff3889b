"""What routers and nodes tell on the event plane: over a real NATS server, and over a bad plane."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from mocker.serve import MockEngine
from planner.assembly import running
from planner.events import ANY_TIER, Events, Routed
from planner.fleet import completed
from planner.loop import Loop, Step
from planner.measure import Measurement
from planner.observe import Counters, Observation, Observer, Snapshot, Told
from planner.perf import Speed
from planner.settings import PlannerSettings
from router.index import WorkerId
from router.load import Active, ActiveSequences
from router.peers import SILENCE_S, subject_of
from router.replica import ReplicatedLoad
from router.workers import Worker, Workers
from runtime.drain import drain_key
from runtime.embedded import EmbeddedNats
from runtime.engine_card import EngineCard
from runtime.events.memory import MemoryPlane
from tests.planner.builders import WORK, engine, load, seen
from tests.router.pools.world import MODEL, Site, a_site, until
from tests.router.service.world import World

NAMESPACE = "front"
CARD = EngineCard(model=MODEL, url="http://x", block_tokens=16, kv_blocks=100)
PROMPT = list(range(1000, 1000 + 16 * 40))


class Now:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


# -- a real plane --------------------------------------------------------------------------


@asynccontextmanager
async def planner_of(site: Site, **given: Any) -> AsyncIterator[Loop]:
    """One that decides nothing and can read no engine's page."""
    overrides = {
        **site.place,
        "namespace": NAMESPACE,
        "observe.prometheus": {"url": "http://127.0.0.1:9"},
        **given,
    }
    settings = PlannerSettings.load(environ={}, overrides=overrides).value
    async with running(settings, {}) as loop:
        await until("engines are listed", lambda: loop.readiness()["discovery"] is None)
        yield loop


async def ask(client: openai.AsyncOpenAI, prompt: list[int], tokens: int = 20) -> str:
    """As a stream, which tells when its first token came."""
    events = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, stream=True
    )
    return "".join([event.choices[0].text async for event in events])


async def test_engines_that_cannot_be_read_count_as_routers_tell(tmp_path: Path) -> None:
    """And what their node measured is known, which no page says."""
    with EmbeddedNats(tmp_path / "nats") as nats:
        async with a_site(tmp_path, nats) as site:
            engines = await site.engines(NAMESPACE, engines=2)
            client = await site.frontend(2)
            async with planner_of(site) as loop:
                events = loop.events
                assert events is not None
                await until("nodes tell speeds", lambda: _told(events, engines[0]).token_s > 0)
                await ask(client, PROMPT)
                await until("routers tell", lambda: _routed(events, engines).first_tokens == 1)
                await loop.tick()
                for _ in range(5):
                    await ask(client, PROMPT)
                await until("all is told", lambda: _routed(events, engines).first_tokens == 6)
                await until("nothing is under way", lambda: not events.sequences)
                step = await loop.tick()
                seen = step.plan.observation
                assert [e.teller for e in seen.engines if e.seconds is not None] == ["routers"] * 2
                assert seen.traffic is not None
                assert (seen.traffic.requests, seen.traffic.prompts) == (5, 5)
                assert seen.traffic.prompt_tokens == pytest.approx(len(PROMPT), abs=16)
                assert seen.traffic.hits[ANY_TIER] > 0.9
                assert seen.traffic.ttft_s is not None
                await _an_answer_under_way_is_seen(client, loop, events)
                await _an_answer_that_comes_whole_is_seen(client, loop, events)
                told = step.plan.observation.engines[0].told
                assert 0 < told.load_s["G2"] < told.token_s
                assert not any(n for kind, n in events.counts.items() if kind != "heard")
                nats.stop()
                await until("the plane is away", lambda: events.problem is not None)
                step = await loop.tick()
                assert any("event plane" in why for why in step.plan.observation.problems)


async def _an_answer_under_way_is_seen(
    client: openai.AsyncOpenAI, loop: Loop, events: Events
) -> None:
    long = asyncio.create_task(ask(client, PROMPT, 4000))
    await until("it is under way", lambda: events.sequences == 1)
    step = await loop.tick()
    assert sum(e.running for e in step.plan.observation.engines) == 1
    assert 0 < sum(e.kv_used for e in step.plan.observation.engines) < 0.5
    await long
    await until("it has ended", lambda: not events.sequences)
    step = await loop.tick()
    assert not any(e.running + e.waiting + e.kv_used for e in step.plan.observation.engines)


async def _an_answer_that_comes_whole_is_seen(
    client: openai.AsyncOpenAI, loop: Loop, events: Events
) -> None:
    """When its first token came nobody told; all else counts as of a stream."""
    await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=320)
    await until("it has ended", lambda: not events.sequences)
    traffic = (await loop.tick()).plan.observation.traffic
    assert traffic is not None
    assert (traffic.requests, traffic.prompts, traffic.ttft_s) == (1, 1, None)
    assert traffic.prompt_tokens == pytest.approx(len(PROMPT), abs=16)
    assert traffic.output_tokens == pytest.approx(320, abs=16)


async def test_a_mock_engine_that_is_asked_to_drain_gets_nothing_more(tmp_path: Path) -> None:
    """It finishes what it has, and the planner sees both."""
    with EmbeddedNats(tmp_path / "nats") as nats:
        async with a_site(tmp_path, nats) as site:
            engines = await site.engines(NAMESPACE, engines=2)
            client = await site.frontend(2)
            async with planner_of(site, **{"observe.prometheus": None}) as loop:
                long = [asyncio.create_task(ask(client, [n] * 64, 4000)) for n in range(4)]

                def busy() -> list[int]:
                    return [one.engine.engine.running_count for one in engines]

                await until("both engines are at work", lambda: sum(busy()) == 4 and all(busy()))
                going, staying = engines
                name = going._serving.name  # type: ignore[union-attr]
                discovery = loop._fleet._instances._discovery
                await discovery.put(drain_key(name), b"1")
                await until(
                    "it says that it is stopping",
                    lambda: not loop._fleet._instances.known[name].is_serving,
                )
                step = await loop.tick()
                assert _phase_of(step, going) == ("draining", True)
                served = staying.engine.engine.running_count
                more = [asyncio.create_task(ask(client, [9, n] * 64, 4000)) for n in range(4)]
                await until("they are under way", lambda: busy()[1] == served + 4)
                assert busy()[0] == 4 - served
                assert all([await one for one in (*long, *more)])
                step = await loop.tick()
                assert _phase_of(step, going) == ("draining", False)


def _phase_of(step: Step, mock: MockEngine) -> tuple[str, bool]:
    """And whether it is at work."""
    name = f"{mock.instance:x}"
    [found] = [e for e in step.plan.observation.engines if e.name == name]
    return found.phase, found.running + found.waiting > 0


def _told(events: Events, mock: MockEngine) -> Told:
    return events.told(mock.instance, 16)


def _routed(events: Events, engines: list[MockEngine]) -> Counters:
    found = [events.routed(one.instance, CARD) for one in engines]
    counters = [one.counters for one in found if one is not None]
    return Counters(first_tokens=sum(one.first_tokens for one in counters))


# -- a bad plane ---------------------------------------------------------------------------


class BadPlane(MemoryPlane):
    def __init__(self) -> None:
        super().__init__()
        self.is_bad = False

    def publish(self, subject: str, payload: bytes) -> bool:
        return True if self.is_bad else super().publish(subject, payload)


class Routing:
    """A router of two workers, and the planner's ears."""

    def __init__(self) -> None:
        self.now = Now()
        self.plane = BadPlane()
        self.workers = Workers()
        for instance in (1, 2):
            self.workers.add(Worker(WorkerId(instance)))
        self.router = self.make_router(1)
        self.events = Events(self.plane, "test", self.now)

    def make_router(self, epoch: int) -> ReplicatedLoad:
        active = ActiveSequences(self.workers)
        return ReplicatedLoad(
            *(self.workers, active, self.plane),
            namespace="test",
            model="m",
            name="r",
            epoch=epoch,
            clock=self.now,
        )

    def begin(self, request: str, instance: int = 1, *, blocks: int = 4, new: float = 32) -> None:
        row = self.workers.row(WorkerId(instance))
        assert self.router.begin(request, Active(row, list(range(blocks)), 1, new, 0.1))

    def figures(self, instance: int = 1) -> tuple[float, float, float, float]:
        """Arrived, under way, prompts, used blocks."""
        found = self.events.routed(instance, CARD)
        if found is None:
            return 0.0, 0.0, 0.0, 0.0
        told = found.counters
        return told.arrived, found.requests, told.prompts, round(100 * found.kv_used)

    async def until(self, figures: tuple[float, float, float, float]) -> None:
        self.router.tick()
        await until(f"figures {figures}", lambda: self.figures() == figures)


@pytest.fixture
async def routing() -> AsyncIterator[Routing]:
    made = Routing()
    hearing = asyncio.create_task(made.events.run())
    answering = asyncio.create_task(made.router.run())
    await asyncio.sleep(0)
    yield made
    for task in (hearing, answering):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_each_request_counts_once_from_its_begin_to_its_end(routing: Routing) -> None:
    routing.begin("a")
    routing.begin("b")  # of the same prompt: its blocks are there already
    await routing.until((2, 2, 0, 6))
    found = routing.events.routed(1, CARD)
    assert found is not None
    assert (found.running, found.waiting) == (1, 1)
    routing.now.s = 3.0
    routing.router.prefilled("a")
    routing.router.grow("a", 2)
    await routing.until((2, 2, 1, 8))
    routing.router.end("a")
    routing.router.end("b")  # it never had a token
    await routing.until((2, 0, 1, 0))
    found = routing.events.routed(1, CARD)
    assert found is not None
    told = found.counters
    assert (told.ttft_s, told.first_tokens, told.output_tokens) == (3.0, 1, 32)
    assert (told.prompt_tokens, told.cached_tokens) == (64, {ANY_TIER: 32})
    assert not routing.events.sequences


async def test_where_prompts_are_computed_elsewhere_both_engines_are_told_of() -> None:
    async with World.begin() as world:
        router = await world.router(index__source="routes", events__plane="memory")
        for instance, role in ((1, "prefill"), (2, "decode")):
            await world.engines.add(instance, role=role)
        await router.see("1.0", "2.0")
        events = Events(router.assembly.plane, router.assembly.namespace)
        hearing = asyncio.create_task(events.run())
        await asyncio.sleep(0)
        told = {"streamed": ("first_token", "output?tokens=31"), "whole": ("answered?tokens=32",)}
        for request, happened in told.items():
            await router.route(list(range(64)), request=request)
            for what in happened:
                answer = await router.client.post(f"/v1/requests/{request}/{what}")
                assert answer.status_code == 200
        await until("both are under way", lambda: _told_of(events, 2).running == 2)
        assert _told_of(events, 2).waiting == 0
        for request in told:
            await router.client.post(f"/v1/requests/{request}/end")
        await until("both have ended", lambda: not events.sequences)
        # Of the second prompt only a last token was new.
        computed, decoded = _told_of(events, 1).counters, _told_of(events, 2).counters
        assert (computed.prompts, computed.prompt_tokens, computed.first_tokens) == (2, 65, 1)
        assert (decoded.prompts, decoded.output_tokens) == (2, 64)
        hearing.cancel()


async def test_what_was_lost_is_made_up_for_and_counts_no_request_twice(routing: Routing) -> None:
    routing.begin("a")
    await routing.until((1, 1, 0, 5))
    routing.plane.is_bad = True
    routing.begin("b")
    routing.router.flush()
    routing.plane.is_bad = False
    routing.begin("c")
    # Of "b" the state tells that it is there, not when it came.
    await routing.until((1, 3, 0, 7))
    assert routing.events.counts["gap"] == 1
    for request in "abc":
        routing.router.end(request)
    await routing.until((1, 0, 0, 0))


async def test_a_planner_that_comes_late_knows_what_runs_and_counts_no_arrival(
    routing: Routing,
) -> None:
    routing.plane.is_bad = True
    for number in range(300):  # more than one message of state
        routing.begin(str(number), 1 + number % 2)
    routing.router.prefilled("0")
    routing.router.flush()
    routing.plane.is_bad = False
    await routing.until((0, 150, 0, 100))
    routing.router.end("0")
    await routing.until((0, 149, 0, 100))


async def test_a_router_that_is_silent_takes_its_requests_along(routing: Routing) -> None:
    routing.begin("a")
    await routing.until((1, 1, 0, 5))
    routing.plane.is_bad = True
    routing.now.s = SILENCE_S + 1
    await until("it is taken for gone", lambda: routing.events.counts["silent"] == 1)
    assert routing.events.routed(1, CARD) is None  # nobody is heard


async def test_what_makes_no_sense_is_counted(routing: Routing) -> None:
    routing.plane.publish(subject_of("test", "m"), b"\xc1")
    routing.plane.publish("namespace.test.component.kvbm.kv_metrics", b"{")
    await until("it was heard", lambda: routing.events.counts["malformed"] == 2)
    for count in (-1.0, float("nan"), float("inf"), 1e12):
        routing.begin(f"{count}", new=count)
    routing.begin("a")
    routing.router.grow("a", -1)
    routing.router.flush()
    await until("all was heard", lambda: routing.events.counts["malformed"] == 7)
    assert routing.figures() == (1, 1, 0, 5)


def _told_of(events: Events, instance: int) -> Routed:
    found = events.routed(instance, CARD)
    return found or Routed(Counters(), 0, 0, 0)


# -- with pages ----------------------------------------------------------------------------


def test_who_tells_of_an_engine_may_change_and_nothing_counts_twice() -> None:
    def look(at_s: float, requests: float, teller: Any) -> Observation:
        told = Counters(arrived=requests, prompts=requests, first_tokens=requests)
        one = engine("a", told)
        return observer.take(Snapshot(at_s, (dataclasses.replace(one, teller=teller),)))

    observer = Observer()
    counts = [
        look(at_s, requests, teller).traffic
        for at_s, requests, teller in (
            (0.0, 100, "page"),
            (5.0, 110, "page"),
            (10.0, 7, "routers"),
            (15.0, 9, "routers"),
            (20.0, 160, "page"),
            (25.0, 164, "page"),
        )
    ]
    assert [None if t is None else t.requests for t in counts] == [None, 10, None, 2, None, 4]


def test_what_is_on_its_way_to_an_engine_counts_before_its_page_says_so() -> None:
    page = dataclasses.replace(engine("a", Counters(), running=3.0), waiting=1.0)
    old = Routed(Counters(), running=5.0, waiting=4.0, kv_used=0.9)
    found = completed(page, old, CARD)
    assert (found.running, found.waiting, found.kv_used) == (4.0, 5.0, page.kv_used)
    fresh = Routed(Counters(), running=2.0, waiting=1.0, kv_used=0.9)
    assert completed(page, fresh, CARD) == page


def test_what_nodes_measured_corrects_a_profile_and_helps_without_one() -> None:
    told = Told(2e-5, 1e-9, {"G2": 1e-6})
    engines = [
        dataclasses.replace(load(name), told=one)
        for name, one in (("a", told), ("b", Told()), ("c", told))
    ]
    profile = Speed(0.01, 9e-5, load_s={"G2": 7e-6, "G3": 8e-6})
    measured = Measurement("aggregated", profile, looks_max=256, looks_min=5)
    measured.add(seen(0.0, engines), None)
    found = measured.speed()
    assert found == Speed(0.01, 2e-5, 1e-9, load_s={"G2": 1e-6, "G3": 8e-6})
    assert Measurement("aggregated", None, looks_max=256, looks_min=5).speed() is None
    prefill = Measurement("prefill", None, looks_max=256, looks_min=5)
    prefill.add(seen(0.0, [dataclasses.replace(load("p", role="prefill"), told=told)]), None)
    assert prefill.speed() == Speed(0.0, 2e-5, 1e-9, load_s={"G2": 1e-6})
    alone = Measurement("aggregated", None, looks_max=256, looks_min=5)
    for number in range(8):  # of looks that do not tell what a token takes
        look = dataclasses.replace(
            load("a", running=4.0), seconds=30.0, itl_s=30.0, intervals=3000.0, told=told
        )
        alone.add(seen(30.0 * number, [look]), WORK)
    learnt = alone.speed()
    assert learnt is not None
    assert learnt.token_s == pytest.approx(2e-5)
    assert learnt.load_s == {"G2": 1e-6}
