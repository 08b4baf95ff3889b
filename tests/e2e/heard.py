"""What a real engine's own KV events say of a text, heard as a router hears them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from examples.demo.client import Client
from examples.demo.engine import Engine
from runtime.events.engine_feed import EngineEvents, EngineFeed, EngineFeedOptions
from runtime.events.engine_router import EngineRouter
from runtime.events.router_event import Stored
from runtime.hashing import block_hashes
from tests.e2e.texts import BLOCK_TOKENS

HEAR_TIMEOUT_S = 60.0


def names_heard(engine: Engine, events: EngineFeedOptions, text: str) -> list[int]:
    """Sequence hashes of the text's whole blocks, each announced by the engine and none lost.

    Its ring is asked for what it said before. Raises TimeoutError if it never named one of them.
    """
    with Client(engine.name, engine.url) as client:
        return asyncio.run(_heard(events, client.tokens_of(text)))


async def _heard(events: EngineFeedOptions, tokens: Sequence[int]) -> list[int]:
    wanted = block_hashes(tokens, BLOCK_TOKENS).tolist()
    names: dict[int, int] = {}
    translated = EngineRouter(BLOCK_TOKENS)
    feed = EngineFeed(events)
    await feed.start()
    try:
        async with asyncio.timeout(HEAR_TIMEOUT_S):
            async for item in feed:
                assert isinstance(item, EngineEvents), "nothing was lost"
                for data in translated.translate(item.batch):
                    if isinstance(data, Stored):
                        told = (data.tokens_hashes.tolist(), data.block_hashes.tolist())
                        names |= dict(zip(*told, strict=True))
                if names.keys() >= set(wanted):
                    break
    finally:
        await feed.close()
    return [names[block] for block in wanted]
