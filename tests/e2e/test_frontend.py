"""The frontend before real engines: OpenAI's own client, then the loss of every program by kill -9.

What OpenAI's client gets through the frontend is compared with what the same engine answers it
itself. Then the demo's stack loses one of its programs after another under load. Greedy answers are
compared token by token with what an engine computed alone. What was in flight on the killed program
may fail, and says so; nothing else does, and no answer is wrong. Everything is started again while
the load goes on.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import openai
import pytest

from examples.demo.client import SERVED_NAME, Answer, Client, EngineError
from examples.demo.engine import START_TIMEOUT_S, Engine
from examples.demo.frontend import Frontend
from examples.demo.routed import Routed
from examples.demo.stack import Stack
from planner.pages import engine_page, samples
from tests.e2e import openai_requests
from tests.e2e.conftest import ONE_THREAD
from tests.e2e.planned import Planned, planning
from tests.e2e.texts import prompt, reusable
from tests.router.pools.configs import agg
from tests.router.pools.world import a_site, until
from tests.waiting import wait_until

PROMPTS = [prompt(f"frontend {number}", 600) for number in range(6)]
USERS = 3
LOST = "engine_lost|EngineCore encountered an issue"
"""What a client is told: by the frontend, or by a server that outlives its engine for a moment."""
LONG_TOKENS = 1200  # seconds of decoding: surely under way when the engine is killed
BACK_TIMEOUT_S = 120.0
COUNTED_TIMEOUT_S = 60.0
# An engine that is late puts several tokens into one chunk: streams are asked for until one is cut
# as another one was.
TRIES = 8


@dataclass
class Site:
    stack: Stack
    cold: dict[str, tuple[int, ...]]  # what an engine answers without any help

    def client(self, engine: Engine | None = None) -> Client:
        """Of the frontend; with an engine, of that one through it."""
        return Client("kvbm-frontend", self.stack.frontend.url, headers=_pinned(engine))

    def ask(self, engine: Engine, text: str, *, max_tokens: int = 24) -> Answer:
        with self.client(engine) as client:
            return client.complete(text, max_tokens=max_tokens)

    def check_routed(self, engine: Engine, text: str) -> None:
        """The router comes to know what this engine has of a text, and counts on it."""
        frontend = self.stack.frontend
        tokens = frontend.client.tokens_of(text)
        whole = reusable(len(tokens))
        frontend.wait_heard(f"{engine.instance:x}.0", tokens, whole)
        answer = frontend.client.complete(text)
        assert answer.tokens == self.cold[text]
        assert answer.worker in self.stack.engine_names()
        assert answer.expected_cached_tokens >= whole
        assert answer.cached_tokens >= whole


@dataclass
class Load:
    """Users who ask one prompt after another; what they got, and when they had asked."""

    site: Site
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        ended = threading.Event()
        with ThreadPoolExecutor(USERS) as pool:
            users = [pool.submit(self._use, ended, user) for user in range(USERS)]
            try:
                self.wait_for_more()
                yield
                self.wait_for_more()
            finally:
                ended.set()
            for user in users:
                user.result()

    def wait_for_more(self, count: int = 2 * USERS) -> None:
        wanted = self.answers + count
        wait_until(lambda: self.answers >= wanted, BACK_TIMEOUT_S, "users get answers")

    def _use(self, ended: threading.Event, user: int) -> None:
        with self.site.client() as client:
            for turn in itertools.count(user):
                if ended.is_set():
                    return
                text = PROMPTS[turn % len(PROMPTS)]
                asked_s = time.monotonic()
                try:
                    answer = client.complete(text)
                except EngineError as error:
                    self.failures.append((asked_s, str(error)))
                    time.sleep(0.2)  # a refused connection takes no time
                    continue
                if answer.tokens != self.site.cold[text]:
                    self.wrong.append(text)
                self.answers += 1


@pytest.fixture(scope="module")
def site(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    folder = tmp_path_factory.mktemp("stack")
    with Stack(folder, str(llama), print, arguments=tools, environment=ONE_THREAD) as stack:
        cold = {text: stack.engines[0].complete(text).tokens for text in PROMPTS}
        assert len(set(cold.values())) == len(PROMPTS), "prompts must not share their answer"
        yield Site(stack, cold)


@pytest.fixture(scope="module")
def tokens(site: Site) -> Iterator[Frontend]:
    """One more frontend, which makes the answers itself."""
    frontend = site.stack.make_frontend(name="kvbm-frontend-tokens", tokens_for=[SERVED_NAME])
    try:
        frontend.start()
        frontend.wait_live()
        wait_until(
            lambda: frontend.engines() == 2 and frontend.knows_tokens(), 60.0, "it has the engines"
        )
        yield frontend
    finally:
        frontend.stop()


class Asking:
    """OpenAI's client, one that blocks or one that does not, of two servers that are to agree."""

    def __init__(self, is_async: bool, engine: Engine, frontend: Frontend) -> None:
        kind: Any = openai.AsyncOpenAI if is_async else openai.OpenAI
        common: dict[str, Any] = {
            "api_key": "none",
            "max_retries": 0,
            "default_headers": _pinned(engine),
        }
        self._loop = asyncio.Runner() if is_async else None
        self._engine = kind(base_url=f"{engine.url}/v1", **common)
        self._frontend = kind(base_url=f"{frontend.url}/v1", **common)

    def close(self) -> None:
        for client in (self._engine, self._frontend):
            if self._loop is None:
                client.close()
            else:
                self._loop.run(client.close())
        if self._loop is not None:
            self._loop.close()

    def agree(self, name: str, call: openai_requests.Call, view: Callable[[Any], Any]) -> None:
        """The engine's own answer and the frontend's are the same, as far as `view` shows them."""
        own, got = [], []
        for _ in range(TRIES):
            own.append(view(self._answer(self._engine, call)))
            got.append(view(self._answer(self._frontend, call)))
            if any(one in own for one in got):
                return
        assert got[-1] == own[-1], name

    def refuse_alike(self, name: str, call: openai_requests.Call) -> None:
        told = []
        for client in (self._engine, self._frontend):
            with pytest.raises(openai.APIStatusError) as refused:
                self._answer(client, call)
            told.append(openai_requests.refusal(refused.value))
        assert told[0] == told[1], name
        assert 400 <= told[0][0] < 500

    def _answer(self, client: Any, call: openai_requests.Call) -> Any:
        made = call(client)
        if self._loop is not None:
            return self._loop.run(openai_requests.collected(made))
        return list(made) if isinstance(made, openai.Stream) else made


