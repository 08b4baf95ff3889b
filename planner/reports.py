"""A step as JSON and as Prometheus samples: what was seen, what is expected, what was decided."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from planner.loop import Loop, Step
from planner.observe import Observation
from runtime.metrics import Labels, Samples

_P = "kvbm_planner_"


def step_report(step: Step) -> dict[str, Any]:
    plan = step.plan
    decision, forecast, work = plan.decision, plan.forecast, plan.work
    expected = {
        role: {
            "engines": one.engines,
            "bound": one.bound,
            "utilisation": _finite(one.expected.utilisation),
            "ttft_s": _finite(one.expected.ttft_s),
            "in_time": one.expected.in_time,
            "itl_s": _finite(one.expected.itl_s),
        }
        for role, one in decision.needed.items()
    }
    return {
        "number": step.number,
        "at": step.wall_s,
        "took_s": round(step.took_s, 6),
        "targets": dict(decision.targets),
        "current": dict(decision.current),
        "applied": asdict(step.applied),
        "reasons": [asdict(reason) for reason in decision.reasons],
        "observation": _observation(plan.observation),
        "forecast": None if forecast is None else asdict(forecast),
        "work": {**asdict(work), "computed_tokens": work.computed_tokens},
        "speeds": {role: asdict(speed) for role, speed in plan.speeds.items()},
        "expected": expected,
        "start_delay_s": plan.start_delay_s,
    }


def _observation(seen: Observation) -> dict[str, Any]:
    traffic = seen.traffic
    told = None
    if traffic is not None:
        told = {**asdict(traffic), "requests_per_s": traffic.requests_per_s}
    shown = ("name", "role", "phase", "running", "waiting", "kv_used", "teller")
    return {
        "engines": [
            {**{name: getattr(e, name) for name in shown}, "told": asdict(e.told)}
            for e in seen.engines
        ],
        "desired": dict(seen.desired),
        "problems": list(seen.problems),
        "traffic": told,
    }


def samples(loop: Loop) -> Samples:
    """By the table of `planner.metrics`."""
    told: dict[str, dict[Labels, float]] = {
        "paused": {(): loop.paused},
        "advisory": {(): loop.advisory},
        "ticks_total": {(): loop.ticks_total},
        "ticks_skipped_total": {(): loop.skipped_total},
        "scalings_total": {(role, way): n for (role, way), n in loop.changes_total.items()},
        "faults_total": {(kind,): loop.faults_total[kind] for kind in ("desired", "apply", "bug")},
        "engine_seconds_total": {(role,): float(s) for role, s in loop.engine_s.items()},
        "ready": {(check,): float(why is None) for check, why in loop.readiness().items()},
    }
    if loop.events is not None:
        told["events_total"] = {(kind,): float(n) for kind, n in loop.events.counts.items()}
    if loop.latest is not None:
        told |= _of_step(loop.latest)
    return {f"{_P}{name}": values for name, values in told.items()}


def _of_step(step: Step) -> dict[str, dict[Labels, float]]:
    plan = step.plan
    seen, decision, traffic = plan.observation, plan.decision, plan.observation.traffic
    told: dict[str, dict[Labels, float]] = {
        "target_replicas": {(role,): n for role, n in decision.targets.items()},
        "replicas": {
            (role, phase): seen.count(role, phase)
            for role in decision.targets
            for phase in ("starting", "serving", "draining")
        },
        "asked_replicas": {
            (reason.role, reason.kind): reason.engines for reason in decision.reasons
        },
        "unread": {(): len(seen.problems)},
        "routers_tell_engines": {(): sum(e.teller == "routers" for e in seen.engines)},
        "waiting_requests": {(): sum(e.waiting for e in seen.engines)},
        "running_requests": {(): sum(e.running for e in seen.engines)},
        "prompt_tokens": {(): plan.work.prompt_tokens},
        "computed_prompt_tokens": {(): plan.work.computed_tokens},
        "output_tokens": {(): plan.work.output_tokens},
        "hit_rate": {(tier,): share for tier, share in plan.work.hits.items()},
        "start_delay_seconds": {(): plan.start_delay_s},
        "tick_seconds": {(): step.took_s},
        "requests_per_second": {("now",): plan.rate_now},
        "engine_step_seconds": {(role,): s.step_s for role, s in plan.speeds.items()},
        "engine_prefill_token_seconds": {(role,): s.token_s for role, s in plan.speeds.items()},
        "expected_ttft_seconds": {
            (role,): one.expected.ttft_s for role, one in decision.needed.items()
        },
        "expected_itl_seconds": {
            (role,): one.expected.itl_s for role, one in decision.needed.items()
        },
    }
    if plan.forecast is not None:
        bands = {"forecast": plan.forecast.requests_per_s, "low": plan.forecast.low}
        for band, value in (bands | {"high": plan.forecast.high}).items():
            told["requests_per_second"][(band,)] = value
    if traffic is not None and traffic.ttft_s is not None:
        told["observed_ttft_seconds"] = {(): traffic.ttft_s}
    if traffic is not None and traffic.itl_s is not None:
        told["observed_itl_seconds"] = {(): traffic.itl_s}
    return told


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
