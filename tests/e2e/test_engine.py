"""A real engine through `kvbm engine vllm`: its requests explained, and as a fleet sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

from examples.demo.daemon import Daemon
from examples.demo.engine import START_TIMEOUT_S, Engine, EngineConfig
from kvbm.cli import __main__ as cli
from runtime.engine_card import EngineCard
from runtime.events.engine_feed import EngineFeedOptions, rank_endpoint
from tests.e2e.conftest import ONE_THREAD, MakeDaemon
from tests.e2e.heard import names_heard
from tests.e2e.texts import BLOCK_TOKENS, prompt, reusable
from tests.kvbm.engine_programs import Place, Program, settings
from tests.waiting import wait_until

WAIT_S = 60.0
WORKER_ID = 0xFEED_0000_0000_0001
TOKENS = 1000  # enough that the drain comes while they are computed


class Fleet(NamedTuple):
    daemon: Daemon
    engine: Engine  # as a client: the launcher has the process
    launcher: Program
    place: Place


@pytest.fixture(scope="module")
def fleet(
    llama: Path, make_daemon: MakeDaemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """One engine, healthy, and a daemon that decides by what the engine measures."""
    daemon = make_daemon(dram="256MiB", ssd="512MiB", governor="auto")
    daemon.start()
    folder = tmp_path_factory.mktemp("launched")
    place = Place(folder)
    threads = tuple(ONE_THREAD.items())
    config = EngineConfig(model=str(llama), context_tokens=4096, environment=threads)
    engine = Engine("launched", config, logs=folder)
    command = [sys.executable, "-m", "kvbm.cli", "engine", "vllm", "--worker-id", hex(WORKER_ID)]
    pace = {"engine__health_interval": "500ms", "engine__canary_interval": "1h"}
    command += settings(place, socket=str(daemon.socket), **pace)
    command += ["--set", "engine.drain_timeout=5min"]
    arguments = config.command(engine.port)[3:]  # without Python and the module
    command += ["--host", "127.0.0.1", "--", *arguments]
    with Program(folder, command, config.variables()) as launcher:
        try:
            wait_until(
                lambda: place.states() == ["healthy"] or launcher.process.poll() is not None,
                START_TIMEOUT_S,
                "the engine is healthy",
            )
            assert launcher.process.poll() is None, launcher.err.read_text()[-4000:]
            wait_until(lambda: daemon.engines() == 1, WAIT_S, "the engine is connected")
            yield Fleet(daemon, engine, launcher, place)
        finally:
            engine.stop()


@pytest.fixture
def kvbm(
    fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """What the command prints, with the settings in the environment, as on a node."""
    monkeypatch.setenv("KVBM_DISCOVERY__FILE_DIRECTORY", str(fleet.place.directory))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["kvbm", *arguments, "--url", fleet.daemon.url])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    return run


def test_a_request_is_explained_by_what_the_engine_measured(
    fleet: Fleet, kvbm: Callable[..., str]
) -> None:
    daemon, engine = fleet.daemon, fleet.engine
    for number in range(6):
        engine.complete(prompt(f"measured {number}"), max_tokens=1)
    text = prompt("explained")
    cold = engine.complete(text, request_id="before")
    tokens = reusable(cold.prompt_tokens)
    daemon.settle()
    engine.forget()
    back = engine.complete(text, request_id="after")
    assert back.tokens == cold.tokens
    [pace] = daemon._get("/v1/governor")["engines"]
    assert pace["tokens_per_s"] > 0, "steps were timed and told"

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

    page = kvbm("why", "cmpl-after")
    assert f"Of the {tokens} tokens asked for, the first {tokens} can be loaded here." in page
    assert "computing them was estimated at" in page


def test_an_engine_is_found_serves_is_heard_and_drains(
    fleet: Fleet, kvbm: Callable[..., str]
) -> None:
    """Runs last: the engine is gone after it."""
    daemon, engine, launcher, place = fleet
    told = json.loads(kvbm("status", "--json"))
    [instance] = told["discovery"]["instances"]
    assert (instance["state"], instance["id"]) == ("healthy", f"{WORKER_ID:x}")
    card = EngineCard.of_labels(instance["labels"])
    assert (card.model, card.url, card.block_tokens) == ("demo", engine.url, 32)
    assert (card.context_tokens, card.dp_size) == (4096, 1) and card.kv_blocks > 0
    [scheduler] = [one for one in told["sessions"] if one["role"] == "scheduler"]
    assert (scheduler["worker_id"], scheduler["dp_rank"]) == (f"{WORKER_ID:x}", 0)

    text = prompt("launched")
    answer = engine.complete(text)
    assert len(answer.tokens) == 24
    [events] = launcher.events("engine_events")
    heard = EngineFeedOptions(rank_endpoint(events["endpoint"], 0), events["replay"])
    assert len(names_heard(engine, heard, text)) == answer.prompt_tokens // BLOCK_TOKENS

    drained = {"prompt": prompt("drained"), "max_tokens": TOKENS, "ignore_eos": True}
    with _streamed(engine, {**drained, "stream": True, "return_token_ids": True}) as answers:
        tokens = len(next(answers))
        launcher.terminate()  # while it computes
        place.wait_for("stopping")
        assert tokens + sum(map(len, answers)) == TOKENS, "what was in flight has ended well"
    assert launcher.wait() == 0, launcher.err.read_text()[-4000:]
    assert launcher.events("engine_stopped") and not launcher.events("drain_late")
    assert json.loads(kvbm("status", "--json"))["discovery"]["instances"] == []
    wait_until(lambda: daemon.engines() == 0, WAIT_S, "its sessions have ended")
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{engine.url}/health", trust_env=False)


@contextmanager
def _streamed(engine: Engine, body: dict[str, Any]) -> Iterator[Iterator[list[int]]]:
    """The token ids of an answer, as they come."""
    url = f"{engine.url}/v1/completions"
    with httpx2.stream("POST", url, json=body, timeout=WAIT_S, trust_env=False) as response:
        assert response.status_code == 200, response.read()
        events = (line[6:] for line in response.iter_lines() if line.startswith("data: {"))
        yield (json.loads(event)["choices"][0]["token_ids"] for event in events)