@pytest.fixture(params=["blocking", "async"])
def asking(site: Site, request: pytest.FixtureRequest) -> Iterator[Asking]:
    made = Asking(request.param == "async", site.stack.engines[0], site.stack.frontend)
    yield made
    made.close()


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_gets_what_the_engine_itself_answers(asking: Asking, stream: bool) -> None:
    for name, call in openai_requests.calls(stream=stream).items():
        asking.agree(name, call, openai_requests.taken)


def test_openais_client_is_refused_as_by_the_engine_itself(asking: Asking) -> None:
    for name, call in openai_requests.REFUSED.items():
        asking.refuse_alike(name, call)


def test_models_and_tokens_are_the_engines_own(site: Site) -> None:
    frontend, engine = site.stack.frontend, site.stack.engines[0]
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none") as client:
        [listed] = client.models.list().data
        assert client.models.retrieve(SERVED_NAME) == listed
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none") as client:
        [own] = client.models.list().data
    told, own_told = listed.model_dump(), own.model_dump()
    for name in ("id", "object", "max_model_len"):
        assert told[name] == own_told[name]
    with Client("engine", engine.url) as direct:
        bodies: dict[str, dict[str, Any]] = {
            "/tokenize": {"prompt": PROMPTS[0], "return_token_strs": True},
            "/detokenize": {"tokens": [84, 70, 66, 90]},
        }
        for path, body in bodies.items():
            asked = {"model": SERVED_NAME, **body}
            assert frontend.client.post(path, asked).json() == direct.post(path, asked).json()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_made_from_tokens_are_the_engines_own(
    site: Site, tokens: Frontend, stream: bool
) -> None:
    """What the frontend cannot make of tokens, such as tool calls, is passed through."""
    asking = Asking(False, site.stack.engines[0], tokens)
    calls = openai_requests.calls(stream=stream)
    del calls["response"]
    for name, call in calls.items():
        asking.agree(name, call, openai_requests.said)
    asking.close()


