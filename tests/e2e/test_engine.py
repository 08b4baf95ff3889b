"""A real engine through `kvbm engine vllm`, from its start to its drain, as a fleet sees it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

from examples.demo.daemon import Daemon
from examples.demo.engine import START_TIMEOUT_S, Engine, EngineConfig
from kvbm.cli import __main__ as cli
from runtime.engine_card import EngineCard
from runtime.events.engine_feed import EngineEvents, EngineFeed, EngineFeedOptions, rank_endpoint
from runtime.events.engine_wire import BlockStored
from tests.e2e.conftest import MakeDaemon
from tests.e2e.texts import prompt
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
    daemon = make_daemon(dram="256MiB", ssd=None)
    daemon.start()
    folder = tmp_path_factory.mktemp("launched")
    place = Place(folder)
    config = EngineConfig(model=str(llama), context_tokens=4096)
    engine = Engine("launched", config, logs=folder)
    kvbm = [sys.executable, "-m", "kvbm.cli", "engine", "vllm", "--worker-id", hex(WORKER_ID)]
    pace = {"engine__health_interval": "500ms", "engine__canary_interval": "1h"}
    kvbm += settings(place, socket=str(daemon.socket), **pace)
    kvbm += ["--set", "engine.drain_timeout=5min"]
    arguments = config.command(engine.port)[3:]  # without Python and the module
    command = [*kvbm, "--host", "127.0.0.1", "--", *arguments]
    with Program(folder, command, config.variables()) as launcher:
        try:
            yield Fleet(daemon, engine, launcher, place)
        finally:
            engine.stop()


@pytest.fixture
def status(
    fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """`kvbm status --json` with the settings in the environment, as on a node."""
    monkeypatch.setenv("KVBM_DISCOVERY__FILE_DIRECTORY", str(fleet.place.directory))

    def run() -> Any:
        monkeypatch.setattr(sys, "argv", ["kvbm", "status", "--json", "--url", fleet.daemon.url])
        with pytest.raises(SystemExit):
            cli.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_an_engine_is_found_serves_is_heard_and_drains(fleet: Fleet, status: Any) -> None:
    daemon, engine, launcher, place = fleet
    wait_until(
        lambda: place.states() == ["healthy"] or launcher.process.poll() is not None,
        START_TIMEOUT_S,
        "the engine is healthy",
    )
    assert launcher.process.poll() is None, launcher.err.read_text()[-4000:]
    told = status()
    [instance] = told["discovery"]["instances"]
    assert (instance["state"], instance["id"]) == ("healthy", f"{WORKER_ID:x}")
    card = EngineCard.of_labels(instance["labels"])
    assert (card.model, card.url, card.block_tokens) == ("demo", engine.url, 32)
    assert (card.context_tokens, card.dp_size) == (4096, 1) and card.kv_blocks > 0
    [scheduler] = [one for one in told["sessions"] if one["role"] == "scheduler"]
    assert (scheduler["worker_id"], scheduler["dp_rank"]) == (f"{WORKER_ID:x}", 0)

    answer = engine.complete(prompt("launched"))
    assert len(answer.tokens) == 24
    assert asyncio.run(_stored_tokens(launcher)) >= answer.prompt_tokens // 32 * 32

    drained = {"prompt": prompt("drained"), "max_tokens": TOKENS, "ignore_eos": True}
    with _streamed(engine, {**drained, "stream": True, "return_token_ids": True}) as answers:
        tokens = len(next(answers))
        launcher.terminate()  # while it computes
        place.wait_for("stopping")
        assert tokens + sum(map(len, answers)) == TOKENS, "what was in flight has ended well"
    assert launcher.wait() == 0, launcher.err.read_text()[-4000:]
    assert launcher.events("engine_stopped") and not launcher.events("drain_late")
    assert status()["discovery"]["instances"] == []
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


async def _stored_tokens(launcher: Program) -> int:
    """In the blocks that the engine says it stored, from its first event on."""
    [events] = launcher.events("engine_events")
    heard = EngineFeedOptions(rank_endpoint(events["endpoint"], 0), events["replay"])
    feed = EngineFeed(heard)
    await feed.start()
    try:
        async with asyncio.timeout(WAIT_S):
            async for item in feed:
                assert isinstance(item, EngineEvents), "nothing was lost"
                stored = [one for one in item.batch.events if isinstance(one, BlockStored)]
                if stored:
                    return sum(len(one.token_ids) for one in stored)
    finally:
        await feed.close()
    return 0
