"""Canary requests: a server asks its own endpoints, when they are idle, whether they still answer.

The canary goes through the endpoint's handler as a request does, beside the limits and not through
the network. One that fails, answers nothing or is late makes its endpoint unhealthy in the status;
the next response of any request, or a canary that succeeds, makes it healthy again.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog

from runtime.requests.base import REQUEST_ID, Canary
from runtime.requests.dispatch import Dispatcher, Endpoint, Request
from runtime.requests.errors import Outcome

_LOOK_S: Final = 0.05  # the shortest pause between two looks for endpoints that are idle
_LOOKS_PER_INTERVAL: Final = 4

_log = structlog.get_logger()


class CanaryReply:
    def __init__(self) -> None:
        self.items = 0
        self.problem: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    async def item(self, payload: bytes) -> None:
        self.items += 1
        await asyncio.sleep(0)  # as a real reply would, so that a long answer blocks nobody

    def end(self, outcome: Outcome, message: str) -> None:
        if not self.problem.done():
            if outcome is not Outcome.DONE:
                self.problem.set_result(f"its canary ended with {outcome}: {message}")
            else:
                self.problem.set_result(None if self.items else "its canary got no response")


async def watch(dispatcher: Dispatcher) -> None:
    """Until cancelled, keep every endpoint's health true."""
    probes: dict[str, asyncio.Task[None]] = {}
    try:
        while not dispatcher.is_draining:
            now_s = time.monotonic()
            pause_s = 1.0
            for name, endpoint in dispatcher.endpoints.items():
                canary = endpoint.canary
                if canary is None:
                    continue
                pause_s = min(pause_s, canary.interval_s / _LOOKS_PER_INTERVAL)
                heard_s = max(endpoint.answered_s, endpoint.asked_s)
                is_idle = now_s - heard_s >= canary.interval_s
                running = probes.get(name)
                if endpoint.in_flight == 0 and is_idle and (running is None or running.done()):
                    probe = _probe(dispatcher, name, endpoint, canary)
                    probes[name] = asyncio.create_task(probe, name=f"canary {name}")
                elif endpoint.unhealthy is not None and endpoint.answered_s > endpoint.asked_s:
                    _settle(name, endpoint, None)
            await asyncio.sleep(max(pause_s, _LOOK_S))
    finally:
        for probe_task in probes.values():
            probe_task.cancel()
        await asyncio.gather(*probes.values(), return_exceptions=True)


async def _probe(dispatcher: Dispatcher, name: str, endpoint: Endpoint, canary: Canary) -> None:
    reply = CanaryReply()
    request = Request(name, canary.payload, {REQUEST_ID: "canary"}, canary.timeout_s)
    running = dispatcher.begin(endpoint, request, reply, is_probe=True)
    try:
        async with asyncio.timeout(2 * canary.timeout_s):  # for handlers that ignore the deadline
            problem = await reply.problem
    except TimeoutError:
        problem = "its canary neither ended nor could be cancelled"
    finally:
        running.kill()
    endpoint.asked_s = time.monotonic()
    _settle(name, endpoint, problem)


def _settle(name: str, endpoint: Endpoint, problem: str | None) -> None:
    if (problem is None) != (endpoint.unhealthy is None):
        _log.warning("endpoint_health", endpoint=name, healthy=problem is None, reason=problem)
    endpoint.unhealthy = problem