async def test_the_engines_are_a_pool_of_a_global_router(site: Site, tmp_path: Path) -> None:
    """Which reaches them at nothing but their OpenAI servers, and knows what they have."""
    text, engine = prompt("of a pool", 600), site.stack.engines[0]
    alone, tokens = engine.complete(text), site.stack.frontend.client.tokens_of(text)
    asked: dict[str, Any] = {"model": SERVED_NAME, "max_tokens": 24, "temperature": 0.0}
    asked["extra_body"] = {"ignore_eos": True}
    async with a_site(tmp_path, site.stack.nats) as pools:
        pools.place["discovery.file_directory"] = site.stack.discovery_folder
        routing = await pools.global_router(agg("default"))
        client = await pools.frontend(1, SERVED_NAME)
        for given in (text, tokens):
            answer = await client.completions.create(prompt=given, **asked)
            assert answer.choices[0].text == alone.text
        stream = await client.completions.create(prompt=text, stream=True, **asked)
        assert "".join([event.choices[0].text async for event in stream]) == alone.text
        whole = reusable(len(tokens))
        assert answer.usage.prompt_tokens_details.cached_tokens >= whole
        [pool] = (await routing.explain(tokens))["aggregated"]["pools"]
        assert pool["cached_tokens"] >= whole
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(prompt=text, logit_bias={"99999": 1}, **asked)
        assert "99999" in str(refused.value)
        told = await routing.decisions()
        assert [one["outcome"] for one in told] == ["done"] * 4
        instances = {f"{one.instance:x}" for one in site.stack.engines}
        assert {one["attempts"][0]["instance"] for one in told} <= instances
        left = await client.completions.create(
            prompt=text, stream=True, **{**asked, "max_tokens": LONG_TOKENS}
        )
        await anext(aiter(left))
        await left.close()
        await until("no engine works on it", lambda: not any(map(_running, site.stack.engines)))


def test_output_is_counted_as_the_engine_counts_it(site: Site) -> None:
    """However many tokens come in one event; where it does not say, by its events."""
    frontend = site.stack.frontend
    told, estimated = _output(frontend, "told"), _output(frontend, "estimated")
    asked: dict[str, Any] = {"model": SERVED_NAME, "max_tokens": 40, "temperature": 0}
    chat = {**asked, "messages": [{"role": "user", "content": "of tokens"}]}
    text = {**asked, "prompt": "of tokens"}
    ids = {"ignore_eos": True, "return_token_ids": True}
    usage = {"include_usage": True}
    each = {**usage, "continuous_usage_stats": True}
    extra: dict[str, Any] = {"ignore_eos": True}
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0) as client:
        client.chat.completions.create(**chat, extra_body=extra)
        client.completions.create(**text, extra_body=extra)
        for options in (usage, each):
            for kind, body in ((client.chat.completions, chat), (client.completions, text)):
                made: Any = kind
                parts = made.create(stream=True, **body, stream_options=options, extra_body=extra)
                assert list(parts)[-1].usage.completion_tokens == 40
        list(client.completions.create(stream=True, **text, extra_body=ids))
        list(client.chat.completions.create(stream=True, **chat, extra_body=extra))
    # A request is counted when it is over, which its client does not see.
    what = "all are counted"
    wait_until(lambda: _output(frontend, "told") == told + 7 * 40, COUNTED_TIMEOUT_S, what)
    wait_until(lambda: _output(frontend, "estimated") > estimated, COUNTED_TIMEOUT_S, what)
    assert 1 <= _output(frontend, "estimated") - estimated <= 42


def _output(frontend: Frontend, count: str) -> float:
    return _counted(frontend, f'kvbm_frontend_output_tokens_total{{count="{count}"')


