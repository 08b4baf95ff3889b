"""The vLLM connector: kv_connector `KvbmConnector`, kv_connector_module_path `connectors.vllm`.

What it exports is loaded when it is asked for: importing vLLM takes seconds, and the launcher,
which is beside it, does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from connectors.vllm.connector import KvbmConnector
    from connectors.vllm.spec import KvbmOffloadingSpec

__all__ = ["KvbmConnector", "KvbmOffloadingSpec"]


def __getattr__(name: str) -> object:
    match name:
        case "KvbmConnector":
            from connectors.vllm.connector import KvbmConnector

            return KvbmConnector
        case "KvbmOffloadingSpec":
            from connectors.vllm.spec import KvbmOffloadingSpec

            return KvbmOffloadingSpec
        case _:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
