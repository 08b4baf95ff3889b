"""A real vLLM server as a user starts it, and a client that measures it as a user would.

`Engine` runs the OpenAI server of vLLM on a loopback port, with our connector when it is given a
daemon's socket. Time to first token is taken by streaming: from sending the request to the first
piece of text. Answers carry token ids, so that equality means equality.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx2

from examples.demo.process import Process, free_port

SERVED_NAME = "demo"
# An engine on two busy cores has been seen to take three minutes, nearly all of it imports.
START_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 300.0
RESET_TIMEOUT_S = 30.0

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What differs between engines. A block must be a multiple of 32 tokens on a CPU."""

    model: str
    socket: Path | None = None
    block_tokens: int = 32
    kv_cache_gib: int = 1
    context_tokens: int = 8192
    dtype: str = "float32"
    load_failure_policy: str = "recompute"
    connector_options: tuple[tuple[str, Any], ...] = ()
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", self.model),
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


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and what it took. `cached_tokens` counts every tier, as the engine reports it."""

    ttft_s: float
    total_s: float
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int


class EngineError(Exception):
    """The engine refused a request or did not do what it was asked."""


class Engine:
    """One server. A context manager; or `start`, `wait_ready`, `stop`."""

    def __init__(
        self, name: str, config: EngineConfig, *, logs: Path, records: Path | None = None
    ) -> None:
        self.name = name
        self.config = config
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = Process(
            name,
            config.command(self.port),
            log=logs / f"{name}.log",
            record=records / f"{name}.pid" if records else None,
            env=config.variables(),
        )
        self._http = self._client()

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
        if self._http.is_closed:
            self._http = self._client()
        self.process.start()

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Seconds until it answered. Raises ProcessError with the log's end if it never does."""
        return self.process.wait_until(self.healthy, timeout_s)

    def healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=2.0).status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self) -> None:
        self._http.close()
        self.process.stop()

    def kill(self) -> None:
        """End it the hard way, as a crash would; `start` starts it again."""
        self._http.close()
        self.process.kill()

    def complete(self, prompt: str | Sequence[int], *, max_tokens: int = 24, **more: Any) -> Answer:
        """Greedy continuation of exactly `max_tokens` tokens."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **more}
        return self._stream("/v1/completions", body)

    def chat(self, messages: Sequence[Message], *, max_tokens: int = 64, **more: Any) -> Answer:
        """The next turn of a conversation, greedy, ended by the model or by `max_tokens`."""
        return self._stream(
            "/v1/chat/completions", {"messages": list(messages), "max_tokens": max_tokens, **more}
        )

    def forget(self) -> None:
        """Empty the engine's own prefix cache, G1, and nothing else."""
        self._reset("")

    def _reset(self, query: str) -> None:
        deadline_s = time.monotonic() + RESET_TIMEOUT_S
        while time.monotonic() < deadline_s:
            # Refused while blocks are held, as they are for a moment after each request.
            response = self._http.post(f"/reset_prefix_cache?{query}")
            if response.raise_for_status().json()["success"]:
                return
            time.sleep(0.2)
        raise EngineError(f"{self.name} still held blocks {RESET_TIMEOUT_S:.0f} s after a request")

    def disown(self) -> None:
        """Never use again what this engine stored outside itself; empties G1 too."""
        self._reset("reset_external=true")

    def metrics(self, name: str) -> dict[str, float]:
        """A metric's samples by their labels' text, as `/metrics` writes them."""
        text = self._http.get("/metrics").raise_for_status().text
        lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
        split = [line.rpartition(" ") for line in lines]
        return {labels.removeprefix(name): float(value) for labels, _, value in split}

    def _client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def _stream(self, path: str, body: dict[str, Any]) -> Answer:
        request = {
            "model": SERVED_NAME,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **body,
        }
        reader = _AnswerReader()
        try:
            with self._http.stream("POST", path, json=request) as response:
                if response.status_code != 200:
                    reason = response.read().decode(errors="replace")
                    raise EngineError(f"{self.name} answered {response.status_code}: {reason}")
                for event in _events(response.iter_lines()):
                    reader.feed(event)
        except httpx2.TransportError as error:
            self.process.check()
            raise EngineError(f"{self.name} broke off an answer: {error!r}") from error
        return reader.answer(self.name)


class _AnswerReader:
    """Puts one answer together from the events of its stream, by the clock of the reader."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._first_s: float | None = None
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._usage: dict[str, Any] = {}

    def feed(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise EngineError(f"the engine reported {event['error']}")
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices", ()):
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            tokens = choice.get("token_ids") or ()
            if (piece or tokens) and self._first_s is None:
                self._first_s = time.perf_counter()
            self._pieces.append(piece)
            self._tokens.extend(tokens)

    def answer(self, name: str) -> Answer:
        if self._first_s is None or not self._usage:
            raise EngineError(f"{name} ended an answer without any text")
        details = self._usage.get("prompt_tokens_details") or {}
        return Answer(
            ttft_s=self._first_s - self._start_s,
            total_s=time.perf_counter() - self._start_s,
            text="".join(self._pieces),
            tokens=tuple(self._tokens),
            prompt_tokens=self._usage["prompt_tokens"],
            cached_tokens=details.get("cached_tokens") or 0,
        )


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "data" and value != "[DONE]":
            yield json.loads(value)
