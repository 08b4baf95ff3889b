"""`kvbm instances`: what serves in a namespace, whatever node it is on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvbm.cli.client import Json
from kvbm.cli.options import AsJson, Assignments, Config
from kvbm.cli.output import age, console, print_json, table


def instances(
    namespace: Annotated[
        str | None, typer.Option("--namespace", help="By default the settings' engine.namespace.")
    ] = None,
    config: Config = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Engines, daemons and all else that is registered in a namespace, and how each is."""
    found = look(config, assignments or [], namespace)
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(heading(found))
    if found["instances"]:
        out.print(instances_table(found["instances"]))


def look(config: Path | None, assignments: list[str], namespace: str | None = None) -> Json:
    """`discovery`, `namespace`, `instances` and `refused`, as both commands print them."""
    from kvbm.cli.discovered import discovered

    found = discovered(config, assignments, namespace)
    return {
        "discovery": found.kind,
        "namespace": found.namespace,
        "instances": found.instances,
        "refused": found.refused,
    }


def heading(found: Json) -> str:
    count = len(found["instances"])
    said = f"{count} instances in namespace {found['namespace']} ({found['discovery']} discovery)"
    return said + (f"; {found['refused']} records cannot be read" if found["refused"] else "")


def instances_table(instances: list[Json]) -> Table:
    """The state's age, not the instance's; labels without those that are 0."""
    shown = table("component", "instance", "state", "for", "host", ">pid", "labels")
    for one in instances:
        labels = (f"{name}={value}" for name, value in one["labels"].items() if value != "0")
        shown.add_row(
            *(f"{one['component']}/{one['endpoint']}", f"0x{one['id']}", one["state"]),
            *(age(one["age_s"]), one["host"], str(one["pid"]), " ".join(labels)),
        )
    return shown
