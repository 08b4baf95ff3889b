"""The demo's stack loses one of its programs after another, by kill -9, under load.

Greedy answers through the frontend are compared token by token with what an engine computed alone.
What was in flight on the killed program may fail, and says so; nothing else does, and no answer is
wrong. Everything is started again while the load goes on.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from examples.demo.client import Answer, Client, EngineError
from examples.demo.engine import START_TIMEOUT_S, Engine
from examples.demo.routed import Routed
from examples.demo.stack import Stack
from tests.e2e.texts import prompt, reusable
from tests.waiting import wait_until

PROMPTS = [prompt(f"frontend {number}", 600) for number in range(6)]
USERS = 3
LONG_TOKENS = 1200  # seconds of decoding: surely under way when the engine is killed
BACK_TIMEOUT_S = 120.0


@dataclass
class Site:
    stack: Stack
    cold: dict[str, tuple[int, ...]]  # what an engine answers without any help

    def client(self, engine: Engine | None = None) -> Client:
        """Of the frontend; with an engine, of that one through it."""
        headers = {"x-worker-instance-id": f"{engine.instance:x}"} if engine else {}
        return Client("kvbm-frontend", self.stack.frontend.url, headers=headers)

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
    with Stack(tmp_path_factory.mktemp("stack"), str(llama), print) as stack:
        cold = {text: stack.engines[0].complete(text).tokens for text in PROMPTS}
        assert len(set(cold.values())) == len(PROMPTS), "prompts must not share their answer"
        yield Site(stack, cold)


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


def test_killing_an_engine_costs_what_was_in_flight_there(site: Site) -> None:
    """Runs last: it ends with the engine started again, as another instance."""
    stack, load = site.stack, Load(site)
    kept, killed = stack.engines
    text = prompt("long", 300)
    alone = kept.complete(text, max_tokens=LONG_TOKENS).tokens
    gone = f"{killed.instance:x}.0"
    with ThreadPoolExecutor(2) as pool:
        there = pool.submit(site.ask, killed, text, max_tokens=LONG_TOKENS)
        elsewhere = pool.submit(site.ask, kept, text, max_tokens=LONG_TOKENS)
        wait_until(lambda: _is_busy(killed), 30.0, "the long answer is under way")
        with load.running():
            assert not there.done(), "it ended before the engine was killed"
            killed.kill()
            killed_s = time.monotonic()
            load.wait_for_more()
            with pytest.raises(EngineError, match="engine_lost"):
                there.result(BACK_TIMEOUT_S)
            assert elsewhere.result(BACK_TIMEOUT_S).tokens == alone
            wait_until(lambda: stack.frontend.engines() == 1, 60.0, "its record is gone")
    assert not load.wrong
    assert all("engine_lost" in failure for _, failure in load.failures), load.failures
    assert not [failure for asked_s, failure in load.failures if asked_s > killed_s]
    killed.start()
    killed.wait_ready(START_TIMEOUT_S)
    stack.wait_connected()
    assert f"{killed.instance:x}.0" != gone
    test_requests_go_where_their_kv_is(site)


def _is_busy(engine: Engine) -> bool:
    return sum(engine.metrics("vllm:num_requests_running").values()) >= 1
