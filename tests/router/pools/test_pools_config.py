"""The reference's configuration: taken as it is, or refused with the key and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router.pools.config import PoolsConfig
from router.pools.grid import Features, Override, Strategy
from runtime.settings import SettingsError
from tests.router.pools.configs import agg, disagg

# As the reference's README writes them, with values for what it leaves open.
THEIRS = """{
    "mode": "disagg",
    "enable_priority_retry": true,
    "num_prefill_pools": 3,
    "num_decode_pools": 1,
    "prefill_pool_dynamo_namespaces": ["prefill-fast", "prefill-mid", "prefill-slow"],
    "decode_pool_dynamo_namespaces": ["decode_pool_0"],
    "prefill_pool_priorities": [0, 1, 2],
    "prefill_pool_selection_strategy": {
        "isl_min": 0, "isl_max": 32000, "isl_resolution": 2,
        "ttft_min_ms": 10, "ttft_max_ms": 3000.0, "ttft_resolution": 2,
        "prefill_pool_mapping": [[0, 1], [0, 2]],
        "priority_overrides": [{"min_priority": 10, "max_priority": 100, "target_pool": 1}]
    },
    "decode_pool_selection_strategy": {
        "context_length_min": 0, "context_length_max": 32000, "context_length_resolution": 1,
        "itl_min": 10, "itl_max": 500, "itl_resolution": 2,
        "decode_pool_mapping": [[0, 0]]
    }
}"""


def read(folder: Path, config: Any) -> tuple[Strategy, ...]:
    file = folder / "pools.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return PoolsConfig.read(file).strategies()


def test_the_reference_s_file_is_taken_as_it_is(tmp_path: Path) -> None:
    prefill, decode = read(tmp_path, THEIRS)
    assert prefill.namespaces == ("prefill-fast", "prefill-mid", "prefill-slow")
    assert prefill.overrides == (Override(10, 100, 1),)
    assert prefill.retries and decode.retries
    assert prefill.order(2) == (2, 1, 0)
    assert decode.priorities == (0,)
    assert decode.axes[1].high == 500  # a name of before targets had units
    assert prefill.choose(Features(16000, 1505.0)).pool == 2


def test_aggregated_pools_take_a_third_dimension(tmp_path: Path) -> None:
    (flat,) = read(tmp_path, agg("a", "b", "c"))
    assert [axis.feature for axis in flat.axes] == ["ttft_ms", "itl_ms"]
    length = {"isl_min": 0, "isl_max": 24576, "isl_resolution": 2, "ttft_resolution": 1}
    (deep,) = read(tmp_path, agg("a", "b", mapping=[[[0]], [[1]]], strategy=length))
    assert [deep.choose(Features(n)).pool for n in (4096, 16384)] == [0, 1]


def test_keys_of_the_other_mode_are_read_over(tmp_path: Path) -> None:
    assert len(read(tmp_path, disagg(["p"], ["d"]) | {"num_agg_pools": 3})) == 2


PREFILL = "prefill_pool_selection_strategy"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (
            "num_prefil_pools",
            2,
            "num_prefil_pools",
        ),
        ("mode", "both", "mode (from "),
        ("mode", "agg", "mode agg needs num_agg_pools, agg_pool_dynamo_namespaces, agg_pool_sel"),
        ("num_prefill_pools", 3, "prefill_pool_dynamo_namespaces has 2 names for 3 pools"),
        ("num_prefill_pools", 0, "num_prefill_pools is 0"),
        ("num_prefill_pools", "2", "num_prefill_pools (from "),
        ("prefill_pool_dynamo_namespaces", ["a", "b c"], "namespace 'b c' is not accepted"),
        ("prefill_pool_priorities", [1], "prefill_pool_priorities has 1 numbers for 2 pools"),
        ("prefill_pool_priorities", [True, 1], "prefill_pool_priorities.0"),
        ("enable_priority_retry", "yes", "enable_priority_retry"),
        (f"{PREFILL}.isl_resolution", 0, f"{PREFILL}.isl_resolution"),
        (f"{PREFILL}.isl_min", 3000, f"{PREFILL}.isl_min 3000 is not below isl_max 3000"),
        (f"{PREFILL}.ttft_min_ms", float("nan"), f"{PREFILL}.ttft_min_ms"),
        (f"{PREFILL}.isl_maxx", 5, "unknown key, did you mean 'isl_max'"),
        (f"{PREFILL}.prefill_pool_mapping", [[0]], "prefill_pool_mapping has 1 entries for 2 cel"),
        (f"{PREFILL}.prefill_pool_mapping", [[0], [0, 1]], "prefill_pool_mapping[1] has 2 entries"),
        (f"{PREFILL}.prefill_pool_mapping", [[0], [2]], "prefill_pool_mapping[1][0] is 2; accept"),
        (
            f"{PREFILL}.priority_overrides",
            [{"min_priority": 2, "max_priority": 1, "target_pool": 0}],
            "priority_overrides.0 (from",
        ),
        (
            f"{PREFILL}.priority_overrides",
            [{"min_priority": 0, "max_priority": 1, "target_pool": 2}],
            "priority_overrides[0].target_pool is 2; accepted: 0 to 1",
        ),
        (
            f"{PREFILL}.priority_overrides",
            [{"min_priority": 0, "max_priority": 1, "pool": 2}],
            "priority_overrides.0.pool (from",
        ),
    ],
)
def test_what_it_cannot_mean_is_refused(tmp_path: Path, path: str, value: Any, says: str) -> None:
    config = disagg(["a", "b"], ["d"])
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = value
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, config)
    assert says in str(caught.value)


def test_the_third_dimension_needs_all_its_keys(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="isl_min, isl_max and isl_resolution go together"):
        read(tmp_path, agg("a", strategy={"isl_min": 0}))
    deep = {"isl_min": 0, "isl_max": 9, "isl_resolution": 1}
    with pytest.raises(SettingsError, match=r"agg_pool_mapping\[0\]\[0\] is no list"):
        read(tmp_path, agg("a", strategy=deep))


@pytest.mark.parametrize(("text", "says"), [("{", "not well-formed"), ("[]", "holds a list")])
def test_a_file_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        read(tmp_path, text)
    with pytest.raises(SettingsError, match="cannot be read"):
        PoolsConfig.read(tmp_path / "nowhere.json")
