"""What is read: pages of real meters, a Prometheus server, and whoever does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from frontend.meter import Meter
from mocker.engine import Engine as MockEngine
from mocker.gauges import Gauges
from mocker.replay import FleetSettings
from planner.fleet import Fleet
from planner.observe import Counters
from planner.pages import NAMES, engine_page, frontend_page, samples
from planner.settings import PrometheusSettings
from planner.sources import Pages, Prometheus, Unread
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.discovery.memory import MemoryStore
from runtime.engine_card import COMPONENT, ENDPOINT, EngineCard
from runtime.instances import Registration
from runtime.lifecycle import Lifecycle, State
from runtime.names import EndpointName, InstanceName
from tests.mocker.builders import settings as mock_settings

VLLM = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 10.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 5000.0
vllm:generation_tokens_total{engine="0",model_name="m"} 700.0
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="device"} 1000.0
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="host"} 500.0
vllm:prompt_tokens_cached_by_source_total{engine="0",model_name="m",source="disk"} 250.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 1000.0
vllm:cache_config_info{block_size="16",num_gpu_blocks="100",engine="0"} 1.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 6.5
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 13.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 9.0
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 600.0
vllm:nonsense{ 12
"""


def test_an_engines_page_is_read_over_all_its_ranks() -> None:
    found = engine_page(samples(VLLM))
    assert found is not None
    assert (found.running, found.waiting, found.kv_used) == (5, 4, 0.375)
    assert found.kv_tokens == 1600
    told = found.counters
    assert told.arrived == 20
    assert (told.prompts, told.prompt_tokens, told.output_tokens) == (13, 5000, 700)
    assert told.cached_tokens == {"G1": 1000, "G2": 500, "G3": 250}
    assert (told.ttft_s, told.first_tokens, told.itl_s, told.intervals) == (6.5, 13, 9, 600)


def test_a_real_engines_page_is_understood() -> None:
    """Recorded from vLLM 0.32.0 with our connector in tests/e2e/test_frontend.py; of histograms
    only sums and counts are kept, and what is not vLLM's is left out."""
    told = samples(Path(__file__).with_name("vllm_page.txt").read_text())
    assert {sample.name for sample in told} == {n for n in NAMES if n.startswith("vllm:")}
    found = engine_page(told)
    assert found is not None
    assert (found.running, found.waiting, found.kv_used) == (0, 0, 0)
    assert found.kv_tokens == 262_144  # as its `kv_cache_size_tokens` says
    assert found.counters == Counters(
        arrived=96,
        prompts=96,
        prompt_tokens=53_333,
        output_tokens=6_285,
        cached_tokens={"G1": 41_888, "G2": 4_512, "peer": 0, "G3": 0, "G4": 0},
        ttft_s=7.681275844573975,
        first_tokens=96,
        itl_s=73.0187599149649,
        intervals=6_189,
    )


def test_an_engine_that_does_not_tell_sources_tells_hits_above_and_below() -> None:
    lines = [line for line in VLLM.splitlines() if "by_source" not in line]
    page = "\n".join([*lines, "vllm:external_prefix_cache_hits_total 70"])
    found = engine_page(samples(page))
    assert found is not None
    assert found.counters.cached_tokens == {"G1": 1000, "lower": 70}


def test_the_mock_engines_page_is_an_engines() -> None:
    fleet = FleetSettings(mock_settings())
    found = engine_page(samples(Gauges("m").text(MockEngine(fleet.engine), waiting=3)))
    assert found is not None
    assert found.waiting == 3  # what waits for a daemon's chunks keeps a drain from ending
    assert found.kv_tokens == fleet.engine.num_blocks * fleet.engine.block_size


def test_the_frontends_own_meter_is_understood() -> None:
    meter = Meter()
    for model, tokens in (("m", 300), ("m", 100), ("other", 7)):
        one = meter.begin("/v1/completions")
        one.model = model
        one.prepared(tokens)
        one.first_token()
        one.end()
    under_way = meter.begin("/v1/completions")
    told = samples(generate_latest(meter.registry).decode())
    found = frontend_page(told, "m")
    assert found is not None
    assert (found.prompts, found.prompt_tokens, found.first_tokens) == (2, 400, 2)
    assert found.arrived == 3  # and the one under way, whosever it is
    every = frontend_page(told, None)
    assert every is not None
    assert every.arrived == 4
    under_way.end()
    assert frontend_page(samples(VLLM), None) is None
    assert frontend_page([], None) is None, "as the operators' address of a frontend tells"
    idle = frontend_page(samples(generate_latest(Meter().registry).decode()), "m")
    assert idle == Counters()
    assert engine_page(told) is None


