"""Policies side by side on one trace: the same requests, engines and tiers, another router each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mocker.engine import EngineSettings
from mocker.replay import FleetSettings, Replay
from mocker.results import ReplayResult
from mocker.routing import RouterPolicy, Routing
from mocker.timing import PRESETS
from mocker.trace import TraceEntry, requests
from router.selector import PolicyName

BLIND: Final[tuple[PolicyName, ...]] = ("round-robin", "random", "least-loaded", "power-of-two")
POLICIES: Final[tuple[PolicyName, ...]] = (*BLIND, "kv-blocks", "kv")
HEADINGS: Final = (
    *("policy", "TTFT mean", "p50", "p90", "p99 s", "ITL p50", "p99 ms"),
    *("G1", "G2", "G3", "G4 %", "work peak", "busy peak", "busy"),
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What all policies are given. Tiers in GB, those of G4 for all nodes; 0: there is none."""

    machine: str = "llama-8b-h100"
    engines: int = 8
    engines_per_node: int = 8
    block_tokens: int = 128
    g2_gb: float = 0.0
    g3_gb: float = 0.0
    g4_gb: float = 0.0
    seed: int = 1

    def fleet(self) -> FleetSettings:
        """Raises ValueError."""
        if self.machine not in PRESETS:
            raise ValueError(f"machine {self.machine!r} is none of {', '.join(PRESETS)}")
        machine = PRESETS[self.machine]
        block_bytes = machine.kv_bytes_per_token * self.block_tokens
        g2, g3, g4 = (int(gb * 1e9 / block_bytes) for gb in (self.g2_gb, self.g3_gb, self.g4_gb))
        return FleetSettings(
            EngineSettings(
                machine.step,
                machine.kv_tokens // self.block_tokens,
                self.block_tokens,
                kv_bytes_per_token=machine.kv_bytes_per_token,
            ),
            engines=self.engines,
            engines_per_node=self.engines_per_node,
            g2_blocks=g2,
            g3_blocks=g3,
            g4_blocks=g4,
        )


def replay(
    scene: Scene,
    entries: Sequence[TraceEntry],
    routing: PolicyName | Routing,
    *,
    events: bool = True,
) -> ReplayResult:
    """One run; without `events` a router knows of load alone, and of no block."""
    if not isinstance(routing, Routing):
        routing = Routing(routing)
    fleet = scene.fleet()
    policy = RouterPolicy(fleet, routing, scene.seed)
    arrivals = requests(entries, scene.block_tokens)
    return Replay(fleet, policy, arrivals, listen=events and routing.policy not in BLIND).run()


def table(figures: Mapping[str, dict[str, Any]]) -> str:
    """For people: a line for each policy."""
    width = max(map(len, figures), default=9)
    lines = ["  ".join([f"{HEADINGS[0]:>{width}}", *(f"{name:>9}" for name in HEADINGS[1:])])]
    for policy, told in figures.items():
        ttft, itl = told["ttft_s"], told["itl_s"]
        cells = [
            *(ttft[name] for name in ("mean", "p50", "p90", "p99")),
            *(1000 * itl[name] for name in ("p50", "p99")),
            *(100 * share for share in told["hit_rate"].values()),
            told["tokens_peak"],
            told["busy_peak"],
            told["utilisation"],
        ]
        lines.append("  ".join([f"{policy:>{width}}", *(f"{cell:9.3f}" for cell in cells)]))
    return "\n".join(lines)
