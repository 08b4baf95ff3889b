"""Counters out of metrics: what an engine (vLLM's names) or a frontend of ours tells.

Samples come from a program's own page, in Prometheus's text format, or from a Prometheus server
that has read it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from planner.observe import Counters

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{([^\n]*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

SOURCES: Final = {
    "device": "G1",
    "host": "G2",
    "p2p": "peer",
    "disk": "G3",
    "external_unspecified": "G4",
}
"""vLLM's words for where cached tokens were, as the tiers that the connector tells it of."""
_F: Final = "kvbm_frontend_"
NAMES: Final = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:request_success_total", "vllm:cache_config_info"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
    "vllm:prompt_tokens_cached_by_source_total",
    *("vllm:prefix_cache_hits_total", "vllm:external_prefix_cache_hits_total"),
    *("vllm:time_to_first_token_seconds_sum", "vllm:time_to_first_token_seconds_count"),
    *("vllm:inter_token_latency_seconds_sum", "vllm:inter_token_latency_seconds_count"),
    *(f"{_F}requests_total", f"{_F}inflight_requests"),
    f"{_F}responses_remembered",  # which a frontend tells before it has had a request
    *(f"{_F}input_sequence_tokens_sum", f"{_F}input_sequence_tokens_count"),
    *(f"{_F}time_to_first_token_seconds_sum", f"{_F}time_to_first_token_seconds_count"),
    *(f"{_F}inter_token_latency_seconds_sum", f"{_F}inter_token_latency_seconds_count"),
)
"""All that is read; a Prometheus server is asked for these alone."""
_NAMES: Final = frozenset(NAMES)


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class EnginePage:
    counters: Counters
    running: float
    waiting: float
    kv_used: float
    kv_tokens: int  # 0: not told


def samples(page: str) -> list[Sample]:
    """Of a page; lines that make no sense are passed over."""
    return [
        Sample(name, dict(_LABEL.findall(labels)), number)
        for name, labels, value in _SAMPLE.findall(page)
        if name in _NAMES and math.isfinite(number := _number(value))
    ]


def engine_page(told: Iterable[Sample]) -> EnginePage | None:
    """Of all data-parallel ranks together; None if it is no page of an engine."""
    total: defaultdict[str, float] = defaultdict(float)
    cached: defaultdict[str, float] = defaultdict(float)
    usages: list[float] = []
    kv_tokens = 0
    for sample in told:
        total[sample.name] += sample.value
        match sample.name:
            case "vllm:kv_cache_usage_perc":
                usages.append(sample.value)
            case "vllm:prompt_tokens_cached_by_source_total":
                source = sample.labels.get("source", "")
                cached[SOURCES.get(source, source)] += sample.value
            case "vllm:cache_config_info":
                block = _number(sample.labels.get("block_size", ""))
                blocks = _number(sample.labels.get("num_gpu_blocks", ""))
                if math.isfinite(block * blocks):
                    kv_tokens += int(block * blocks)
    if "vllm:num_requests_running" not in total:
        return None
    if not cached:  # an older engine tells no more than these
        cached["G1"] = total["vllm:prefix_cache_hits_total"]
        cached["lower"] = total["vllm:external_prefix_cache_hits_total"]
    running, waiting = total["vllm:num_requests_running"], total["vllm:num_requests_waiting"]
    first_tokens = total["vllm:time_to_first_token_seconds_count"]
    counters = Counters(
        arrived=total["vllm:request_success_total"] + running + waiting,
        prompts=first_tokens,
        prompt_tokens=total["vllm:prompt_tokens_total"],
        output_tokens=total["vllm:generation_tokens_total"],
        cached_tokens=dict(cached),
        ttft_s=total["vllm:time_to_first_token_seconds_sum"],
        first_tokens=first_tokens,
        itl_s=total["vllm:inter_token_latency_seconds_sum"],
        intervals=total["vllm:inter_token_latency_seconds_count"],
    )
    used = sum(usages) / len(usages) if usages else 0.0
    return EnginePage(counters, running, waiting, used, kv_tokens)


def frontend_page(told: Sequence[Sample], model: str | None) -> Counters | None:
    """Of one model, or of all; None if it is no page of a frontend."""
    total: defaultdict[str, float] = defaultdict(float)
    for sample in told:
        # Without a model's name is what was refused before it was read: no load of an engine.
        if (whose := sample.labels.get("model")) is None or (whose and model in {None, whose}):
            total[sample.name.removeprefix(_F)] += sample.value
    # The page of another program is not that of an idle frontend.
    if not any(sample.name.startswith(_F) for sample in told):
        return None
    return Counters(
        arrived=total["requests_total"] + total["inflight_requests"],
        prompts=total["input_sequence_tokens_count"],
        prompt_tokens=total["input_sequence_tokens_sum"],
        ttft_s=total["time_to_first_token_seconds_sum"],
        first_tokens=total["time_to_first_token_seconds_count"],
        itl_s=total["inter_token_latency_seconds_sum"],
        intervals=total["inter_token_latency_seconds_count"],
    )


def _number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
