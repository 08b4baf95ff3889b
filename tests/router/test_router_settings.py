"""The router's settings: defaults that start, and documentation without drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router.settings import RouterSettings, config_page, default_name
from runtime.settings import SettingsError

ROOT = Path(__file__).parents[2]


def test_nothing_need_be_set() -> None:
    settings = RouterSettings.load(environ={}).value
    assert settings.policy == "kv" and settings.http.port == 9480 and settings.snapshot is None
    assert default_name("a.b.c").startswith("a-")
    assert default_name("h") != default_name("h")


def test_the_environment_has_a_prefix_of_its_own() -> None:
    environ = {"KVBM_NODE": "n", "KVBM_ROUTER_QUEUE__HOLD_ABOVE": "0.5"}
    assert RouterSettings.load(environ=environ).value.queue.hold_above == 0.5


def test_a_temperature_is_refused_where_nothing_is_drawn() -> None:
    with pytest.raises(SettingsError, match="temperature is for kv and kv-blocks"):
        RouterSettings.load(environ={}, overrides={"temperature": 1.0, "policy": "random"})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"policy": "best"}, "policy (from override): 'best' is not accepted"),
        ({"http.host": "0.0.0.0"}, "is no loopback address"),
        ({"http.port": -1}, "http.port"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"blocks.disk_credit": 2}, "blocks.disk_credit"),
        ({"replicas.silence": "1s"}, "replicas.silence"),
        ({"snapshot.interval": "5s"}, "File that the index is kept in over restarts"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_key(overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        RouterSettings.load(environ={}, overrides=overrides)
    assert says in str(caught.value)


def test_the_page_is_what_the_code_says() -> None:
    page = (ROOT / "docs/ROUTER_CONFIG.md").read_text()
    assert page == config_page(), "run: python -m router.settings > docs/ROUTER_CONFIG.md"
