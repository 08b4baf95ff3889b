"""The scheduler half with its client replaced."""

from __future__ import annotations

import pytest

from connectors.vllm import scheduler_side
from tests.connectors.fake_client import Clock, FakeClient, Scheduler, make_scheduler


@pytest.fixture
def idle_scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """Started, but the daemon is away."""
    monkeypatch.setattr(scheduler_side, "SchedulerClient", FakeClient)
    scheduler = make_scheduler(Clock(), match_deadline_s=1.0, onboard_deadline_s=5.0)
    scheduler.start()
    return scheduler


@pytest.fixture
def scheduler(idle_scheduler: Scheduler) -> Scheduler:
    """Started and ready."""
    idle_scheduler.client.come_up()
    idle_scheduler.client.pump()
    return idle_scheduler
