"""A real vLLM server as a user starts it.

`Engine` runs the OpenAI server of vLLM on a loopback port, with our connector when it is given a
daemon's socket. With a node's settings it is started by our launcher, as `kvbm engine vllm` does:
then it is an instance that routers find, with KV events and a number.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from examples.demo.client import SERVED_NAME, Answer, Client, EngineError, Message
from examples.demo.process import Process, free_port, kill_tree
from kvbm.address import WORKER_ID_VARIABLE
from runtime.instances import new_instance_id

# An engine on two busy cores has been seen to take three minutes, nearly all of it imports.
START_TIMEOUT_S = 600.0
RESET_TIMEOUT_S = 30.0
# The launcher's, shorter than the patience of whoever ends the demo.
_LAUNCHER_SETTINGS = ("drain_timeout=2s", "drain_quiet=0s", "stop_timeout=12s")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What differs between engines. A block must be a multiple of 32 tokens on a CPU."""

    model: str
    socket: Path | None = None
    node_settings: Path | None = None  # of the daemon; with them the launcher starts the engine
    block_tokens: int = 32
    kv_cache_gib: int = 1
    context_tokens: int = 8192
    dtype: str = "float32"
    load_failure_policy: str = "recompute"
    connector_options: tuple[tuple[str, Any], ...] = ()
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, port: int | str) -> list[str]:
        return [
            *self._program(),
            *("--served-model-name", SERVED_NAME),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", self.dtype),
            *("--block-size", str(self.block_tokens)),
            *("--max-model-len", str(self.context_tokens)),
            *("--max-num-seqs", "8"),
            "--enforce-eager",
            "--enable-prompt-tokens-details",
            *self._connector(),
            *self.arguments,
        ]

    def variables(self) -> dict[str, str]:
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "VLLM_SERVER_DEV_MODE": "1",  # offers /reset_prefix_cache
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1" if Path(self.model).exists() else "0",
            **dict(self.environment),
        }

    def _program(self) -> list[str]:
        if self.node_settings is None:
            server = "vllm.entrypoints.openai.api_server"
            return [sys.executable, "-m", server, "--model", self.model]
        settings = [part for one in _LAUNCHER_SETTINGS for part in ("--set", f"engine.{one}")]
        launcher = [sys.executable, "-m", "connectors.vllm.launch"]
        return [*launcher, "--config", str(self.node_settings), *settings, "--", self.model]

    def _connector(self) -> list[str]:
        if self.socket is None:
            return []
        config = {
            "kv_connector": "KvbmConnector",
            "kv_connector_module_path": "connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": self.load_failure_policy,
            "kv_connector_extra_config": {
                "socket": str(self.socket),
                **dict(self.connector_options),
            },
        }
        return ["--kv-transfer-config", json.dumps(config)]


class Engine:
    """One server. A context manager; or `start`, `wait_ready`, `stop`."""

    def __init__(
        self, name: str, config: EngineConfig, *, logs: Path, records: Path | None = None
    ) -> None:
        self.name = name
        self.config = config
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.instance = 0  # while it runs: its number for routers, another one with each start
        self.process = Process(
            name,
            config.command(self.port),
            log=logs / f"{name}.log",
            record=records / f"{name}.pid" if records else None,
            env=config.variables(),
        )
        self._client = Client(name, self.url, self.process.check)

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.process.log.unlink(missing_ok=True)
        self._client.open()
        self.instance = new_instance_id()
        self.process.start({WORKER_ID_VARIABLE: f"{self.instance:#x}"})

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Seconds until it answered. Raises ProcessError with the log's end if it never does."""
        return self.process.wait_until(self.healthy, timeout_s)

    def healthy(self) -> bool:
        return self._client.answers("/health")

    def stop(self) -> None:
        self._client.close()
        self.process.stop()

    def kill(self) -> None:
        """End it the hard way, as a crash would; `start` starts it again."""
        self._client.close()
        kill_tree(self.process.pid)
        self.process.kill()

    def complete(self, prompt: str | Sequence[int], *, max_tokens: int = 24, **more: Any) -> Answer:
        """Greedy continuation of exactly `max_tokens` tokens."""
        return self._client.complete(prompt, max_tokens=max_tokens, **more)

    def chat(self, messages: Sequence[Message], *, max_tokens: int = 64, **more: Any) -> Answer:
        """The next turn of a conversation, greedy, ended by the model or by `max_tokens`."""
        return self._client.chat(messages, max_tokens=max_tokens, **more)

    def forget(self) -> None:
        """Empty the engine's own prefix cache, G1, and nothing else."""
        self._reset("")

    def _reset(self, query: str) -> None:
        deadline_s = time.monotonic() + RESET_TIMEOUT_S
        while time.monotonic() < deadline_s:
            # Refused while blocks are held, as they are for a moment after each request.
            response = self._client.post(f"/reset_prefix_cache?{query}")
            if response.raise_for_status().json()["success"]:
                return
            time.sleep(0.2)
        raise EngineError(f"{self.name} still held blocks {RESET_TIMEOUT_S:.0f} s after a request")

    def disown(self) -> None:
        """Never use again what this engine stored outside itself; empties G1 too."""
        self._reset("reset_external=true")

    def page(self) -> str:
        """Its `/metrics`."""
        return self._client.get("/metrics").raise_for_status().text

    def metrics(self, name: str) -> dict[str, float]:
        """A metric's samples by their labels' text, as `/metrics` writes them."""
        lines = [line for line in self.page().splitlines() if line.startswith(f"{name}{{")]
        split = [line.rpartition(" ") for line in lines]
        return {labels.removeprefix(name): float(value) for labels, _, value in split}
