"""`kv_connector_extra_config`: what is accepted, and what the operator is told otherwise."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

from connectors.vllm.options import OptionError, Options
from kvbm.address import find_socket
from storage_tiers.device_batches import Way

SEAM = {
    "spec_name": "KvbmOffloadingSpec",
    "spec_module_path": "connectors.vllm.spec",
    "block_size": 64,
    "blocks_per_chunk": 4,
    "offload_prompt_only": False,
    "self_describing_kv_events": True,
    "sync_load_budget_bytes": 0,
}


def test_without_options_the_users_daemon_is_found() -> None:
    options = Options.parse({})
    assert options == Options(socket=str(find_socket(os.getuid())))


def test_every_option_is_taken_as_given() -> None:
    given = {
        "socket": "/run/kvbm/other.sock",
        "tenant": "blue",
        "match_deadline_s": 0.25,
        "onboard_deadline_s": 2.5,
        "load_deadline_s": 30.5,
        "gpu_copies": "staged",
        "worker_id": 7,
    }
    assert dataclasses.asdict(Options.parse(given)) == given


def test_whole_seconds_are_seconds_too() -> None:
    deadline_s = Options.parse({"load_deadline_s": 3}).load_deadline_s
    assert deadline_s == 3.0 and isinstance(deadline_s, float)


@pytest.mark.parametrize("key", SEAM)
def test_keys_of_vllms_own_seam_pass(key: str) -> None:
    assert Options.parse({key: SEAM[key]}) == Options.parse({})


def test_keys_of_the_seam_mix_with_ours() -> None:
    assert Options.parse(SEAM | {"tenant": "blue"}).tenant == "blue"


def test_an_unknown_key_is_named_and_so_is_what_is_accepted() -> None:
    with pytest.raises(OptionError) as refused:
        Options.parse({"tenant": "blue", "tenants": "red", "load_deadline": 1})
    message = str(refused.value)
    assert "['load_deadline', 'tenants']" in message
    accepted = message.partition("accepted: ")[2].split(", ")
    assert set(accepted) == {field.name for field in dataclasses.fields(Options)} | SEAM.keys()


@pytest.mark.parametrize("key", ["match_deadline_s", "onboard_deadline_s", "load_deadline_s"])
@pytest.mark.parametrize("value", [0, -1, "5", None, True, [1], float("nan"), float("inf")])
def test_a_deadline_that_is_no_time_is_refused(key: str, value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        Options.parse({key: value})
    assert f"{key} must be seconds above 0, not {value!r}" in str(refused.value)


@pytest.mark.parametrize("key", ["socket", "tenant"])
@pytest.mark.parametrize("value", [1, None, True, ["a"], b"a"])
def test_text_that_is_no_text_is_refused(key: str, value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        Options.parse({key: value})
    assert f"{key} must be a string, not {value!r}" in str(refused.value)


def test_copies_on_a_gpu_are_measured_or_told() -> None:
    assert Options.parse({"gpu_copies": "auto"}) == Options.parse({})
    assert Options.parse({"gpu_copies": "direct"}).gpu_copies is Way.DIRECT


@pytest.mark.parametrize("value", ["nixl", "", "COPIES", None, True, ["copies"]])
def test_a_way_of_copying_that_there_is_not_is_refused(value: Any) -> None:
    with pytest.raises(OptionError) as refused:
        Options.parse({"gpu_copies": value})
    accepted = "one of auto, copies, staged, direct"
    assert f"gpu_copies must be {accepted}, not {value!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "worker_id"),
    [(1, 1), ("31", 31), ("0x1F", 31), ((1 << 64) - 1, (1 << 64) - 1), (f"0x{'f' * 16}", -1)],
)
def test_a_worker_id_is_a_number_or_text_of_one(
    given: int | str, worker_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = worker_id & ((1 << 64) - 1)
    monkeypatch.setenv("KVBM_WORKER_ID", "5")
    assert Options.parse({}).worker_id == 5
    assert Options.parse({"worker_id": given}).worker_id == expected
    monkeypatch.setenv("KVBM_WORKER_ID", str(given))
    assert Options.parse({}).worker_id == expected


@pytest.mark.parametrize("value", [0, -1, 1 << 64, True, None, 1.0, "", "one", "1f", "00"])
def test_a_worker_id_that_is_none_is_refused(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="worker_id must be a number from 1"):
        Options.parse({"worker_id": value})
    if isinstance(value, str) and value:
        monkeypatch.setenv("KVBM_WORKER_ID", value)
        with pytest.raises(OptionError, match="KVBM_WORKER_ID must be a number from 1"):
            Options.parse({})