def test_requests_go_where_their_kv_is(site: Site) -> None:
    for engine in site.stack.engines:
        text = prompt(f"known to {engine.name}", 600)
        first = site.ask(engine, text)
        assert first.worker == f"{engine.instance:x}.0"
        site.cold[text] = first.tokens
        site.stack.settle()
        site.check_routed(engine, text)


def test_the_demos_conversations_go_where_their_kv_is(site: Site) -> None:
    routed = Routed(site.stack, print)
    routed.run()
    assert len(routed.rows) == 7
    assert [fault for row in routed.rows if (fault := row.fault())] == []
    assert all(row.tokens_known for row in routed.rows[1:])


def test_killing_the_daemon_costs_no_request(site: Site) -> None:
    load, daemon = Load(site), site.stack.daemon
    with load.running():
        daemon.process.kill()
        load.wait_for_more()
        daemon.start()
    assert not load.wrong
    assert not load.failures
    site.stack.wait_connected()


def test_killing_the_frontend_costs_what_was_in_flight(site: Site) -> None:
    load, frontend = Load(site), site.stack.frontend
    with load.running():
        frontend.kill()
        frontend.start()
        frontend.wait_live()
        site.stack.wait_connected()
        back_s = time.monotonic()
    assert not load.wrong
    assert load.failures, "nobody was using it"
    assert not [failure for asked_s, failure in load.failures if asked_s > back_s]


def test_killing_nats_costs_no_request_and_what_it_missed_is_made_up_for(site: Site) -> None:
    load, stack = Load(site), site.stack
    engine, text = stack.engines[1], prompt("while NATS was away", 600)
    with load.running():
        assert stack.nats.pid is not None
        os.kill(stack.nats.pid, signal.SIGKILL)
        load.wait_for_more()
        site.cold[text] = site.ask(engine, text).tokens
        stack.nats.stop()
        stack.nats.start()
    assert not load.wrong
    assert not load.failures
    stack.settle()
    site.check_routed(engine, text)


def test_killing_an_engine_costs_what_was_in_flight_there(site: Site, tokens: Frontend) -> None:
    """And where answers are made from tokens, not even that: they go on at the other engine.

    It ends with one engine left, in whose place the next test has another.
    """
    stack, load = site.stack, Load(site)
    text = prompt("long", 300)
    undisturbed = stack.engines[0].complete(text, max_tokens=LONG_TOKENS)
    with ThreadPoolExecutor(1) as pool, load.running(), Long(tokens, text) as migrating:
        gone = migrating.begin()
        kept, killed = sorted(stack.engines, key=lambda one: f"{one.instance:x}.0" == gone)
        elsewhere = pool.submit(site.ask, kept, text, max_tokens=LONG_TOKENS)
        with Long(stack.frontend, text, killed) as there:
            assert there.begin() == gone
            killed.kill()
            killed_s = time.monotonic()
            load.wait_for_more()
            with pytest.raises(openai.APIError) as told:
                there.rest()
        assert re.search(LOST, str(told.value.body))
        assert elsewhere.result(BACK_TIMEOUT_S).tokens == undisturbed.tokens
        assert migrating.rest() == undisturbed.text
        assert _counted(tokens, "kvbm_frontend_migrations_total{") == 1
        wait_until(lambda: stack.frontend.engines() == 1, 60.0, "its record is gone")
    assert not load.wrong
    assert all(re.search(LOST, failure) for _, failure in load.failures), load.failures
    assert not [failure for asked_s, failure in load.failures if asked_s > killed_s]


