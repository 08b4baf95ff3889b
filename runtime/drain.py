"""Asking an instance to drain: a value in discovery that its own program heeds.

An instance's record is its own process's, so nobody else can say in it that it is stopping. Who
wants it gone puts a value under `v1/drain/` and the instance's own path; the instance says that it
is stopping, finishes what it has, and waits to be ended. There is no way back from it.
"""

from __future__ import annotations

from typing import Final

from runtime.discovery.base import Discovery, Put
from runtime.names import INSTANCES, InstanceName

DRAINS: Final = "v1/drain/"


def drain_key(name: InstanceName) -> str:
    return f"{DRAINS}{name.key.removeprefix(INSTANCES)}"


async def drain_asked(discovery: Discovery, name: InstanceName) -> None:
    """Returns once somebody wants this instance to drain."""
    key = drain_key(name)
    watch = discovery.watch(key.rpartition("/")[0] + "/")
    try:
        async for event in watch:
            if isinstance(event, Put) and event.key == key:
                return
    finally:
        watch.close()
