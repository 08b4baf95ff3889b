"""Engines that take tokens on the request plane and say what is written down for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx

from frontend.app import make_app
from frontend.exchanges import Exchanges, make_exchanges
from frontend.gate import Gate
from frontend.generate import Generation, RequestPlaneEngines
from frontend.keep_alive import KeepAlive
from frontend.meter import Meter
from frontend.pages import Pages
from frontend.prompt import PromptMaker
from frontend.template import ChatTemplate
from frontend.token_routes import TokenRoutes
from frontend.tokenizer import Tokenizer
from runtime.engines.upstream import Upstream
from runtime.generation import Generate, Generated, decode_generate, encode
from runtime.requests import RequestPlaneSettings, RequestServer, create_request_plane
from runtime.requests.base import RequestContext
from tests.frontend.engines import Given, InTurn, OneLimit
from tests.frontend.test_tokenizer import byte_level_once

ENDPOINT = "test.backend.generate"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


class Crash(Exception):
    """What a script says instead of tokens: the engine fails."""


class Gone(Exception):
    """The engine's connection breaks."""


@dataclass
class TokenEngine:
    """Goes on with `answer` from where the prompt's end stands in it.

    `crash_after`: so many tokens, then it fails. `cached`: what it says to have had.
    """

    instance: int
    answer: str
    crash_after: int | None = None
    gone: bool = False  # it fails by its connection
    cached: int | None = 4
    asked: list[Generate] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    server: RequestServer | None = None

    async def generate(self, payload: bytes, context: RequestContext) -> AsyncIterator[bytes]:
        request = decode_generate(payload)
        self.asked.append(request)
        answer = byte_level_once().encode(self.answer, add_special_tokens=False).ids
        given = _given(request.token_ids, answer)
        left = answer[given:][: request.sampling.max_tokens]
        cached = self.cached
        try:
            for number, token in enumerate(left):
                if number == self.crash_after:
                    await self._fail()
                yield encode(Generated(token_ids=[token], cached_tokens=cached))
                cached = None
                await asyncio.sleep(0.001)
            finish = "length" if len(left) == request.sampling.max_tokens else "stop"
            yield encode(Generated(token_ids=[], finish_reason=finish))  # type: ignore[arg-type]
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _fail(self) -> None:
        if not self.gone:
            raise Crash("out of memory")
        assert self.server is not None
        await self.server.close()


def _given(prompt: list[int], answer: list[int]) -> int:
    """How much of the answer the prompt ends with."""
    return next(
        (n for n in range(len(answer), 0, -1) if prompt[-n:] == answer[:n]),
        0,
    )


class TokenFleet(InTurn):
    def __init__(self, engines: Sequence[TokenEngine], context_tokens: int) -> None:
        super().__init__([])
        self.token_engines = engines
        self.engines = engines  # type: ignore[assignment]
        self._text = PromptMaker(Tokenizer(byte_level_once()), ChatTemplate(CHATML, {}))

    def takes_tokens(self, model: str) -> bool:
        return True


@dataclass
class Asking:
    http: httpx.AsyncClient
    fleet: TokenFleet
    meter: Meter
    gate: Gate
    exchanges: Exchanges

    @property
    def given(self) -> list[Given]:
        return self.fleet.given


@contextlib.asynccontextmanager
async def token_frontend(
    *engines: TokenEngine,
    migrations_max: int = 1,
    migration_tokens_max: int | None = None,
    keep_alive_s: float = 0.0,
    body_bytes_max: int = 1 << 20,
) -> AsyncIterator[Asking]:
    """The app itself, without a server, before engines on the TCP request plane."""
    plane = create_request_plane(RequestPlaneSettings(), "test")
    for engine in engines:
        engine.server = plane.server()
        engine.server.serve(ENDPOINT, engine.generate)
        engine.url = await engine.server.start()
    client = plane.client()
    fleet = TokenFleet(engines, 4096)
    generation = Generation(
        fleet,
        RequestPlaneEngines(client, ENDPOINT, 30.0),
        migrations_max=migrations_max,
        migration_tokens_max=migration_tokens_max,
    )
    meter, gate = Meter(), Gate((), 64, body_bytes_max)
    routes = TokenRoutes(fleet, generation, KeepAlive(keep_alive_s))
    exchanges = make_exchanges(
        fleet, gate, meter, Upstream(10.0), routes, migrations_max=migrations_max
    )
    app = make_app(exchanges, Pages(fleet, gate, meter, OneLimit()))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://frontend") as http:
        try:
            yield Asking(http, fleet, meter, gate, exchanges)
        finally:
            await client.close()
            for engine in engines:
                assert engine.server is not None
                await engine.server.close()
