"""The frontend put together: its router, the server for clients, the one for operators."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
import structlog

from frontend.app import make_app
from frontend.errors import overloaded
from frontend.exchanges import Exchanges, make_exchanges
from frontend.gate import Gate
from frontend.generate import ByAddress, Generation, RequestPlaneEngines
from frontend.keep_alive import KeepAlive
from frontend.meter import Meter
from frontend.pages import Pages
from frontend.routed import RoutedFleet
from frontend.settings import FrontendSettings, OpenAiSettings
from frontend.texts import Texts
from frontend.token_routes import TokenRoutes
from router.app import create_app
from router.assembly import Assembly, running
from router.dashboard import fleet_dashboard
from router.metrics import RouterMetrics
from router.service import RouterService
from runtime import program
from runtime.engine_card import COMPONENT, ENDPOINT
from runtime.engines.completions import CompletionEngines
from runtime.engines.upstream import Upstream
from runtime.kernels import WHY
from runtime.web.server import ServerTls, WebServer
from runtime.web.starting import RETRY_AFTER_S, Starting

PROGRAM: Final = "kvbm-frontend"

_log = structlog.get_logger("kvbm.frontend")


@dataclass(frozen=True, slots=True)
class Doors:
    """Both servers, and what they answer with."""

    clients: WebServer
    operators: WebServer
    clients_page: Starting
    operators_page: Starting


@contextlib.asynccontextmanager
async def listening(settings: FrontendSettings) -> AsyncIterator[Doors]:
    """Servers that say what is waited for, until `serving`. Raises ListenError."""
    http, openai = settings.http, settings.openai
    clients_page, operators_page = Starting(WHY, _not_yet), Starting(WHY)
    operators = WebServer(
        operators_page,
        http.host,
        http.port,
        section="http",
        concurrency_max=http.concurrency,
    )
    clients = WebServer(
        clients_page,
        openai.host,
        openai.port,
        section="openai",
        concurrency_max=None,  # the gate counts, and says so as OpenAI does
        stop_timeout_s=round(openai.drain),
        tls=_tls(openai),
    )
    async with contextlib.AsyncExitStack() as stack:
        for server in (operators, clients):
            stack.push_async_callback(server.stop)
            await server.start()
        yield Doors(clients, operators, clients_page, operators_page)


@contextlib.asynccontextmanager
async def serving(
    settings: FrontendSettings, environ: Mapping[str, str], doors: Doors
) -> AsyncIterator[RoutedFleet]:
    """Requests are answered for as long as the context lasts; on leaving it doors are closed.

    The router's kernels are compiled already.
    """
    metrics = RouterMetrics(program.version(), settings.name)
    async with running(settings, environ, metrics) as assembly:
        texts = Texts(settings.model_paths, settings.tokenizer_cache)
        await texts.read_named()
        watching = asyncio.create_task(texts.watch(lambda: _paths(assembly)), name="texts")
        key = settings.openai.engine_key
        upstream = Upstream(
            settings.openai.silence, None if key is None else key.get_secret_value()
        )
        await upstream.open()
        parts = _parts(settings, assembly, texts, upstream)
        try:
            async with _open(settings, assembly, parts, doors):
                yield parts.fleet
        finally:
            await upstream.close()
            watching.cancel()


@dataclass(frozen=True, slots=True)
class _Parts:
    fleet: RoutedFleet
    gate: Gate
    meter: Meter
    exchanges: Exchanges


@contextlib.asynccontextmanager
async def _open(
    settings: FrontendSettings, assembly: Assembly, parts: _Parts, doors: Doors
) -> AsyncIterator[None]:
    openai = settings.openai
    service = RouterService(assembly)
    pages = Pages(parts.fleet, parts.gate, parts.meter, service)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(doors.operators.stop)
        dashboard = await stack.enter_async_context(fleet_dashboard(assembly))
        doors.operators_page.app = create_app(service, dashboard)
        if settings.kserve is not None:
            # gRPC's import takes its time, and few want it.
            from frontend.kserve.service import InferenceService, start_server

            completions = parts.exchanges.posted["/v1/completions"]
            inference = InferenceService(parts.fleet, completions, program.version())
            kserve = await start_server(
                inference,
                settings.kserve.host,
                settings.kserve.port,
                bytes_max=openai.body_max,
                tls=_tls(openai),
            )
            stack.push_async_callback(kserve.stop, openai.drain)
        doors.clients_page.app = make_app(parts.exchanges, pages, openai.cors_origins)
        stack.push_async_callback(doors.clients.stop)
        yield


def _not_yet(path: str, why: str) -> bytes:
    """To clients, as their libraries read it."""
    if path == "/health":
        return msgspec.json.encode({"status": why, "engines": {}})
    return overloaded(why, RETRY_AFTER_S).body(path)


def _parts(
    settings: FrontendSettings, assembly: Assembly, texts: Texts, upstream: Upstream
) -> _Parts:
    openai = settings.openai
    fleet = RoutedFleet(assembly, texts.get, tokens_for=settings.tokens_for)
    endpoint = f"{assembly.namespace}.{COMPONENT}.{ENDPOINT}"
    generation = Generation(
        fleet,
        ByAddress(
            RequestPlaneEngines(assembly.runtime.client, endpoint, openai.silence),
            CompletionEngines(upstream),
        ),
        migrations_max=openai.migrations,
        migration_tokens_max=openai.migration_tokens_max,
    )
    meter = Meter()
    gate = Gate(
        [key.get_secret_value() for key in openai.api_keys],
        openai.requests_max,
        openai.body_max,
        admin_keys=[key.get_secret_value() for key in openai.admin_keys],
        clients_are_admins=openai.admin == "clients",
    )
    keep_alive = KeepAlive(openai.keep_alive)
    exchanges = make_exchanges(
        fleet,
        gate,
        meter,
        upstream,
        TokenRoutes(fleet, generation, keep_alive),
        migrations_max=openai.migrations,
        keep_alive=keep_alive,
        responses_remembered=openai.responses_remembered,
    )
    return _Parts(fleet, gate, meter, exchanges)


def _tls(openai: OpenAiSettings) -> ServerTls | None:
    if openai.tls_cert is None or openai.tls_key is None:
        return None
    return ServerTls(openai.tls_cert, openai.tls_key, openai.tls_client_ca)


def _paths(assembly: Assembly) -> set[tuple[str, str]]:
    """What engines say of where their models are."""
    return {
        (name, engine.card.path)
        for name, model in assembly.models.items()
        for engine in model.engines.values()
    }
