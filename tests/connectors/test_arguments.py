"""vLLM's arguments as its user wrote them, and what a launch adds to them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from connectors.vllm import launch
from connectors.vllm.arguments import ArgumentError, Arguments
from kvbm.engine.settings import EngineSettings
from kvbm.engine.start import ArgumentsRefused, Node

NODE = Node(EngineSettings(host="10.0.0.7", program="vllm serve"), None, {})


def parsed(words: Sequence[str]) -> Any:
    """By vLLM itself."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--config")
    parser.add_argument("--port", type=int)
    parser.add_argument("--disable-access-log-for-endpoints")
    return parser.parse_args(list(words))


def launched(*words: str, node: Node = NODE) -> tuple[Any, Any]:
    """The transfer and events configurations that vLLM makes of a launch's command."""
    found = launch.launch_of([*words, "--port", "0"], node)
    assert found.command[:2] == ["vllm", "serve"]
    args = parsed(found.command[2:])
    return args.kv_transfer_config, args.kv_events_config


def test_a_model_alone_gets_the_connector_and_events() -> None:
    found = launch.launch_of(["a-model", "--port", "0", "-dp", "3"], NODE)
    args = parsed(found.command[2:])
    assert args.model_tag == "a-model"
    transfer, events = args.kv_transfer_config, args.kv_events_config
    assert (transfer.kv_connector, transfer.kv_role) == ("KvbmConnector", "kv_both")
    assert transfer.kv_connector_module_path == "connectors.vllm"
    assert transfer.kv_load_failure_policy == "recompute"
    assert transfer.kv_connector_extra_config == {}
    assert events.enable_kv_cache_events and events.publisher == "zmq"
    first = int(events.endpoint.rpartition(":")[2])
    assert events.endpoint == f"tcp://[::ffff:127.0.0.1]:{first}"
    assert events.replay_endpoint == f"tcp://127.0.0.1:{first + 3}", "each rank has a port"
    assert found.environment["KVBM_WORKER_ID"] == f"{found.worker_id:#x}"
    assert found.said.url == found.local_url.replace("127.0.0.1", "10.0.0.7")
    assert found.said.model == "a-model" and found.said.dp_size == 3


@pytest.mark.parametrize(
    "said",
    [
        ["--kv-transfer-config", '{"kv_role": "kv_consumer", "kv_connector_extra_config": EXTRA}'],
        ["--kv_transfer_config={'kv_role': 'kv_consumer', 'kv_connector_extra_config': EXTRA}"],
        [
            *("--kv-transfer-config.kv_role", "kv_consumer"),
            *("--kv-transfer-config.kv_connector_extra_config", "EXTRA"),
        ],
        [
            *("--kv-transfer-config.kv_role=kv_consumer",),
            *("--kv_transfer_config.kv_connector_extra_config.tenant", "acme"),
            *("--kv-transfer-config.kv_connector_extra_config.worker_id", '"0x1f"'),
        ],
        ["--config", "FILE"],
    ],
    ids=["json", "equals", "parts", "leaves", "file"],
)
def test_what_the_user_says_stays_and_the_rest_is_added(tmp_path: Path, said: list[str]) -> None:
    extra = '{"tenant": "acme", "worker_id": "0x1f"}'
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "max-model-len: 4096\n"
        "kv_transfer_config:\n  kv_role: kv_consumer\n"
        "  kv_connector_extra_config: {tenant: acme, worker_id: '0x1f'}\n"
    )
    words = [
        word.replace("'", '"').replace("EXTRA", extra).replace("FILE", str(file)) for word in said
    ]
    node = Node(NODE.engine, Path("/run/d.sock"), {})
    transfer, _ = launched("a-model", *words, node=node)
    assert (transfer.kv_connector, transfer.kv_role) == ("KvbmConnector", "kv_consumer")
    assert transfer.kv_connector_extra_config == {
        "tenant": "acme",
        "worker_id": "0x1f",
        "socket": "/run/d.sock",
    }
    found = launch.launch_of(["a-model", *words, "--port", "0"], node)
    assert found.worker_id == 0x1F and found.environment["KVBM_WORKER_ID"] == "0x1f"


def test_a_connector_of_the_users_own_is_left_alone() -> None:
    own = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    transfer, events = launched("a-model", "--kv-transfer-config", json.dumps(own))
    assert transfer.kv_connector == "MultiConnector" and transfer.kv_connector_module_path is None
    assert events.enable_kv_cache_events


def test_events_of_the_users_own_are_left_alone() -> None:
    own: dict[str, object] = {"enable_kv_cache_events": False}
    _, events = launched("a-model", "--kv-events-config", json.dumps(own))
    assert not events.enable_kv_cache_events and events.replay_endpoint is None
    own = {"endpoint": "tcp://*:5557", "topic": "kv"}
    _, events = launched("a-model", "--kv-events-config", json.dumps(own))
    assert (events.endpoint, events.topic, events.publisher) == ("tcp://*:5557", "kv", "zmq")
    assert events.enable_kv_cache_events and events.replay_endpoint is not None


def test_arguments_are_read_as_vllm_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("model: from-file\nblock-size: 32\nheadless: true\nport: 7000\n")
    words = ["--config", str(file), "--port=1", "--port", "2", "-tp", "2", "--max_model_len", "8k"]
    arguments = Arguments(words)
    assert arguments.model == "from-file" and arguments.positional_model is None
    assert arguments.value("port") == "2" and arguments.count("block-size", 0) == 32
    assert arguments.count("tensor-parallel-size", 1) == 2
    assert arguments.count("max-model-len", 0) == 0, "a spelling that is vLLM's to read"
    assert arguments.flag("headless") and not arguments.flag("enforce-eager")
    assert arguments.with_value("port", "9").given == (
        *("--config", str(file), "-tp", "2", "--max_model_len", "8k", "--port", "9"),
    )
    assert Arguments(["m", "--model", "other"]).model == "m"
    for bad in (["--config", str(tmp_path / "none.yaml")], ["--config", __file__]):
        with pytest.raises(ArgumentError, match="--config"):
            Arguments(bad)


def test_what_is_not_one_server_is_refused() -> None:
    for words in (["--headless"], ["--uds", "/run/x"], ["--port", "x"], ["--port", "65536"]):
        with pytest.raises(ArgumentsRefused, match=words[0]):
            launch.launch_of(["a-model", *words], NODE)
    two = Node(EngineSettings(worker_id=5, program="x"), None, {"KVBM_WORKER_ID": "6"})
    assert two.worker_id() == 5, "settings come before the environment"
    with pytest.raises(ArgumentsRefused, match=r"two worker ids are given, 0x7 .* and 0x5"):
        two.worker_id("7")


def test_vllm_is_started_with_the_server_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(EngineSettings(host="h"), None, {})
    monkeypatch.setattr(launch, "_has_command", lambda: True)
    command = launch.launch_of(["a-model", "--port", "0"], node).command
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "a-model"]
    monkeypatch.setattr(launch, "_has_command", lambda: False)
    command = launch.launch_of(["a-model", "--port", "0"], node).command
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "a-model"]


def test_a_launch_does_not_import_vllm() -> None:
    script = "import sys, connectors.vllm.launch; print({'vllm', 'torch'} & sys.modules.keys())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
