"""Choosing a plane: senseless settings are refused, and only its own library is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.requests import RequestPlaneSettings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"silence_max": "5s", "ping_interval": "3s"}, "at least twice ping_interval"),
        ({"nats_user": "u"}, "give both or neither"),
        ({"nats_user": "u", "nats_password": "p", "nats_credentials": "c"}, "not both"),
        ({"frame_max": "1KiB"}, "4096"),
        ({"plane": "quic"}, "tcp"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RequestPlaneSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plane", "imported"), [("tcp", set()), ("memory", set()), ("nats", {"nats"})]
)
def test_a_plane_imports_only_its_own_library(plane: str, imported: set[str]) -> None:
    program = (
        "import sys; from runtime.requests import create_request_plane, RequestPlaneSettings\n"
        f"create_request_plane(RequestPlaneSettings(plane={plane!r}), 'test').server()\n"
        "print(*({'nats', 'httpx2', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == imported
