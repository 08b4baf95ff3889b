"""What a dashboard is told of decisions and of what prompts have in common."""

from __future__ import annotations

from tests.router.service.world import BLOCK, World


async def test_a_decision_is_told_with_what_the_next_best_would_have_cost(world: World) -> None:
    routing = await world.router()
    await world.engines.add(1)
    await world.engines.add(2)
    await routing.see("1.0", "2.0")
    tokens = list(range(8 * BLOCK))
    routing.store("2.0", tokens, 6)
    answer = await routing.route(tokens, request="first")
    [told] = routing.assembly.recent.decisions()
    assert (told["request"], told["worker"], told["model"]) == ("first", answer["worker"], "m")
    assert told["worker"] == "2.0" and told["found_tokens"] == {"g1": 6 * BLOCK}
    assert told["next_best"]["worker"] == "1.0"
    assert told["next_best"]["cost"] > told["cost"] == answer["cost"]
    assert (told["unit"], told["policy"], told["reason"]) == ("s", "kv", "policy")


async def test_prefixes_are_told_by_their_longest_shared_form(world: World) -> None:
    routing = await world.router()
    await world.engines.add(1)
    await routing.see("1.0")
    system = list(range(4 * BLOCK))
    chat = [*system, *range(1000, 1000 + 4 * BLOCK)]
    prompts = [
        [*system, *range(5000, 5000 + 4 * BLOCK)],
        [*chat, 7],
        [*chat, *range(9000, 9000 + 2 * BLOCK)],
        list(range(20_000, 20_000 + 4 * BLOCK)),
    ]
    for prompt in prompts:
        await routing.route(prompt)
    longer, shorter = routing.assembly.recent.prefixes()
    assert (longer["tokens"], longer["requests"]) == (8 * BLOCK, 2)
    assert (shorter["tokens"], shorter["requests"]) == (4 * BLOCK, 3)
    assert longer["found_requests"] == shorter["found_requests"] == 0
    routing.store("1.0", chat, 8)
    await routing.route(chat)
    longer, shorter = routing.assembly.recent.prefixes()
    assert (longer["requests"], longer["found_requests"]) == (3, 1)
    assert (shorter["requests"], shorter["found_requests"]) == (4, 1)


async def test_a_prompt_of_less_than_a_block_has_no_prefix(world: World) -> None:
    routing = await world.router()
    await world.engines.add(1)
    await routing.see("1.0")
    await routing.route([1, 2, 3])
    assert routing.assembly.recent.prefixes() == []
    assert routing.assembly.recent.totals.prompt_tokens == 3


async def test_output_that_was_told_too_high_is_corrected(world: World) -> None:
    routing = await world.router()
    await world.engines.add(1)
    await routing.see("1.0")
    await routing.route(list(range(2 * BLOCK)), request="first")
    placed = routing.assembly.reservations.heard("first")
    assert placed is not None
    placed.output(BLOCK)
    placed.output(-4)
    placed.output(4)
    assert (await routing.load("1.0"))["blocks"] == 3, "it is one block of output, not two"
    placed.output(1)
    assert (await routing.load("1.0"))["blocks"] == 4
    placed.end()
    assert routing.assembly.recent.totals.output_tokens == BLOCK + 1
