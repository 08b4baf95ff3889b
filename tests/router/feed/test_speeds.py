"""What nodes measured takes the place of assumptions, field by field."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from router.index import WorkerId
from router.speeds import Speeds
from router.workers import Speed
from runtime.events.node_stream import NodeSpeeds, WorkerSpeed, encode_speeds
from tests.router.builders import table, worker
from tests.router.feed.world import World
from tests.runtime.planes import until

MEASURED = WorkerSpeed(1, 0, 2e-5, 0.0, (3e-5, 0.0, 4e-3), (0.0, 0.0, 7e-2))


def said(*workers: WorkerSpeed, node: str = "a") -> bytes:
    return encode_speeds(NodeSpeeds(1, node, list(workers)))


def test_measured_fields_replace_assumed_ones_and_the_others_stay() -> None:
    workers = table(2)
    speeds, assumed = Speeds(workers), Speed()
    speeds.hear(said(MEASURED, WorkerSpeed(9, 3, 1e-6)))
    expected = replace(
        assumed,
        prefill_s_per_token=2e-5,
        load_s_per_block=(3e-5, assumed.load_s_per_block[1], 4e-3),
        load_latency_s=(*assumed.load_latency_s[:2], 7e-2),
    )
    assert workers.at(workers.row(WorkerId(1))).speed == expected
    assert workers.load_s_per_block[:, workers.row(WorkerId(1))].tolist() == [3e-5, 1e-3, 4e-3]
    assert workers.at(workers.row(WorkerId(2))).speed == assumed
    changed = workers.at(0)
    speeds.hear(said(MEASURED, WorkerSpeed(9, 3, 1e-6)))
    assert workers.at(0) is changed  # nothing is new


def test_a_worker_that_joins_is_given_what_is_known_of_it() -> None:
    workers = table(0)
    speeds = Speeds(workers)
    speeds.hear(said(MEASURED))
    assumed = Speed(step_s=0.5)
    speed = speeds.of(WorkerId(1), assumed)
    workers.add(worker(1, speed=speed))
    assert (speed.prefill_s_per_token, speed.step_s) == (2e-5, 0.5)
    assert speeds.of(WorkerId(2), assumed) is assumed
    speeds.forget("a")
    assert speeds.of(WorkerId(1), assumed) is assumed and len(speeds) == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        said(WorkerSpeed(1, 0, -1.0)),
        said(WorkerSpeed(1, 0, 1e9)),
        said(MEASURED, WorkerSpeed(1, 1, 1e-5, 0.0, (-1e-9, 0.0, 0.0))),
        said(*[WorkerSpeed(n, 0) for n in range(2000)]),
    ],
)
def test_numbers_that_no_clock_measured_change_nothing(payload: bytes) -> None:
    workers = table(1)
    speeds = Speeds(workers)
    before = workers.at(0)
    speeds.hear(payload)
    assert (speeds.refused_total, speeds.heard_total) == (1, 0)
    assert workers.at(0) is before and math.isclose(workers.prefill_a[0], 1e-4)


async def test_speeds_come_over_the_event_plane_and_go_with_their_node(tmp_path: Path) -> None:
    async with World("memory", tmp_path) as world, world.router() as router:
        node = await world.node()
        await until(router.is_live)
        router.workers.add(worker(1))
        node.speeds(NodeSpeeds(node.publisher, node.node, [MEASURED]))
        await until(lambda: router.speeds.heard_total == 1)
        assert router.workers.at(0).speed.prefill_s_per_token == 2e-5
        await node.stop()
        await until(lambda: len(router.speeds) == 0)
