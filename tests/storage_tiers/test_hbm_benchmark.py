"""`benchmarks.hbm` runs to its end on the GPU of NumPy arrays, and says so where there is none."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks import hbm
from storage_tiers.gpu import GpuUnavailableError
from tests.storage_tiers.numpy_gpu import NumpyGpu


class Busy:
    def __init__(self) -> None:
        self._done = itertools.count()

    def done(self) -> int:
        return next(self._done)


@contextmanager
def busy() -> Iterator[Busy]:
    yield Busy()


def test_every_figure_is_told_against_the_limit_of_its_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hbm, "JUDGED_BYTES", 1 << 20)
    gpu = NumpyGpu()
    scale = hbm.Scale(
        page_bytes=(32 << 10, 256 << 10), batches=(1, 33), ceiling_bytes=1 << 20, rounds=1,
        window_s=0.01,
    )  # fmt: skip
    rows = {row["name"]: row for row in hbm.run(gpu, busy, scale)}
    assert len(rows) == 2 * (2 * 3 * 3 + 3 * 2)
    assert rows["G1 to G2, 33 x 32 KiB"]["target"] == 0.80
    assert rows["both ways, 33 x 256 KiB"]["target"] == 0.95
    assert rows["product beside G2 to G1, 33 x 256 KiB"]["target"] == 0.98
    assert rows["G1 to G2, 1 x 32 KiB"]["target"] is None
    assert {"G1 to G2, staged, 32 KiB", "G2 to G1, direct, 256 KiB"} <= rows.keys()
    assert not gpu.pinned, "all is given back"


def test_without_a_gpu_it_says_why_and_ends_with_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_gpu(device: int) -> NumpyGpu:
        raise GpuUnavailableError("no driver is loaded")

    monkeypatch.setattr(hbm, "CupyGpu", no_gpu)
    monkeypatch.setattr(sys, "argv", ["hbm"])
    with pytest.raises(SystemExit) as ended:
        hbm.main()
    assert ended.value.code == hbm.NO_GPU == 3
    told = capsys.readouterr()
    assert "needs an NVIDIA GPU, and none is seen: no driver is loaded" in told.err
    assert not told.out
