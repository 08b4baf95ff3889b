"""`kvbm engine`: engines as instances that routers find; starting one, and taking one in.

`vllm` becomes the launch program of vLLM's connector, which is a layer above this one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from kvbm.cli.options import DEFAULT_URL, Assignments, Config, Token, Url

VLLM_LAUNCH: Final = "connectors.vllm.launch"

app = typer.Typer(no_args_is_help=True, help="Engines as instances that routers find.")

Namespace = Annotated[str | None, typer.Option("--namespace", help="Setting engine.namespace.")]
Component = Annotated[str | None, typer.Option("--component", help="Setting engine.component.")]
Role = Annotated[
    str | None, typer.Option("--role", help="aggregated, prefill or decode; setting engine.role.")
]
Host = Annotated[
    str | None, typer.Option("--host", help="Where others reach it; setting engine.host.")
]
WorkerId = Annotated[
    str | None, typer.Option("--worker-id", help="Its number; setting engine.worker_id.")
]


@app.command()
def vllm(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- MODEL [OPTIONS]", help="What `vllm serve` takes."),
    ] = None,
    *,
    namespace: Namespace = None,
    component: Component = None,
    role: Role = None,
    host: Host = None,
    worker_id: WorkerId = None,
    program: Annotated[
        str | None,
        typer.Option("--program", help="What to start instead of vLLM; setting engine.program."),
    ] = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Start a vLLM server with the connector; register it, watch it, drain it when asked to stop.

    The first SIGTERM or SIGINT drains, the second stops at once.
    """
    named = _assigned(
        namespace=namespace,
        component=component,
        role=role,
        host=host,
        worker_id=worker_id,
        program=program,
    )
    words = [sys.executable, "-m", VLLM_LAUNCH]
    if config is not None:
        words += ["--config", str(config)]
    for assignment in [*(assignments or []), *named]:
        words += ["--set", assignment]
    sys.stdout.flush()
    os.execv(sys.executable, [*words, "--", *(arguments or [])])  # noqa: S606 (no shell)


@app.command()
def attach(
    engine_url: Annotated[
        str, typer.Argument(metavar="ENGINE", help="Its OpenAI server: http://HOST:PORT.")
    ],
    *,
    namespace: Namespace = None,
    component: Component = None,
    role: Role = None,
    host: Host = None,
    worker_id: WorkerId = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Register an OpenAI server that runs already, watch it, and take it back when it is gone.

    Which instance it is, the daemon at --url knows, if one engine there is not registered yet.
    """
    from kvbm.cli.attaching import attach_until_stopped

    named = _assigned(
        namespace=namespace, component=component, role=role, host=host, worker_id=worker_id
    )
    attach_until_stopped(engine_url, config, [*(assignments or []), *named], url, token)


@app.command("print-unit")
def print_unit(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The settings that engines are to use.")
    ] = Path("/etc/kvbm/kvbm.yaml"),
    program: Annotated[
        Path | None, typer.Option(help="The kvbm to run; by default this one.")
    ] = None,
    user: Annotated[str, typer.Option(help="The user to run as: the daemon's.")] = "kvbm",
    group: Annotated[str | None, typer.Option(help="By default named like the user.")] = None,
) -> None:
    """Print the systemd template for this installation: kvbm-engine@.service."""
    from kvbm.engine.unit import unit_text

    beside = (program or Path(sys.executable).parent / "kvbm").absolute()
    typer.echo(unit_text(beside, config.absolute(), user, group or user), nl=False)


def _assigned(**options: str | None) -> list[str]:
    return [f"engine.{name}={value}" for name, value in options.items() if value is not None]
