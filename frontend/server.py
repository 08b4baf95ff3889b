"""The frontend put together: its router, the server for clients, the one for operators."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from frontend.app import make_app
from frontend.exchanges import Exchanges, make_exchanges
from frontend.gate import Gate
from frontend.generate import Generation, RequestPlaneEngines
from frontend.keep_alive import KeepAlive
from frontend.kserve.service import InferenceService, start_server
from frontend.meter import Meter
from frontend.pages import Pages
from frontend.routed import RoutedFleet
from frontend.settings import FrontendSettings, OpenAiSettings
from frontend.texts import Texts
from frontend.token_routes import TokenRoutes
from frontend.upstream import Upstream
from router.app import create_app
from router.assembly import Assembly, running
from router.dashboard import FleetPage
from router.metrics import RouterMetrics
from router.service import RouterService
from runtime import program
from runtime.engine_card import COMPONENT, ENDPOINT
from runtime.web.dashboard import Dashboard
from runtime.web.server import ServerTls, WebServer

PROGRAM: Final = "kvbm-frontend"

_log = structlog.get_logger("kvbm.frontend")


@contextlib.asynccontextmanager
async def serving(
    settings: FrontendSettings, environ: Mapping[str, str]
) -> AsyncIterator[tuple[WebServer, WebServer]]:
    """The servers for clients and for operators, for as long as the context lasts.

    Raises ListenError.
    """
    metrics = RouterMetrics(program.version(), settings.name)
    async with running(settings, environ, metrics) as assembly:
        texts = Texts(settings.model_paths, settings.tokenizer_cache)
        await texts.read_named()
        watching = asyncio.create_task(texts.watch(lambda: _paths(assembly)), name="texts")
        upstream = Upstream(settings.openai.silence)
        await upstream.open()
        parts = _parts(settings, assembly, texts, upstream)
        try:
            async with _servers(settings, assembly, parts) as servers:
                yield servers
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
async def _servers(
    settings: FrontendSettings, assembly: Assembly, parts: _Parts
) -> AsyncIterator[tuple[WebServer, WebServer]]:
    http, openai = settings.http, settings.openai
    service = RouterService(assembly)
    pages = Pages(parts.fleet, parts.gate, parts.meter, service)
    dashboard = Dashboard(FleetPage(assembly))
    operators = WebServer(
        create_app(service, dashboard),
        http.host,
        http.port,
        section="http",
        concurrency_max=http.concurrency,
    )
    clients = WebServer(
        make_app(parts.exchanges, pages, openai.cors_origins),
        openai.host,
        openai.port,
        section="openai",
        concurrency_max=None,  # the gate counts, and says so as OpenAI does
        stop_timeout_s=round(openai.drain),
        tls=_tls(openai),
    )
    async with contextlib.AsyncExitStack() as stack:
        await operators.start()
        stack.push_async_callback(operators.stop)
        await stack.enter_async_context(dashboard.running())
        if settings.kserve is not None:
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
        await clients.start()
        stack.push_async_callback(clients.stop)
        yield clients, operators


def _parts(
    settings: FrontendSettings, assembly: Assembly, texts: Texts, upstream: Upstream
) -> _Parts:
    openai = settings.openai
    fleet = RoutedFleet(assembly, texts.get, tokens_for=settings.tokens_for)
    endpoint = f"{assembly.namespace}.{COMPONENT}.{ENDPOINT}"
    generation = Generation(
        fleet,
        RequestPlaneEngines(assembly.runtime.client, endpoint, openai.silence),
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


def _paths(assembly: Assembly) -> dict[str, str]:
    """What engines say of their models' folders."""
    return {
        name: next((e.card.path for e in model.engines.values() if e.card.path), "")
        for name, model in assembly.models.items()
    }
