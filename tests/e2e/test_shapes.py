"""Engines of other shapes: two cache groups, failing loads recomputed, a child of MultiConnector.

All share one daemon. The hybrid model alternates a sliding window and full attention, so that a
hit needs chunks of two groups; its second engine gives up every load at once, so that vLLM must
compute such requests again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from examples.demo.daemon import Daemon
from examples.demo.engine import Engine
from tests.e2e.conftest import MakeDaemon, StartEngines
from tests.e2e.texts import prompt, reusable
from tests.waiting import wait_until

ENGINES = 4


@dataclass
class Node:
    daemon: Daemon
    hybrid: Engine
    failing: Engine
    child: Engine
    parallel: Engine


@pytest.fixture(scope="module")
def node(llama: Path, hybrid: Path, engines: StartEngines, make_daemon: MakeDaemon) -> Node:
    daemon = make_daemon(dram="512MiB", ssd="512MiB")
    daemon.start()
    socket = daemon.socket
    started = engines(
        hybrid={"model": hybrid, "socket": socket},
        failing={
            "model": hybrid,
            "socket": socket,
            "connector_options": (("load_deadline_s", 1e-9),),
        },
        child={
            "model": llama,
            "arguments": ("--kv-transfer-config", _multi_connector(socket)),
        },
        parallel={
            "model": llama,
            "socket": socket,
            "arguments": ("--tensor-parallel-size", "2"),
            "environment": (("VLLM_CPU_OMP_THREADS_BIND", _one_core_for_both_ranks()),),
        },
    )
    wait_until(lambda: daemon.engines() == ENGINES, 60.0, "all engines are connected")
    return Node(daemon, *started)


def _one_core_for_both_ranks() -> str:
    """vLLM's CPU build asks for cores where it finds one NUMA node only.

    Ranks spin until a second after each step. With one on each of two cores the daemon was seen to
    wait as long for its turn, so that lookups ran into their deadline.
    """
    core = max(os.sched_getaffinity(0))
    return f"{core}|{core}"


def _multi_connector(socket: Path) -> str:
    child = {
        "kv_connector": "KvbmConnector",
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"socket": str(socket)},
    }
    return json.dumps(
        {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": [child]},
        }
    )


def loaded_bytes(node: Node) -> int:
    return node.daemon.loaded_bytes()["G2"]


@pytest.mark.parametrize("name", ["hybrid", "child", "parallel"])
def test_kv_comes_back(node: Node, name: str) -> None:
    engine: Engine = getattr(node, name)
    text = prompt(f"back to {name}", 1500)
    cold = engine.complete(text)
    again = engine.complete(text)
    node.daemon.settle()
    engine.forget()
    before = loaded_bytes(node)
    back = engine.complete(text)
    assert cold.tokens == again.tokens == back.tokens
    assert cold.cached_tokens == 0
    assert back.cached_tokens == reusable(cold.prompt_tokens)
    assert loaded_bytes(node) > before


def test_a_load_that_fails_is_computed_instead_in_both_groups(node: Node) -> None:
    text = prompt("both groups", 1500)
    cold = node.hybrid.complete(text)
    node.daemon.settle()
    before = loaded_bytes(node)
    computed = node.failing.complete(text)
    assert computed.tokens == cold.tokens
    assert loaded_bytes(node) == before
    assert sum(node.failing.metrics("vllm:kvbm_load_failures_total").values()) > 0
    node.failing.forget()
    assert node.failing.complete(text).tokens == cold.tokens, "and once more"


def test_engines_whose_bytes_differ_share_nothing(node: Node) -> None:
    """The same text and model, but each rank holds half of the heads."""
    text = prompt("one rank or two")
    cold = node.child.complete(text)
    node.daemon.settle()
    parallel = node.parallel.complete(text)
    assert parallel.cached_tokens == 0
    assert len(parallel.tokens) == len(cold.tokens)
