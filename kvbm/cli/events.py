"""`kvbm events tail`: what the nodes' tiers gain and lose, as they tell it on NATS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbm.cli.options import DEFAULT_URL, AsJson, Token, Url

app = typer.Typer(no_args_is_help=True, help="Block events.")


@app.command()
def tail(
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
    *,
    nats_url: Annotated[
        str | None, typer.Option("--nats-url", help="The NATS server, or several with commas.")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", help="The setting events.namespace.")
    ] = None,
    node: Annotated[str, typer.Option("--node", help="One node's events; * for all.")] = "*",
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The daemon's settings.")
    ] = None,
    router: Annotated[
        bool,
        typer.Option("--router", help="What routers are told of all nodes, engines' blocks too."),
    ] = False,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="End after so many events.")
    ] = None,
) -> None:
    """Follow block events: one line each, and one for every gap.

    Where NATS is: --nats-url, else the settings (--config and KVBM_EVENTS__*, credentials
    always from there), else what the daemon at --url says.
    """
    from kvbm.cli import event_feed

    settings = event_feed.event_settings(config, nats_url, namespace, url, token)
    if router:
        event_feed.follow_stream(settings, event_feed.StreamPrinter(as_json, count))
    else:
        event_feed.follow(settings, node, event_feed.Printer(as_json, count))
