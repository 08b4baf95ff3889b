"""What a mock engine counts, under vLLM's names, as Prometheus text.

Times of tokens are taken from a request's record when it ends: nothing is counted by the token.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from mocker.engine import Engine
from mocker.sequence import Record
from mocker.timing import PS_PER_S

TTFT_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0)
TTFT_S_LONG: Final = (7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
ITL_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
SOURCES: Final = {"device": "G1", "host": "G2", "disk": "G3", "external_unspecified": "G4"}
E2E_S: Final = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)


class Histogram:
    def __init__(self, name: str, bounds_s: tuple[float, ...]) -> None:
        self.name = name
        self._bounds_ps = np.array(bounds_s) * PS_PER_S
        self._bounds_s = bounds_s
        self._counts = np.zeros(len(bounds_s) + 1, np.int64)
        self._sum_s = 0.0

    def add(self, values_ps: np.ndarray) -> None:
        at = np.searchsorted(self._bounds_ps, values_ps, side="left")
        self._counts += np.bincount(at, minlength=len(self._counts))
        self._sum_s += float(values_ps.sum()) / PS_PER_S

    def lines(self, labels: str) -> list[str]:
        totals = np.cumsum(self._counts).tolist()
        bounds = [*(str(bound) for bound in self._bounds_s), "+Inf"]
        return [
            f"# TYPE {self.name} histogram",
            *(
                f'{self.name}_bucket{{{labels},le="{bound}"}} {total}'
                for bound, total in zip(bounds, totals, strict=True)
            ),
            f"{self.name}_count{{{labels}}} {totals[-1]}",
            f"{self.name}_sum{{{labels}}} {self._sum_s}",
        ]


class Gauges:
    """`ended` is the engine's `on_end`."""

    def __init__(self, model: str) -> None:
        self._labels = f'model_name="{model}",engine="0"'
        self._ttft = Histogram("vllm:time_to_first_token_seconds", (*TTFT_S, *TTFT_S_LONG))
        self._itl = Histogram("vllm:inter_token_latency_seconds", ITL_S)
        self._e2e = Histogram("vllm:e2e_request_latency_seconds", E2E_S)
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._cached: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter(length=0, abort=0)

    def ended(self, record: Record) -> None:
        self._outcomes["length" if record.outcome == "finished" else "abort"] += 1
        if not len(record.token_times_ps):
            return
        self._prompt_tokens += record.prompt_tokens
        self._output_tokens += len(record.token_times_ps)
        self._cached.update(record.cached_tokens)
        self._ttft.add(record.token_times_ps[:1])
        self._itl.add(record.itls_ps)
        if record.e2e_ps is not None:
            self._e2e.add(np.array([record.e2e_ps]))

    def text(self, engine: Engine, waiting: int = 0) -> str:
        """`waiting`: so many more than the engine has."""
        labels, settings, lines = self._labels, engine.settings, list[str]()

        def tell(name: str, kind: str, value: float, more: str = "") -> None:
            lines.append(f"# TYPE {name} {kind}")
            lines.append(f"{name}{{{labels}{more}}} {value}")

        lower = sum(tokens for tier, tokens in self._cached.items() if tier != "G1")
        tell("vllm:num_requests_running", "gauge", engine.running_count)
        tell("vllm:num_requests_waiting", "gauge", engine.waiting_count + waiting)
        tell("vllm:kv_cache_usage_perc", "gauge", engine.pool.used_count / settings.num_blocks)
        tell("vllm:num_preemptions_total", "counter", engine.preemptions_total)
        tell("vllm:prompt_tokens_total", "counter", self._prompt_tokens)
        tell("vllm:generation_tokens_total", "counter", self._output_tokens)
        tell("vllm:prefix_cache_queries_total", "counter", self._prompt_tokens)
        tell("vllm:prefix_cache_hits_total", "counter", self._cached["G1"])
        beyond = self._prompt_tokens - self._cached["G1"]
        tell("vllm:external_prefix_cache_queries_total", "counter", beyond)
        tell("vllm:external_prefix_cache_hits_total", "counter", lower)
        for source, tier in SOURCES.items():
            more = f',source="{source}"'
            tell("vllm:prompt_tokens_cached_by_source_total", "counter", self._cached[tier], more)
        config = f',block_size="{settings.block_size}",num_gpu_blocks="{settings.num_blocks}"'
        tell("vllm:cache_config_info", "gauge", 1, config)
        lines.append("# TYPE vllm:request_success_total counter")
        lines += [
            f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}'
            for reason, count in self._outcomes.items()
        ]
        for histogram in (self._ttft, self._itl, self._e2e):
            lines += histogram.lines(labels)
        return "\n".join([*lines, ""])
