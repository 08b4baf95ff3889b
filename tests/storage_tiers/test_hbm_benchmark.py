"""Benchmarks of a GPU end on the one of NumPy arrays, and say so where there is none."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks import gpu_movers, hbm
from storage_tiers.gpu import GpuUnavailableError
from storage_tiers.hbm import address_of
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


def test_nixl_moves_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own plugins, with host memory in the place of a GPU's."""
    monkeypatch.setattr(gpu_movers, "PAGE_BYTES", (4096,))
    monkeypatch.setattr(gpu_movers, "BATCH", 32)
    gpu = NumpyGpu()
    rows = gpu_movers.memory_rows(gpu, "DRAM", rounds=1, window_s=0.01)
    rows += gpu_movers.file_rows(gpu, "DRAM", "POSIX", tmp_path, size=4 << 20, rounds=1)
    assert [row["name"] for row in rows] == [
        "G1 to G2, 4 KiB",
        "G2 to G1, 4 KiB",
        "file to host memory",
    ]
    assert all(row["against_value"] > 0 for row in rows)
    agent = gpu_movers.Agent("UCX")
    source = np.random.default_rng(0).integers(0, 256, 8192, dtype=np.uint8)
    target = np.zeros_like(source)
    for each in (source, target):
        agent.register("DRAM", address_of(each), each.nbytes)
    far = [address_of(target) + 4096, address_of(target)]
    near = [address_of(source), address_of(source) + 4096]
    assert agent.work("WRITE", ("DRAM", near), ("DRAM", far), 4096)() == 8192
    np.testing.assert_array_equal(target, np.roll(source, 4096))
    agent.close()


@pytest.mark.parametrize("benchmark", [hbm, gpu_movers])
def test_without_a_gpu_it_says_why_and_ends_with_a_status_of_its_own(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_gpu(device: int) -> NumpyGpu:
        raise GpuUnavailableError("no driver is loaded")

    monkeypatch.setattr(benchmark, "CupyGpu", no_gpu)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == hbm.NO_GPU == 3
    told = capsys.readouterr()
    assert "needs an NVIDIA GPU, and none is seen: no driver is loaded" in told.err
    assert not told.out
