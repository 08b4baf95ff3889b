"""The daemon comes late, is killed and comes back; loads fail: engines answer, and rightly.

One engine starts before there is any daemon. Its memory holds few prompts, so that cycling through
more of them stores and loads all the time. Another gives up every load at once and has vLLM's
policy `fail`: such a request ends with an error, and the engine goes on.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.demo.client import EngineError
from examples.demo.daemon import Daemon
from examples.demo.engine import Engine
from tests.e2e.conftest import MakeDaemon, StartEngines
from tests.e2e.texts import prompt, reusable
from tests.waiting import wait_until

PROMPTS = [prompt(f"cycled {number}") for number in range(10)]
SMALL_MEMORY = ("--num-gpu-blocks-override", "200")  # 6400 tokens: five prompts
KILLS = 5
ATTEMPTS_AT_ONCE = 4


@dataclass
class Node:
    daemon: Daemon
    engine: Engine
    failing: Engine
    cold: list[tuple[int, ...]]  # what the engine answers without any help

    def connect(self) -> None:
        wait_until(lambda: self.daemon.engines() == 2, 60.0, "the engines are connected")

    def ask_all(self) -> list[tuple[int, ...]]:
        with ThreadPoolExecutor(ATTEMPTS_AT_ONCE) as pool:
            return list(pool.map(lambda text: self.engine.complete(text).tokens, PROMPTS))


@pytest.fixture(scope="module")
def node(llama: Path, engines: StartEngines, make_daemon: MakeDaemon) -> Node:
    daemon = make_daemon(dram="512MiB", ssd="512MiB")
    config = {"model": llama, "socket": daemon.socket}
    engine, failing = engines(
        engine={**config, "arguments": SMALL_MEMORY},
        failing={
            **config,
            "connector_options": (("load_deadline_s", 1e-9),),
            "load_failure_policy": "fail",
        },
    )
    cold = [engine.complete(text).tokens for text in PROMPTS]
    assert len(set(cold)) == len(PROMPTS), "prompts must not share their answer"
    return Node(daemon, engine, failing, cold)


def test_an_engine_started_before_the_daemon_uses_it_when_it_comes(node: Node) -> None:
    assert max(node.engine.metrics("vllm:kvbm_connected").values()) == 0
    node.daemon.start()
    node.connect()
    text = prompt("late daemon")
    cold = node.engine.complete(text)
    node.daemon.settle()
    node.engine.forget()
    back = node.engine.complete(text)
    assert back.tokens == cold.tokens
    assert back.cached_tokens == reusable(cold.prompt_tokens)


def test_killing_the_daemon_under_load_costs_hits_only(node: Node) -> None:
    """Killed at random while requests store and load; every answer is the cold one."""
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    answers: list[Sequence[tuple[int, ...]]] = []
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            answers.append(node.ask_all())

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        try:
            for _ in range(KILLS):
                time.sleep(dice.uniform(0.2, 3.0))
                node.daemon.process.kill()
                time.sleep(dice.uniform(0.0, 1.0))
                node.daemon.start()
        finally:
            ended.set()
        serving.result()
    assert len(answers) >= KILLS
    for answer in answers:
        assert answer == node.cold, f"seed {seed}"
    node.connect()
    node.ask_all()
    node.daemon.settle()
    before = node.daemon.loaded_bytes()["G2"]
    assert node.ask_all() == node.cold
    assert node.daemon.loaded_bytes()["G2"] > before, "hits are back"
    assert all(tier["corrupt"] == 0 for tier in node.daemon.tiers())


def test_a_failed_load_under_the_policy_fail_ends_its_request_only(node: Node) -> None:
    text = prompt("failing")
    cold = node.failing.complete(text)
    node.daemon.settle()
    node.failing.forget()
    with pytest.raises(EngineError):
        node.failing.complete(text)
    assert sum(node.failing.metrics("vllm:kvbm_load_failures_total").values()) > 0
    unknown = prompt("never seen")
    assert node.failing.complete(unknown).tokens == node.engine.complete(unknown).tokens
    assert node.engine.complete(text).tokens == cold.tokens


def test_stopping_the_daemon_is_no_harm_either(node: Node) -> None:
    node.daemon.stop()
    assert node.ask_all() == node.cold
    node.daemon.start()
    node.connect()
    assert node.ask_all() == node.cold
