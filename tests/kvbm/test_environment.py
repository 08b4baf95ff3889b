"""What `kvbm doctor` says of CuPy, which only engines on a GPU need."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbm.cli import environment


@pytest.mark.parametrize(
    ("packages", "has_gpu", "verdict", "said"),
    [
        ({}, False, "ok", "no NVIDIA GPU is seen"),
        ({}, True, "warning", "CuPy is missing"),
        ({"cupy": ["cupy-cuda12x"]}, True, "ok", "cupy-cuda12x 14.0 is installed"),
        ({"cupy": ["cupy-cuda12x"]}, False, "ok", "cupy-cuda12x 14.0 is installed"),
    ],
)
def test_cupy_is_missed_only_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    packages: dict[str, list[str]],
    has_gpu: bool,
    verdict: str,
    said: str,
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda distribution: "14.0")
    device = tmp_path / "nvidia0"
    if has_gpu:
        device.touch()
    finding = environment._gpu(packages, device)
    assert finding.verdict == verdict and said in finding.says
    assert (verdict == "warning") == ("kvbm-daemon[cuda]" in finding.do)