def test_an_engine_that_the_planner_lets_go_costs_no_request_and_its_kv_stays(
    site: Site, tmp_path: Path
) -> None:
    """In the place of the one that was killed the planner starts another, and ends it again.

    Runs last: only one engine is left.
    """
    stack, load = site.stack, Load(site)
    kept, gone = sorted(stack.engines, key=lambda one: not one.process.running)
    before = gone.instance
    if gone.process.running:
        gone.kill()
    wait_until(lambda: stack.frontend.engines() == 1, 60.0, "one engine is there")
    with planning(stack, gone, tmp_path) as planned, ThreadPoolExecutor(1) as pool:
        planned.wanted = 2
        long = prompt("long", 300)
        whole = kept.complete(long, max_tokens=LONG_TOKENS).text  # while the other starts
        planned.until("it serves", lambda: planned.phases() == ["serving"] * 2, START_TIMEOUT_S)
        [gone.instance] = planned.started
        assert gone.instance != before
        wait_until(lambda: stack.frontend.engines() == 2, 60.0, "the frontend has it")
        test_requests_go_where_their_kv_is(site)
        text = prompt("known to the one that goes", 600)
        site.cold[text] = site.ask(gone, text).tokens
        stack.settle()
        _check_engines_are_read(planned, kept)
        with load.running(), Long(stack.frontend, long, gone) as there:
            there.begin()
            rest = pool.submit(there.rest)
            planned.until("it is at work", lambda: planned.load_of(gone).running >= 1, 60.0)
            assert not rest.done(), "it ended before the engine was let go"
            planned.wanted = 1
            planned.until("it drains", lambda: "draining" in planned.phases(), 60.0)
            assert rest.result(BACK_TIMEOUT_S) == whole
            planned.until("it has ended", lambda: planned.phases() == ["serving"], 120.0)
        assert not load.wrong
        assert not load.failures
        from_host = _cached(kept, "host")
        answer = site.ask(kept, text)
        assert answer.tokens == site.cold[text]
        assert answer.cached_tokens == _cached(kept, "host") - from_host > 0


def _check_engines_are_read(planned: Planned, kept: Engine) -> None:
    """What vLLM tells of itself is understood: speeds and load can be learnt from it."""
    assert not planned.seen.problems
    load = planned.load_of(kept)
    assert load.kv_tokens > 0
    assert load.teller == "page"
    numbers = itertools.count()

    def is_told() -> bool:
        # Prompts of several lengths: what a token takes is to stand out from what a step takes.
        number = next(numbers)
        kept.complete(prompt(f"measured {number}", 300 + 600 * (number % 5)), max_tokens=1)
        return planned.load_of(kept).told.token_s > 0

    # What no page says comes from the node's daemon, over NATS.
    planned.until("its speed is told", is_told, 60.0)
    last = planned.seen.at_s
    text = prompt("for the planner to see", 600)
    for _ in range(2):
        kept.complete(text, max_tokens=40)
    planned.until("a look after it", lambda: planned.seen.at_s > last, 60.0)
    page = engine_page(samples(kept.page()))
    assert page is not None
    assert page.counters.cached_tokens["G1"] >= reusable(600)
    assert page.counters.itl_s > 0


def _cached(engine: Engine, source: str) -> float:
    """Tokens of prompts that it had from there."""
    told = engine.metrics("vllm:prompt_tokens_cached_by_source_total")
    return sum(value for labels, value in told.items() if f'source="{source}"' in labels)


class Long:
    """A long answer under way, at an engine of one's choice if it is given."""

    def __init__(self, frontend: Frontend, text: str, engine: Engine | None = None) -> None:
        self._client = openai.OpenAI(
            base_url=f"{frontend.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=BACK_TIMEOUT_S,
            default_headers=_pinned(engine),
        )
        self._asked: dict[str, Any] = {
            "model": SERVED_NAME,
            "prompt": text,
            "max_tokens": LONG_TOKENS,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        self._stream: Iterator[Any] = iter(())
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def begin(self) -> str:
        """Some of the answer has come. Returns the worker that it comes from."""
        reply = self._client.completions.with_raw_response.create(stream=True, **self._asked)
        self._stream = iter(reply.parse())
        while len(self._text) < 10:
            self._text += next(self._stream).choices[0].text
        return str(reply.headers["x-kvbm-worker"])

    def rest(self) -> str:
        """All of the text, when it has come."""
        for chunk in self._stream:
            self._text += chunk.choices[0].text
        return self._text


def _pinned(engine: Engine | None) -> dict[str, str]:
    return {"x-worker-instance-id": f"{engine.instance:x}"} if engine else {}


def _counted(frontend: Frontend, samples: str) -> float:
    """All whose lines begin so."""
    lines = frontend.client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(samples))


def _running(engine: Engine) -> float:
    return sum(engine.metrics("vllm:num_requests_running").values())
