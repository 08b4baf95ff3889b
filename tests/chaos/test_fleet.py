"""Everything starts in any order, and is killed -9 and started again in any order, under load.

No answer is ever wrong. What was in flight on a killed engine goes on elsewhere, or fails as the
manual says; what was in flight on the killed frontend breaks off; nothing else fails. In the end
routers know all engines and exactly what they hold, route by it, and nothing waits for ever.

KVBM_CHAOS_ROUNDS says how often something is killed. The seed is printed with a failure;
KVBM_CHAOS_SEED repeats its choices, not its timing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from mocker.realtime import answer_to
from mocker.text import VOCABULARY, text_of
from tests.chaos.fleet import (
    BLOCK_TOKENS,
    ENGINES,
    MODELS,
    RELAYED,
    WAIT_S,
    Engine,
    Fleet,
    Program,
)
from tests.chaos.fleet_load import Failed, Load, prompts, streamed
from tests.chaos.fleet_truth import differences, found, unfinished
from tests.plain_http import PLAIN

ROUNDS = int(os.environ.get("KVBM_CHAOS_ROUNDS", "0"))  # 0: each program once
LONG_BLOCKS = 100
LONG_ANSWER = 1000  # tokens: seconds
TOGETHER = 0.5  # chance that another is away at the same time


@pytest.mark.timeout(600 + 60 * ROUNDS)
@pytest.mark.parametrize("discovery", ["file", "etcd"] if ROUNDS else ["either"])
async def test_a_fleet_comes_back_in_whatever_order_it_is_started_and_killed(
    tmp_path: Path, discovery: str
) -> None:
    seed = int(os.environ.get("KVBM_CHAOS_SEED", random.randrange(1 << 32)))
    logging.getLogger(__name__).warning("KVBM_CHAOS_SEED=%d", seed)
    dice = random.Random(seed)
    etcd = discovery == "etcd" or (discovery == "either" and dice.random() < 0.5)
    async with Fleet(tmp_path, etcd=etcd) as fleet:
        for program in dice.sample(fleet.programs, len(fleet.programs)):
            program.start()
            await asyncio.sleep(dice.choice([0.0, 0.0, 1.0]))
        await fleet.until("all have found each other", fleet.serves)
        load = Load(fleet, prompts(dice), dice)
        async with load.running():
            await load.more()
            for victims in rounds(fleet, dice):
                await kill_and_start(fleet, victims, dice)
                fleet.watch(victims)
                if not any(victim is fleet.frontend for victim in victims):
                    await load.more()
            await fleet.until("all have found each other again", fleet.serves)
            await load.more()
        logging.getLogger(__name__).warning("%s", load)
        load.check()
        for model in MODELS:
            await check_engine_killed_under_an_answer(fleet, model, dice)
        await fleet.until("nothing is left over", partial(unfinished, fleet))
        await fleet.until("the index is true", partial(differences, fleet, load.prompts))
        for model in MODELS:
            await check_routed_by_kv(fleet, model, dice)


def rounds(fleet: Fleet, dice: random.Random) -> Iterator[list[Program]]:
    """Who is killed together, one engine at a time: as often as was asked, or everybody once, but
    one engine of each model, as others are killed later."""
    spared = [] if ROUNDS else fleet.engines[1::ENGINES]
    programs = [program for program in fleet.programs if program not in spared]
    left: list[Program] = []
    number = 0
    while number < ROUNDS or (not ROUNDS and (left or not number)):
        left = left or dice.sample(programs, len(programs))
        victims = [left.pop()]
        if left and dice.random() < TOGETHER:
            both_engines = isinstance(victims[0], Engine) and isinstance(left[-1], Engine)
            victims += [] if both_engines else [left.pop()]
        yield sorted(victims, key=lambda one: not isinstance(one, Engine))
        number += 1


async def kill_and_start(fleet: Fleet, victims: list[Program], dice: random.Random) -> None:
    for victim in victims:
        if isinstance(victim, Engine):  # not the last one of its model
            await fleet.until("another engine", partial(fleet.serves_without, victim))
        await asyncio.sleep(dice.uniform(0.0, 1.0))
        victim.kill()
    await asyncio.sleep(dice.uniform(0.0, 1.0))
    for victim in dice.sample(victims, len(victims)):
        victim.start()


async def check_engine_killed_under_an_answer(
    fleet: Fleet, model: str, dice: random.Random
) -> None:
    """The answer goes on elsewhere, or ends with what the manual says."""
    await fleet.until("nothing is left over", partial(unfinished, fleet))
    prompt = [dice.randrange(VOCABULARY) for _ in range(100)]
    body = {"model": model, "prompt": prompt, "max_tokens": LONG_ANSWER, "stream": True}
    true, said, ended = text_of(answer_to(prompt, LONG_ANSWER, VOCABULARY)), "", ""
    async with httpx.AsyncClient(base_url=fleet.frontend_url, timeout=WAIT_S, verify=PLAIN) as http:
        parts = streamed(http, body, [""])
        said += await anext(parts)
        told = await fleet.get(f"{fleet.operators_url}/v1/workers")
        busy = {w["worker"] for m in told["models"] for w in m["workers"] if w["load"]["requests"]}
        (engine,) = [one for one in fleet.engines if one.worker in busy]
        engine.kill()
        try:
            async for part in parts:
                said += part
        except Failed as failure:
            ended = str(failure)
    assert ended == ("engine_lost" if model == RELAYED else "")
    assert true.startswith(said) and (model == RELAYED or said == true)
    engine.start()
    await fleet.until("the engine is known again", fleet.serves)


async def check_routed_by_kv(fleet: Fleet, model: str, dice: random.Random) -> None:
    """A prompt goes where it was before, and that is known beforehand."""
    prompt = [dice.randrange(VOCABULARY) for _ in range(LONG_BLOCKS * BLOCK_TOKENS + 1)]
    known = LONG_BLOCKS * BLOCK_TOKENS
    assert await cached_tokens(fleet, model, prompt) == 0
    holders: set[str] = set()

    async def heard() -> str:
        holders.clear()
        for router in (fleet.operators_url, fleet.router_url):
            told = await found(fleet, router, model, prompt)
            holders.update(worker for worker, blocks in told.items() if blocks)
            if LONG_BLOCKS not in told.values():
                return f"{router}: {told}"
        return ""

    await fleet.until("the prompt's blocks are known", heard)
    assert await cached_tokens(fleet, model, prompt) == known
    # Until the router knows that the frontend's requests have ended.
    await fleet.until("nothing is left over", partial(unfinished, fleet))
    asked = {"model": model, "tokens": prompt, "request": f"last of {model}"}
    routed = (await fleet.http.post(f"{fleet.router_url}/v1/route", json=asked)).json()
    assert (routed["worker"], routed["cached_tokens"]) == (holders.pop(), known)
    assert not holders, "one engine has it"
    await fleet.http.post(f"{fleet.router_url}/v1/requests/{asked['request']}/end")


async def cached_tokens(fleet: Fleet, model: str, prompt: list[int]) -> int:
    """Of the prompt, as the engine that answers counts them."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1}
    answer = await fleet.http.post(f"{fleet.frontend_url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached
