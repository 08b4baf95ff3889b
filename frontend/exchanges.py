"""Who answers the routes that engines answer: passed through, or made here from tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from frontend.errors import UNSUPPORTED, ApiError
from frontend.exchange import Exchange, Handler
from frontend.fleet import Fleet
from frontend.gate import Gate, Scope
from frontend.keep_alive import NEVER, KeepAlive
from frontend.meter import Measured, Meter
from frontend.relay import RESPONSES, Relay
from frontend.request import decode, model_decoder
from frontend.respond import Reply
from frontend.responses import CreatingExchange, Makers, Responses
from frontend.routes import readers
from frontend.token_routes import TokenRoutes
from runtime.engines.upstream import Upstream

RESPONSES_REMEMBERED: Final = 100_000


@dataclass(frozen=True, slots=True)
class Exchanges:
    posted: Mapping[str, Exchange]  # by path
    about_response: Exchange  # `response_id` is a parameter of its paths


def make_exchanges(
    fleet: Fleet,
    gate: Gate,
    meter: Meter,
    upstream: Upstream,
    tokens: TokenRoutes | None = None,
    *,
    migrations_max: int,
    keep_alive: KeepAlive = NEVER,
    responses_remembered: int = RESPONSES_REMEMBERED,
) -> Exchanges:
    """`tokens` does for models whose engines take tokens; all others are passed through."""
    own: dict[str, Handler] = {}
    if tokens is not None:
        own = {"/v1/chat/completions": tokens.chat, "/v1/completions": tokens.completions}
    handlers: dict[str, Handler] = {}
    for path, reader in readers(fleet).items():
        relay = Relay(reader, fleet, upstream, migrations_max=migrations_max, keep_alive=keep_alive)
        handlers[path] = ByModel(fleet, own[path], relay) if path in own else relay
    makers = Makers(responses_remembered, meter)
    responses = Responses(
        handlers[RESPONSES], fleet, upstream, makers, meter, keep_alive=keep_alive
    )
    posted = {path: Exchange(path, handler, gate, meter) for path, handler in handlers.items()}
    posted[RESPONSES] = CreatingExchange(RESPONSES, responses.create, gate, meter, makers)
    about = Exchange(f"{RESPONSES}/{{response_id}}", responses.about, gate, meter)
    return Exchanges(posted, about)


class ByModel:
    """A handler that leaves models whose engines take tokens to another.

    What that one cannot make is passed through if the engines have servers too.
    """

    def __init__(self, fleet: Fleet, of_tokens: Handler, others: Handler) -> None:
        self._fleet = fleet
        self._of_tokens = of_tokens
        self._others = others

    async def __call__(self, body: bytes, scope: Scope, reply: Reply, measured: Measured) -> None:
        model = decode(model_decoder, body).model
        if self._fleet.takes_tokens(model):
            try:
                await self._of_tokens(body, scope, reply, measured)
                return
            except ApiError as error:
                if error.code != UNSUPPORTED or not self._fleet.has_servers(model):
                    raise
        await self._others(body, scope, reply, measured)
