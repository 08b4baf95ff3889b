"""Configurations of pools, as the reference writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def agg(*namespaces: str, mapping: Any = None, **more: Any) -> dict[str, Any]:
    """Pools by the TTFT target, in equal parts of 0 to 3000 ms."""
    count = len(namespaces)
    strategy = {
        "ttft_min_ms": 0,
        "ttft_max_ms": 3000,
        "ttft_resolution": count,
        "itl_min_ms": 0,
        "itl_max_ms": 100,
        "itl_resolution": 1,
        "agg_pool_mapping": mapping or [[pool] for pool in range(count)],
        **more.pop("strategy", {}),
    }
    return {
        "mode": "agg",
        "num_agg_pools": count,
        "agg_pool_dynamo_namespaces": list(namespaces),
        "agg_pool_selection_strategy": strategy,
        **more,
    }


def disagg(prefill: Sequence[str], decode: Sequence[str], **more: Any) -> dict[str, Any]:
    """Prefill pools by length, in equal parts of 0 to 3000 tokens; decode pools by the ITL target,
    of 0 to 100 ms."""
    return {
        "num_prefill_pools": len(prefill),
        "num_decode_pools": len(decode),
        "prefill_pool_dynamo_namespaces": list(prefill),
        "decode_pool_dynamo_namespaces": list(decode),
        "prefill_pool_selection_strategy": {
            "isl_min": 0,
            "isl_max": 3000,
            "isl_resolution": len(prefill),
            "ttft_min_ms": 0,
            "ttft_max_ms": 1000,
            "ttft_resolution": 1,
            "prefill_pool_mapping": [[pool] for pool in range(len(prefill))],
        },
        "decode_pool_selection_strategy": {
            "context_length_min": 0,
            "context_length_max": 4000,
            "context_length_resolution": 1,
            "itl_min_ms": 0,
            "itl_max_ms": 100,
            "itl_resolution": len(decode),
            "decode_pool_mapping": [list(range(len(decode)))],
        },
        **more,
    }
