"""`kvbm engine vllm` with a fake engine: an instance's life, its drain, every way it can end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from connectors.vllm.launch import launch_of
from kvbm.engine.child import Child, NoProgram
from kvbm.engine.openai import Figures, read_figures
from kvbm.engine.start import start
from runtime.discovery import DiscoverySettings, create_discovery
from runtime.drain import drain_key
from runtime.engine_card import EngineCard
from runtime.names import NameRefused, parse_instance_id
from tests.kvbm import fake_engine
from tests.kvbm.conftest import Kvbm
from tests.kvbm.engine_programs import ROOT, WAIT_S, Place, launcher, settings
from tests.waiting import wait_until


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_an_engine_becomes_an_instance_that_says_what_it_serves(place: Place) -> None:
    options = ["--worker-id", "0xabc", "--role", "decode", "--component", "decoders"]
    arguments = ("a-model", "--max-num-batched-tokens", "2048", "--served-model-name", "name")
    program, engine = launcher(place, *arguments, options=options)
    with program:
        [record] = place.wait_for("healthy")
        assert (record.component, record.endpoint, record.id) == ("decoders", "generate", "abc")
        assert record.transport == engine.url and record.pid == program.process.pid
        assert EngineCard.of_labels(record.labels) == EngineCard(
            model="a-model",
            url=engine.url,
            block_tokens=16,
            kv_blocks=4321,
            batch_tokens=2048,
            context_tokens=4096,
            dp_size=2,
            role="decode",
            path="a-model",
        )
        told = engine.told()
        assert told["worker_id"] == "0xabc"
        given = told["arguments"]
        assert given[: len(arguments)] == list(arguments), "the user's come as they were"
        transfer = json.loads(given[given.index("--kv-transfer-config") + 1])
        assert transfer["kv_connector"] == "KvbmConnector" and transfer["kv_role"] == "kv_both"
        states = [event["state"] for event in program.events("engine_state")]
        assert states == ["running", "healthy"]
        assert "a fake engine begins" in program.out.read_text(), "its output is passed on"
        program.terminate()
        assert program.wait() == 0
    assert place.records() == []
    states = [event["state"] for event in program.events("engine_state")]
    assert states == ["running", "healthy", "stopping"]
    assert "/health" not in program.err.read_text(), "what goes well is not worth a line each"
    assert not engine.is_there


def test_a_models_folder_is_told_as_others_find_it(place: Place) -> None:
    program, _ = launcher(place, "tests/kvbm")  # relative to where the engine was started
    with program:
        [record] = place.wait_for("healthy")
        assert EngineCard.of_labels(record.labels).path == str(ROOT / "tests" / "kvbm")


def test_what_waits_for_its_health_check_is_seen_and_not_sent_to(place: Place) -> None:
    state = {"completion_s": 600}
    program, engine = launcher(
        place, state=state, engine__canary_interval="60s", engine__canary_timeout="50ms"
    )
    with program:
        wait_until(lambda: engine.is_there and engine.told()["asked"] > 2, WAIT_S, "it was asked")
        place.wait_for("running")
        engine.do(completion_s=0)
        place.wait_for("healthy")


def test_a_drained_engine_finishes_what_it_has(place: Place) -> None:
    program, engine = launcher(place)
    with program:
        place.wait_for("healthy")
        engine.do(running=2, waiting=1)
        program.terminate()
        place.wait_for("stopping")
        engine.do(waiting=0)
        engine.do(running=1)
        assert engine.told()["sigterms"] == 0 and program.process.poll() is None
        engine.do(running=0)
        assert program.wait() == 0
    assert program.events("engine_stopped")[0]["status"] == 0
    assert place.records() == []


def test_a_drain_has_an_end(place: Place) -> None:
    program, engine = launcher(place, engine__drain_timeout="300ms")
    with program:
        place.wait_for("healthy")
        engine.do(running=1)
        program.terminate()
        assert program.wait() == 0
    [late] = program.events("drain_late")
    assert late["requests"] == 1


def test_a_second_signal_ends_it_at_once(place: Place) -> None:
    program, engine = launcher(place)
    with program:
        place.wait_for("healthy")
        engine.do(running=1, ignores_sigterm=True)
        program.terminate()
        place.wait_for("stopping")
        program.process.send_signal(signal.SIGINT)
        assert program.wait() == 1
    assert not engine.is_there and place.records() == []


def test_an_engine_that_does_not_stop_is_killed(place: Place) -> None:
    program, engine = launcher(place, engine__stop_timeout="300ms")
    with program:
        place.wait_for("healthy")
        engine.do(ignores_sigterm=True)
        program.terminate()
        assert program.wait() == 1
    assert not engine.is_there and place.records() == []


def test_an_engine_that_dies_is_gone_at_once_and_its_status_passed_on(place: Place) -> None:
    program, engine = launcher(place)
    with program:
        place.wait_for("healthy")
        engine.do(exit=7)
        assert program.wait() == 7
        assert place.records() == []
    [ended] = program.events("engine_ended")
    assert ended["status"] == 7 and "the last words of the engine" in ended["last_lines"]


def test_a_killed_engine_tells_the_signal(place: Place) -> None:
    program, engine = launcher(place)
    with program:
        place.wait_for("healthy")
        os.kill(engine.told()["pid"], signal.SIGKILL)
        assert program.wait() == 128 + signal.SIGKILL
    assert place.records() == []


def test_a_killed_launcher_leaves_neither_an_engine_nor_a_record(place: Place) -> None:
    program, engine = launcher(place)
    with program:
        place.wait_for("healthy")
        program.process.kill()
        program.wait()
        wait_until(lambda: not engine.is_there, WAIT_S, "the engine has ended too")
        place.wait_for()


def test_health_that_fails_and_comes_back_is_told(place: Place) -> None:
    program, engine = launcher(place)
    with program:
        [before] = place.wait_for("healthy")
        engine.do(health=503)
        [record] = place.wait_for("running")
        assert record.labels == before.labels and record.id == before.id
        engine.do(health=200)
        place.wait_for("healthy")
    [told] = [e for e in program.events("engine_state") if e["before"] == "healthy"]
    assert "/health answered with status 503" in told["why"]


def test_an_engine_that_computes_nothing_is_asked_and_one_that_computes_is_not(
    place: Place,
) -> None:
    program, engine = launcher(place, engine__canary_interval="300ms", engine__canary_timeout="1s")
    with program:
        place.wait_for("healthy")
        wait_until(lambda: engine.told()["asked"] >= 2, WAIT_S, "it is asked again")
        engine.do(tokens=0)
        looked = engine.told()["figures"]
        wait_until(lambda: engine.told()["figures"] > looked + 1, WAIT_S, "its figures are read")
        asked = engine.told()["asked"]
        wait_until(lambda: engine.told()["figures"] > looked + 4, WAIT_S, "and again")
        assert engine.told()["asked"] == asked
        engine.do(completion=500, running=1, tokens=2)
        place.wait_for("running")  # though /health is well
        asked = engine.told()["asked"]
        engine.do(completion=200)
        place.wait_for("healthy")
        assert engine.told()["asked"] > asked
    [told] = [e for e in program.events("engine_state") if e["before"] == "healthy"]
    assert told["why"].startswith("the canary: /v1/completions answered with status 500")


def test_a_model_that_completes_nothing_and_asks_for_a_key_is_as_well_as_it_says(
    place: Place,
) -> None:
    arguments = ("a-model", "--api-key", "sesame")
    state = {"completion": 404}
    program, engine = launcher(place, *arguments, state=state, engine__canary_interval="100ms")
    with program:
        place.wait_for("healthy")
        asked = engine.told()["asked"]
        wait_until(lambda: engine.told()["asked"] > asked + 2, WAIT_S, "it is asked again")
        place.wait_for("healthy")


def test_the_record_comes_back_when_discovery_has_lost_it(place: Place) -> None:
    program, _ = launcher(place)
    with program:
        [before] = place.wait_for("healthy")
        shutil.rmtree(place.directory)
        [after] = place.wait_for("healthy")
        assert after == before
        program.terminate()
        assert program.wait() == 0
    assert program.events("lease_lost")


def test_a_stopped_launcher_is_gone_and_comes_back(place: Place) -> None:
    program, _ = launcher(place)
    with program:
        place.wait_for("healthy")
        program.process.send_signal(signal.SIGSTOP)
        try:
            place.wait_for()
        finally:
            program.process.send_signal(signal.SIGCONT)
        place.wait_for("healthy")


def test_namespaces_do_not_see_each_other(place: Place, kvbm: Kvbm) -> None:
    program, _ = launcher(place, options=["--namespace", "blue"])
    with program:
        place.wait_for("healthy", namespace="blue")
        assert place.records("default") == []
        where = settings(place)
        [seen] = kvbm("instances", *where, "--namespace", "blue", "--json").json()["instances"]
        assert seen["state"] == "healthy" and seen["labels"]["model"] == "a-model"
        assert kvbm("instances", *where, "--json").json()["instances"] == []
        page = kvbm("instances", *where, "--set", "engine.namespace=blue").out
        assert "1 instances in namespace blue (file discovery)" in page
        assert "backend/generate" in page and "healthy" in page and "block_tokens=16" in page


def test_a_signal_before_the_engine_is_up_stops_it(place: Place) -> None:
    program, engine = launcher(place, state={"health": 503})
    with program:
        wait_until(lambda: engine.is_there, WAIT_S, "it listens")
        place.wait_for("registered")
        program.terminate()
        assert program.wait() == 0
    assert not engine.is_there and place.records() == []


def test_a_start_that_takes_too_long_is_given_up(place: Place) -> None:
    silent = f"{sys.executable} -c 'import time; print(7); time.sleep(600)'"
    program, _ = launcher(place, options=["--program", silent], engine__start_timeout="1s")
    with program:
        assert program.wait() == 1
    [late] = program.events("engine_start_late")
    assert late["last_lines"] == ["7"]
    assert place.records() == []


# -- what cannot be started ---------------------------------------------------------------


def test_what_cannot_be_started_is_said_in_a_sentence(
    place: Place, capfd: pytest.CaptureFixture[str], logging_kept: None
) -> None:
    def refused(*words: str, **more: str) -> tuple[int, str]:
        given = settings(place, **{"engine__program": "true", **more})[1::2]
        return start(launch_of, words, None, given), capfd.readouterr().err

    status, said = refused("--max-model-len", "4096")
    assert status == 2 and "no model: name it first" in said
    status, said = refused("a-model", "--headless")
    assert status == 2 and "--headless: it serves no requests" in said
    status, said = refused("a-model", "--kv-transfer-config", "{")
    assert status == 2 and "--kv-transfer-config is no JSON" in said
    status, said = refused("a-model", engine__worker_id="x")
    assert status == 2 and "engine.worker_id" in said and "1 to 2^64-1" in said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, said = refused("a-model", "--port", str(port))
    assert status == 1 and f"cannot listen at *:{port}: Address already in use" in said
    status, said = refused("a-model", "--port", "0", engine__program="/nonexistent/vllm")
    assert status == 1 and "'/nonexistent/vllm' is no program" in said
    assert place.records() == []


def test_worker_ids_are_decimal_or_hexadecimal() -> None:
    assert parse_instance_id("12") == 12 and parse_instance_id("0x12") == 18
    assert parse_instance_id("0XfF") == 255 and parse_instance_id(7) == 7
    assert parse_instance_id(str(2**64 - 1)) == 2**64 - 1
    for bad in ("", "0", "ff", "-1", "0x", "g", str(2**64), "0x1" + 16 * "0", "1.5", None):
        with pytest.raises(NameRefused, match=r"1 to 2\^64-1"):
            parse_instance_id(bad)


def test_figures_are_read_from_what_vllm_writes() -> None:
    page = fake_engine.METRICS.format(model="m", running=2.0, waiting=1, tokens=7)
    assert read_figures(page) == Figures(3, 7.0, 2, 16, 4321)
    assert read_figures("") == Figures(0, 0.0, 0, 0, 0)
    odd = 'vllm:cache_config_info{block_size="None",num_gpu_blocks="None"} 1.0\n'
    odd += 'vllm:num_requests_running{engine="0"} NaN\n'
    assert read_figures(odd) == Figures(0, 0.0, 1, 0, 0)


async def test_a_child_ends_with_all_that_it_started(tmp_path: Path) -> None:
    script = "import subprocess as s; p = s.Popen(['sleep', '600']); print(p.pid, flush=True)"
    child = Child([sys.executable, "-c", f"{script}; p.wait()"], os.environ)
    child.start()
    try:
        wait_until(lambda: len(child._tail) == 1, WAIT_S, "it has started another")
    finally:
        child.kill()
    assert await child.ended() == 128 + signal.SIGKILL
    below = Path(f"/proc/{child.tail()[0]}/stat")
    # Whoever has taken it in may not have buried it yet.
    wait_until(lambda: not below.exists() or ") Z " in below.read_text(), WAIT_S, "it has ended")
    with pytest.raises(NoProgram, match="no-such-program"):
        Child(["no-such-program"], {})


async def test_an_engine_that_others_want_gone_says_so_and_waits_for_its_end(place: Place) -> None:
    """As a planner asks before it has Kubernetes take the pod."""
    program, engine = launcher(place)
    with program:
        [record] = await asyncio.to_thread(place.wait_for, "healthy")
        where = DiscoverySettings(file_directory=place.directory, file_poll=0.05)
        discovery = create_discovery(where, {})
        await discovery.start()
        await discovery.put(drain_key(record.name), b"1")
        await asyncio.to_thread(place.wait_for, "stopping")
        await discovery.close()
        assert engine.is_there and program.process.poll() is None
        program.terminate()
        assert await asyncio.to_thread(program.wait) == 0
    assert await asyncio.to_thread(place.records) == []
