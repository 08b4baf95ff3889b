"""A real engine's measured speed decides what it loads, and `kvbm why` explains its requests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from examples.demo.daemon import Daemon
from examples.demo.engine import Engine
from kvbm.cli import __main__ as cli
from tests.e2e.conftest import MakeDaemon, StartEngines
from tests.e2e.texts import prompt, reusable
from tests.waiting import wait_until

WAIT_S = 60.0


@pytest.fixture(scope="module")
def node(llama: Path, engines: StartEngines, make_daemon: MakeDaemon) -> tuple[Daemon, Engine]:
    daemon = make_daemon(dram="256MiB", ssd="512MiB", governor="auto")
    daemon.start()
    [engine] = engines(a={"model": llama, "socket": daemon.socket})
    wait_until(lambda: daemon.engines() == 1, WAIT_S, "the engine is connected")
    return daemon, engine


def pace(daemon: Daemon) -> dict[str, Any]:
    [found] = daemon._get("/v1/governor")["engines"]
    assert isinstance(found, dict)
    return found


def test_a_request_is_explained_by_what_the_engine_measured(
    node: tuple[Daemon, Engine],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon, engine = node
    for number in range(6):
        engine.complete(prompt(f"measured {number}"), max_tokens=1)
    text = prompt("explained")
    cold = engine.complete(text, request_id="before")
    tokens = reusable(cold.prompt_tokens)
    daemon.settle()
    engine.forget()
    back = engine.complete(text, request_id="after")
    assert back.tokens == cold.tokens
    assert pace(daemon)["tokens_per_s"] > 0, "steps were timed and told"

    [before] = daemon._get("/v1/receipts/cmpl-before")["receipts"]
    assert before["groups"][0]["missing"] == before["groups"][0]["asked"] == tokens // 32
    assert before["outcome"]["state"] == "computed"
    [after] = daemon._get("/v1/receipts/cmpl-after")["receipts"]
    assert after["groups"][0]["kept"] == {"G2": tokens // 32}
    verdict, outcome = after["verdict"], after["outcome"]
    assert verdict["why"] == "measured" and verdict["compute_all_s"] > 0
    assert verdict["chosen"]["load_s"] + verdict["chosen"]["compute_s"] <= (
        verdict["compute_all_s"] * 1.000001
    )
    assert outcome["loaded_tokens"] == back.cached_tokens == min(verdict["tokens"], tokens)

    monkeypatch.setattr(sys, "argv", ["kvbm", "why", "cmpl-after", "--url", daemon.url])
    with pytest.raises(SystemExit):
        cli.main()
    page, _ = capsys.readouterr()
    sys.stderr.write(page)
    assert f"Of the {tokens} tokens asked for, the first {tokens} can be loaded here." in page
    assert "computing them was estimated at" in page
