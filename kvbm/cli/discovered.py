"""Instances as discovery has them now. Discovery and settings are imported here: that costs."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvbm.cli.client import Failure, Json
from kvbm.daemon.settings import DaemonSettings
from runtime import telemetry
from runtime.discovery import DiscoverySettings, DiscoveryUnavailable, create_store
from runtime.instances import InstanceRecord, RecordRefused
from runtime.names import NameRefused, component_prefix
from runtime.settings import SettingsError, parse_assignments

LIST_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Discovered:
    kind: str  # of discovery
    namespace: str
    instances: list[Json]  # by component, endpoint and number
    refused: int  # records that cannot be read


def discovered(
    config: Path | None, assignments: Sequence[str], namespace: str | None
) -> Discovered:
    """All instances of a namespace; by default of the one that engines are put into.

    Raises Failure.
    """
    telemetry.configure("console", "error", sys.stderr, os.environ)
    try:
        settings = DaemonSettings.load(config, overrides=parse_assignments(assignments)).value
        wanted = namespace or settings.engine.namespace or settings.events.namespace
        prefix = component_prefix(wanted)
    except (SettingsError, NameRefused) as error:
        raise Failure(str(error)) from error
    where = settings.discovery
    try:
        values = asyncio.run(_listed(where, prefix))
    except (DiscoveryUnavailable, TimeoutError) as error:
        why = str(error) or f"no answer within {LIST_S:g} s"
        raise Failure(f"{where.discovery} discovery cannot be reached: {why}") from error
    records: list[InstanceRecord] = []
    for key, value in values.items():
        try:
            records.append(InstanceRecord.decode(key, value))
        except RecordRefused:
            continue  # whoever wrote it; they are counted
    records.sort(key=lambda record: record.name)
    told = [_told(record) for record in records]
    return Discovered(where.discovery, wanted, told, len(values) - len(records))


async def _listed(where: DiscoverySettings, prefix: str) -> dict[str, bytes]:
    store = create_store(where, os.environ)
    try:
        async with asyncio.timeout(LIST_S):
            return await store.list(prefix)
    finally:
        await store.close()


def _told(record: InstanceRecord) -> Json:
    return {
        "component": record.component,
        "endpoint": record.endpoint,
        "id": record.id,
        "state": record.state.value,
        "age_s": max(time.time() - record.since_s, 0.0),
        "host": record.host,
        "pid": record.pid,
        "transport": record.transport,
        "labels": record.labels,
    }
