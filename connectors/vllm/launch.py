"""`python -m connectors.vllm.launch -- MODEL ...`: a vLLM server as an instance.

What `kvbm engine vllm` runs. It adds to vLLM's arguments what makes the engine one of ours, where
the user did not say otherwise: the connector, KV events on loopback ports, and by the environment
the number of its instance. It does not import vLLM, so that a launch costs nothing beside it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import structlog
import typer

from connectors.vllm.arguments import ArgumentError, Arguments
from kvbm.address import WORKER_ID_VARIABLE
from kvbm.engine.life import Said
from kvbm.engine.start import ArgumentsRefused, CannotLaunch, Node, start
from kvbm.engine.supervise import Launch

TRANSFER: Final = "kv-transfer-config"
EVENTS: Final = "kv-events-config"
QUIET: Final = "disable-access-log-for-endpoints"
CONNECTOR: Final = "KvbmConnector"
PORT: Final = 8000  # vLLM's own choice
API_KEY_VARIABLE: Final = "VLLM_API_KEY"
_SERVER: Final = "vllm.entrypoints.openai.api_server"
_ALL: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 (named, not bound)
# Servers that no router could send a request to, or that are several.
_NOT_ONE_SERVER: Final = {
    "headless": "it serves no requests: start it with `vllm serve`",
    "uds": "a router cannot reach a socket in the file system: give --host and --port",
    "data-parallel-multi-port-external-lb": "it is several servers: start one of each rank with "
    "--data-parallel-rank",
}

_log = structlog.get_logger("kvbm.engine")


def launch_of(given: Sequence[str], node: Node) -> Launch:
    """Raises ArgumentsRefused or CannotLaunch."""
    try:
        arguments = Arguments(given)
        for option, why in _NOT_ONE_SERVER.items():
            if arguments.flag(option):
                raise ArgumentsRefused(f"--{option}: {why}")
        if arguments.model is None:
            raise ArgumentsRefused("no model: name it first, as in `-- MODEL --max-model-len 8192`")
        arguments, port = _with_port(arguments, node)
        host = arguments.value("host")
        transfer = arguments.json(TRANSFER)
        arguments = _with_events(_with_connector(arguments, transfer, node), node)
        arguments = _without_our_looks_in_the_log(arguments)
    except ArgumentError as error:
        raise ArgumentsRefused(str(error)) from error
    extra = transfer.get("kv_connector_extra_config")
    worker_id = node.worker_id(extra.get("worker_id") if isinstance(extra, dict) else None)
    scheme = "https" if arguments.value("ssl-certfile") else "http"
    local = "127.0.0.1" if host is None or host in _ALL else host
    return Launch(
        command=[*_program(node), *_served(arguments, node)],
        environment={**node.environ, WORKER_ID_VARIABLE: f"{worker_id:#x}"},
        worker_id=worker_id,
        said=Said(
            url=f"{scheme}://{_authority(node.advertised_host(host), port)}",
            model=arguments.value("served-model-name") or arguments.model,
            block_tokens=arguments.count("block-size", 0),
            batch_tokens=arguments.count("max-num-batched-tokens", 0),
            context_tokens=arguments.count("max-model-len", 0),
            dp_size=max(arguments.count("data-parallel-size", 1), 1),
            folder=Path.cwd(),
        ),
        local_url=f"{scheme}://{_authority(local, port)}",
        api_key=_api_key(arguments, node),
    )


def _with_connector(arguments: Arguments, said: Mapping[str, Any], node: Node) -> Arguments:
    if said.get("kv_connector", CONNECTOR) != CONNECTOR:
        _log.warning("connector_of_the_user", kv_connector=said["kv_connector"])
        return arguments
    ours: dict[str, Any] = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": "kv_both",
        # What cannot be loaded is computed; vLLM's own default ends the request.
        "kv_load_failure_policy": "recompute",
    }
    if node.socket is not None:
        ours["kv_connector_extra_config"] = {"socket": str(node.socket)}
    return arguments.with_json(TRANSFER, ours)


def _with_events(arguments: Arguments, node: Node) -> Arguments:
    """On ports of this machine's loopback, as many in a row as there are ranks."""
    said = arguments.json(EVENTS)
    ranks = max(arguments.count("data-parallel-size", 1), 1)
    if said.get("enable_kv_cache_events") is False:
        return arguments
    first = node.free_ports(2 * ranks)
    ours = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        # vLLM listens only where an address has "*" or "::" in it, and connects to any other.
        "endpoint": f"tcp://[::ffff:127.0.0.1]:{first}",
        "replay_endpoint": f"tcp://127.0.0.1:{first + ranks}",
    }
    merged = arguments.with_json(EVENTS, ours)
    heard = {**ours, **said}
    _log.info("engine_events", endpoint=heard["endpoint"], replay=heard["replay_endpoint"])
    return merged


def _without_our_looks_in_the_log(arguments: Arguments) -> Arguments:
    said = arguments.value(QUIET) is not None or arguments.flag("disable-uvicorn-access-log")
    return arguments if said else arguments.with_value(QUIET, "/health,/metrics")


def _with_port(arguments: Arguments, node: Node) -> tuple[Arguments, int]:
    """Port 0 becomes a free one. Raises CannotLaunch if somebody has the port."""
    told = arguments.value("port")
    if told is not None and not (told.isdecimal() and int(told) < 1 << 16):
        raise ArgumentsRefused(f"--port {told} is none; accepted: 0 to 65535, 0 for any free one")
    port = PORT if told is None else int(told)
    if not port:
        port = node.free_ports(1)
        return arguments.with_value("port", str(port)), port
    host = arguments.value("host") or ""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise CannotLaunch(
            f"cannot listen at {_authority(host or '*', port)}: {error.strerror or error}; give "
            "another --port behind `--`, or 0 for any free one"
        ) from error
    return arguments, port


def _program(node: Node) -> list[str]:
    if node.engine.program is not None:
        command = shlex.split(node.engine.program)
        if not command:
            raise ArgumentsRefused("engine.program is empty")
        return command
    if importlib.util.find_spec("vllm") is None:
        raise CannotLaunch(
            f"vLLM is not installed for {sys.executable}: install kvbm-daemon beside it, or name "
            "the program with --program"
        )
    if _has_command():
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    return [sys.executable, "-m", _SERVER]


def _has_command() -> bool:
    """`vllm serve` asks for its version by the name vllm, which vLLM's CPU build does not have."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _served(arguments: Arguments, node: Node) -> list[str]:
    """Without the `vllm` command the server takes its model as an option."""
    model = arguments.positional_model
    if node.engine.program is None and not _has_command() and model is not None:
        return ["--model", model, *arguments.given[1:]]
    return list(arguments.given)


def _api_key(arguments: Arguments, node: Node) -> str | None:
    if node.engine.api_key is not None:
        return node.engine.api_key.get_secret_value()
    return arguments.value("api-key") or node.environ.get(API_KEY_VARIABLE)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="vLLM's, behind `--`: MODEL and options.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The node's settings.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one setting.")
    ] = None,
) -> None:
    """Start a vLLM server with the connector and keep its place in discovery."""
    raise typer.Exit(start(launch_of, arguments or [], config, assignments or []))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app(prog_name="connectors.vllm.launch")
