"""What a request says of its pool reaches whoever generates; what relays may be asked again."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.generation import Hints
from tests.frontend.engines import Worker
from tests.frontend.test_token_routes import ANSWER, COMPLETION, ask, stream
from tests.frontend.token_engines import Asking, TokenEngine, TokenFleet, token_frontend

TARGETS = {"x-ttft-target-ms": "250", "x-itl-target-ms": "20.5"}


@pytest.mark.parametrize(
    ("body", "headers", "hints"),
    [
        ({}, {}, None),
        ({}, TARGETS, Hints(250.0, 20.5)),
        ({"priority": 0}, {}, Hints(priority=0)),
        ({"nvext": {"router": {"ttft_target": 0}}}, TARGETS, Hints(0.0, 20.5)),
        (
            {"priority": 3, "nvext": {"agent_hints": {"priority": 7, "osl": 9}, "x": 1}},
            {},
            Hints(priority=7),
        ),
        ({"nvext": {"router": {"ttft_target": 100, "itl_target": 5.5}}}, {}, Hints(100, 5.5)),
        ({"nvext": {"router": None, "agent_hints": None}}, {}, None),
        ({"nvext": None}, {}, None),
    ],
)
async def test_targets_and_priority_reach_the_engine(
    body: dict[str, Any], headers: dict[str, str], hints: Hints | None
) -> None:
    engine = TokenEngine(1, ANSWER)
    async with token_frontend(engine) as asking:
        answer = await asking.http.post("/v1/completions", json=COMPLETION | body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert engine.asked[0].hints == hints


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({}, {"x-ttft-target-ms": "soon"}, "x-ttft-target-ms"),
        ({}, {"x-itl-target-ms": "-1"}, "x-itl-target-ms"),
        ({}, {"x-itl-target-ms": "nan"}, "x-itl-target-ms"),
        ({"nvext": {"router": {"ttft_target": -5}}}, {}, "nvext.router.ttft_target"),
        ({"nvext": {"agent_hints": {"priority": "high"}}}, {}, "nvext.agent_hints.priority"),
    ],
)
async def test_what_is_no_target_is_refused(
    body: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    async with token_frontend(TokenEngine(1, ANSWER)) as asking:
        answer = await asking.http.post("/v1/completions", json=COMPLETION | body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def relayed(asking: Asking) -> None:
    """The fleet's only engine hands requests on."""
    fleet: TokenFleet = asking.fleet
    assign = fleet.assign

    async def assign_relay(job: Any) -> Any:
        given = await assign(job)
        assert isinstance(given.place, Worker)
        given.place.relays = True
        return given

    fleet.assign = assign_relay  # type: ignore[method-assign]


@pytest.mark.parametrize("crash_after", [0, 4])
async def test_a_relay_that_lost_an_engine_is_asked_for_the_rest(crash_after: int) -> None:
    relay = TokenEngine(1, ANSWER, crash_after=crash_after)
    async with token_frontend(relay) as asking:
        relayed(asking)
        fail = relay._fail

        async def fail_once() -> None:
            relay.crash_after = None
            await fail()

        relay._fail = fail_once  # type: ignore[method-assign]
        events = await stream(asking, COMPLETION)
        assert "".join(event["choices"][0]["text"] for event in events) == ANSWER
        assert len(relay.asked) == 2
        assert len(relay.asked[1].token_ids) - len(relay.asked[0].token_ids) == crash_after
        assert "failed" not in asking.given[0].notes


async def test_a_relay_that_goes_on_losing_is_asked_as_often_as_set() -> None:
    relay = TokenEngine(1, ANSWER, crash_after=2)
    async with token_frontend(relay, migrations_max=2) as asking:
        relayed(asking)
        found = await ask(asking, COMPLETION, status=502)
        assert found["error"]["code"] == "engine_lost" and len(relay.asked) == 3


async def test_a_relay_that_cannot_be_reached_is_another_s_turn() -> None:
    relay, other = TokenEngine(1, ANSWER), TokenEngine(2, ANSWER)
    async with token_frontend(relay, other) as asking:
        relayed(asking)
        assert relay.server is not None
        await relay.server.close()
        assert (await ask(asking, COMPLETION))["choices"][0]["text"] == ANSWER
        assert asking.fleet.jobs[1].excluded == (1,)
