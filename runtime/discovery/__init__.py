"""Discovery: one seam, one store per kind, chosen by settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import assert_never

from runtime.discovery.base import (
    Deleted,
    Discovery,
    DiscoveryUnavailable,
    Pending,
    Put,
    Synced,
    Watch,
    Written,
)
from runtime.discovery.settings import DiscoverySettings
from runtime.discovery.store import Store

__all__ = [
    "Deleted",
    "Discovery",
    "DiscoverySettings",
    "DiscoveryUnavailable",
    "Pending",
    "Put",
    "Synced",
    "Watch",
    "Written",
    "create_discovery",
]


def create_discovery(
    settings: DiscoverySettings, environ: Mapping[str, str], memory: Store | None = None
) -> Discovery:
    """What the settings name, not started; only its own library is imported.

    `memory` is the store that the programs of one process share, if they use that kind.
    """
    from runtime.discovery.leased import LeasedDiscovery

    return LeasedDiscovery(create_store(settings, environ, memory), settings.ttl)


def create_store(
    settings: DiscoverySettings, environ: Mapping[str, str], memory: Store | None = None
) -> Store:
    match settings.discovery:
        case "memory":
            from runtime.discovery.memory import MemoryStore

            return memory if memory is not None else MemoryStore()
        case "file":
            from runtime.discovery.file import FileStore, default_directory

            directory = settings.file_directory or default_directory(os.getuid())
            return FileStore(directory, settings.file_poll)
        case "etcd":
            from runtime.discovery.etcd import EtcdStore

            return EtcdStore(settings)
        case "kubernetes":
            from runtime.discovery.kubernetes import KubernetesStore

            return KubernetesStore(settings, environ)
        case _:
            assert_never(settings.discovery)