class Answers:
    """A server that answers what it is told to."""

    def __init__(self) -> None:
        self.metrics: str | None = VLLM
        self.vector: Any = None
        self.asked: list[Request] = []
        self.url = ""

    async def page(self, request: Request) -> Response:
        self.asked.append(request)
        if self.metrics is None:
            return PlainTextResponse("not yet", 503)
        return PlainTextResponse(self.metrics)

    async def query(self, request: Request) -> Response:
        self.asked.append(request)
        return JSONResponse(self.vector)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def answering() -> AsyncIterator[Answers]:
    answers = Answers()
    routes = [Route("/metrics", answers.page), Route("/api/v1/query", answers.query)]
    config = uvicorn.Config(Starlette(routes=routes), port=0, log_config=None, lifespan="off")
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    answers.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield answers
    server.should_exit = True
    await task


async def test_pages_are_read_and_what_is_not_there_says_why() -> None:
    async with answering() as answers:
        source = Pages(5.0)
        found = await source.read([answers.url, "http://127.0.0.1:9"])
        page = found[answers.url]
        assert not isinstance(page, Unread)
        assert engine_page(page) is not None
        assert isinstance(found["http://127.0.0.1:9"], Unread)
        answers.metrics = None
        away = (await source.read([answers.url]))[answers.url]
        assert away == Unread(f"{answers.url}/metrics answered with status 503 not yet")
        await source.close()


async def test_a_prometheus_server_is_asked_once_for_everybody() -> None:
    """Shapes of https://prometheus.io/docs/prometheus/latest/querying/api/."""
    async with answering() as answers:
        made = [
            {
                "metric": dict(sample.labels, __name__=sample.name, instance="10.0.0.7:8000"),
                "value": [1763750000.123, str(sample.value)],
            }
            for sample in samples(VLLM)
        ]
        answers.vector = {"status": "success", "data": {"resultType": "vector", "result": made}}
        fields = {"url": answers.url, "selector": 'job="vllm"', "token": "s3cret-ish"}
        settings = PrometheusSettings.model_validate(fields)
        source = Prometheus(settings)
        urls = ["http://10.0.0.7:8000", "http://10.0.0.8:8000"]
        found = await source.read(urls)
        page = found[urls[0]]
        assert not isinstance(page, Unread)
        assert engine_page(page) == engine_page(samples(VLLM))
        assert found[urls[1]] == Unread("Prometheus has no instance 10.0.0.8:8000")
        [asked] = answers.asked
        query = asked.query_params["query"]
        assert query.startswith('{__name__=~"')
        assert query.endswith('",job="vllm"}')
        assert all(name in query for name in NAMES)
        assert asked.headers["authorization"] == "Bearer s3cret-ish"
        for odd in (
            {"status": "error", "errorType": "bad_data", "error": "parse error"},
            {"status": "success", "data": {"resultType": "matrix", "result": []}},
            [1],
        ):
            answers.vector = odd
            assert isinstance((await source.read(urls))[urls[0]], Unread)
        await source.close()


@pytest.mark.parametrize("state", [State.REGISTERED, State.RUNNING, State.STOPPING])
async def test_engines_are_found_with_their_phase_and_their_load(state: State) -> None:
    async with answering() as answers:
        discovery = create_discovery(DiscoverySettings(discovery="memory"), {}, MemoryStore())
        await discovery.start()
        endpoint = EndpointName("default", COMPONENT, ENDPOINT)
        for number, model in ((1, "m"), (2, "another")):
            card = EngineCard(model=model, url=answers.url, block_tokens=16)
            name = InstanceName(endpoint, number)
            one = Registration(discovery, name, Lifecycle(), answers.url, card.labels())
            await one.register()
            if state is not State.REGISTERED:
                await one.move(state)
        fleet = Fleet(discovery, "default", "m", [answers.url], Pages(5.0))
        await fleet.start()
        async with asyncio.timeout(60):
            while not fleet.is_synced:
                await asyncio.sleep(0.01)
        snapshot, [member] = await fleet.look(5.0, {})
        phases = {State.REGISTERED: "starting", State.RUNNING: "serving"}
        assert member.phase == phases.get(state, "draining")
        assert member.requests == 9
        assert snapshot.engines[0].counters is not None
        assert snapshot.problems == (f"{answers.url} has no metrics of a frontend",)
        await fleet.close()
        await discovery.close()
