"""What a planner decided, for the fleet's dashboard: asked for only while somebody watches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import httpx2
import msgspec

INTERVAL_S: Final = 5.0
TIMEOUT_S: Final = 5.0
PLANS: Final = 240


class _Traffic(msgspec.Struct):
    requests_per_s: float


class _Engine(msgspec.Struct):
    role: str
    phase: str


class _Observation(msgspec.Struct):
    engines: list[_Engine]
    traffic: _Traffic | None = None


class _Forecast(msgspec.Struct):
    requests_per_s: float
    low: float
    high: float


class _Reason(msgspec.Struct):
    role: str
    kind: str
    engines: int
    text: str


class _Plan(msgspec.Struct):
    at: float
    targets: dict[str, int]
    reasons: list[_Reason]
    observation: _Observation
    forecast: _Forecast | None = None


class _History(msgspec.Struct):
    plans: list[_Plan]


class Plans:
    """`run` until cancelled. `url` is the planner's, as `http://127.0.0.1:9086`."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._plans: list[_Plan] = []  # the latest first
        self._error: str | None = None

    async def run(self, is_watched: Callable[[], bool]) -> None:
        async with httpx2.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=TIMEOUT_S, trust_env=False
        ) as client:
            while True:
                if is_watched():
                    await self._ask(client)
                await asyncio.sleep(INTERVAL_S)

    def state(self) -> Mapping[str, Any]:
        """Points oldest first; the last plan's targets and reasons; or why there are none."""
        last = self._plans[0] if self._plans else None
        return {
            "url": self._url,
            "error": self._error,
            "points": [_point(plan) for plan in reversed(self._plans)],
            "targets": {} if last is None else last.targets,
            "reasons": [] if last is None else last.reasons,
        }

    async def _ask(self, client: httpx2.AsyncClient) -> None:
        try:
            answer = await client.get("/v1/plan/history", params={"most": PLANS})
            answer.raise_for_status()
            self._plans = msgspec.json.decode(answer.content, type=_History).plans
            self._error = None
        except (httpx2.HTTPError, msgspec.DecodeError) as error:
            self._error = f"{type(error).__name__}: {error}"


def _point(plan: _Plan) -> dict[str, Any]:
    traffic, forecast = plan.observation.traffic, plan.forecast
    return {
        "at": plan.at,
        "target": sum(plan.targets.values()),
        "serving": sum(one.phase == "serving" for one in plan.observation.engines),
        "rate": None if traffic is None else traffic.requests_per_s,
        "forecast": None if forecast is None else forecast.requests_per_s,
        "low": None if forecast is None else forecast.low,
        "high": None if forecast is None else forecast.high,
    }
