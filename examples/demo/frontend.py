"""The frontend of the demo: OpenAI's API on one port, and what its router says of its choices."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml

from examples.demo.client import SERVED_NAME, Client, EngineError
from examples.demo.process import Process, free_port

# The first start in a checkout compiles the router's index: a minute on two busy cores.
START_TIMEOUT_S = 300.0
HEAR_TIMEOUT_S = 60.0
_TIERS = ("g1", "g2", "g3", "g4")


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    folder: Path  # for its settings
    logs: Path
    records: Path
    events: Mapping[str, Any]
    discovery: Mapping[str, Any]
    name: str = "kvbm-frontend"
    tokens_for: Sequence[str] = ()  # models whose answers it makes itself
    planner: str | None = None  # whose plans its dashboard shows


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that could take a request, as the router saw it: tokens at hand by tier."""

    worker: str
    tokens_by_tier: Mapping[str, int]
    first_token_s: float  # expected, waiting and loading included
    chosen: bool
    speed_from: str = "node"  # who says how fast it computes: `node`, `learnt`, `assumed`

    @property
    def tokens(self) -> int:
        """At hand in any tier."""
        return sum(self.tokens_by_tier.values())


class Frontend:
    """One kvbm-frontend, restarted at will; its ports stay the same."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self._settings = config.folder / f"{config.name}.yaml"
        ports = free_port(), free_port()
        self.url, self.operators = (f"http://127.0.0.1:{port}" for port in ports)
        self._ports = ports
        self.process = Process(
            config.name,
            [sys.executable, "-m", "frontend", "serve", "--config", str(self._settings)],
            log=config.logs / f"{config.name}.log",
            record=config.records / f"{config.name}.pid",
        )
        self.client = Client(config.name, self.url, self.process.check)
        self._router = Client(config.name, self.operators, self.process.check)

    def start(self) -> None:
        self._write_settings()
        self.client.open()
        self._router.open()
        self.process.start()

    def wait_live(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Seconds until it was more than starting; engines may come later."""
        return self.process.wait_until(lambda: self.client.answers("/metrics"), timeout_s)

    def stop(self) -> None:
        self.client.close()
        self._router.close()
        self.process.stop()

    def kill(self) -> None:
        self.process.kill()

    def engines(self) -> int:
        """Engines that it would send requests to."""
        try:
            said = self.client.get("/health", timeout_s=2.0).json()
        except httpx2.TransportError:
            return 0
        return int(said["engines"].get(SERVED_NAME, 0))

    def knows_tokens(self) -> bool:
        """Whether it has the model's tokenizer, which engines tell it the place of."""
        return not self.client.get("/health").json()["routed_by_load"]

    def is_exact(self) -> bool:
        """Whether it is ready and knows all that the nodes have told so far."""
        if not self._router.answers("/ready"):
            return False
        feed = self._router.get("/v1/index").raise_for_status().json()["feed"]
        return bool(feed["is_exact"])

    def explain(self, tokens: Sequence[int], output_tokens: int) -> list[Candidate]:
        """Where a request would go now, the chosen one first."""
        body = {
            "model": SERVED_NAME,
            "tokens": list(tokens),
            "expected_output_tokens": output_tokens,
        }
        told = self._router.post("/v1/route/explain", body).raise_for_status().json()
        decided = told.get("decode")
        if decided is None or decided["worker"] is None:
            raise EngineError(f"the router would send it nowhere: {told.get('why')}")
        found = [_candidate(one, told["block_tokens"]) for one in decided["candidates"]]
        return sorted(found, key=lambda one: not one.chosen)

    def wait_heard(self, worker: str, tokens: Sequence[int], whole: int) -> None:
        """Until the router knows that this worker has so many of the tokens in its own memory."""
        deadline_s = time.monotonic() + HEAR_TIMEOUT_S
        while True:
            candidates = {one.worker: one for one in self.explain(tokens, 1)}
            known = candidates[worker].tokens_by_tier["g1"] if worker in candidates else 0
            if known >= whole:
                return
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"the router knew of {known} tokens on {worker} instead of {whole}, "
                    f"{HEAR_TIMEOUT_S:.0f} s after they were computed"
                )
            time.sleep(0.05)

    def _write_settings(self) -> None:
        config = self._config
        client_port, operators_port = self._ports
        settings = {
            "openai": {"host": "127.0.0.1", "port": client_port},
            "http": {"host": "127.0.0.1", "port": operators_port},
            "events": dict(config.events),
            "discovery": dict(config.discovery),
            # So that the reason that is told is the whole reason: the first token, and no guess
            # at who decodes quicker, which on one machine is whoever was less disturbed.
            "seconds": {"decode_weight": 0},
            "tokens_for": list(config.tokens_for),
            "dashboard": {"planner": config.planner},
        }
        # Holds the credentials of the demo's servers.
        descriptor = os.open(self._settings, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            yaml.safe_dump(settings, file, sort_keys=False)


def _candidate(said: Mapping[str, Any], block_tokens: int) -> Candidate:
    terms = said["terms"]
    return Candidate(
        worker=said["worker"],
        tokens_by_tier={tier: said["blocks_found"][tier] * block_tokens for tier in _TIERS},
        first_token_s=sum(seconds for term, seconds in terms.items() if term != "decode"),
        chosen=said["chosen"],
        speed_from=said["speed"]["prefill_from"],
    )
