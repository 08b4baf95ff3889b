"""What an operator may put into `kv_connector_extra_config`, checked."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvbm.address import WORKER_ID_VARIABLE, find_socket
from kvbm.routing import parse_worker_id
from storage_tiers.device_batches import Way

# Keys that vLLM's own offloading seam reads from the same dictionary.
_SEAM_KEYS = frozenset(
    {
        "spec_name",
        "spec_module_path",
        "block_size",
        "blocks_per_chunk",
        "offload_prompt_only",
        "self_describing_kv_events",
        "sync_load_budget_bytes",
    }
)


class OptionError(ValueError):
    """A bad `kv_connector_extra_config`; the message names the key and what is accepted."""


@dataclass(frozen=True, slots=True)
class Options:
    """The connector's own keys."""

    socket: str
    """Path of the daemon's control socket."""
    tenant: str = ""
    """Engines share KV only with engines of the same tenant."""
    match_deadline_s: float = 1.0
    """Most that a request waits for the daemon's first answer before it counts as a miss."""
    onboard_deadline_s: float = 5.0
    """Most that a request waits for chunks on their way up before it goes on without them.

    This wait and the one before end sooner where computing what is waited for takes less.
    """
    load_deadline_s: float = 10.0
    """How long a load may wait for its turn to be copied before it is given up."""
    gpu_copies: Way | None = None
    """How pages in a GPU's memory are copied: `copies`, `staged` or `direct`; else (`auto`) each
    size of page in the way that is measured to be best when the engine starts."""
    worker_id: int = 0
    """The engine's instance id in discovery, for routers: a number, or text of one (`0x` for
    hexadecimal). Else from the environment's KVBM_WORKER_ID; else derived from vLLM's engine id."""

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> Options:
        """Raises OptionError for an unknown key or a value of the wrong kind."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(extra_config.keys() - known - _SEAM_KEYS)
        if unknown:
            accepted = ", ".join(sorted(known | _SEAM_KEYS))
            raise OptionError(f"kv_connector_extra_config: unknown {unknown}; accepted: {accepted}")
        values: dict[str, Any] = {"socket": str(find_socket(os.getuid()))}
        if named := os.environ.get(WORKER_ID_VARIABLE):
            values["worker_id"] = _worker_id(WORKER_ID_VARIABLE, named)
        for name in known & extra_config.keys():
            value = extra_config[name]
            if name == "worker_id":
                values[name] = _worker_id("kv_connector_extra_config: worker_id", value)
            elif name == "gpu_copies":
                values[name] = _way(value)
            elif name.endswith("_s"):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or not 0 < value < math.inf:
                    raise OptionError(
                        f"kv_connector_extra_config: {name} must be seconds above 0, not {value!r}"
                    )
                values[name] = float(value)
            elif isinstance(value, str):
                values[name] = value
            else:
                raise OptionError(
                    f"kv_connector_extra_config: {name} must be a string, not {value!r}"
                )
        return cls(**values)


def _way(given: Any) -> Way | None:
    named: dict[Any, Way | None] = {"auto": None, **{way.value: way for way in Way}}
    if not isinstance(given, str) or given not in named:
        accepted = ", ".join(named)
        raise OptionError(
            f"kv_connector_extra_config: gpu_copies must be one of {accepted}, not {given!r}"
        )
    return named[given]


def _worker_id(name: str, given: Any) -> int:
    if isinstance(given, int | str) and not isinstance(given, bool):
        try:
            return parse_worker_id(given)
        except ValueError:
            pass  # said below
    raise OptionError(f"{name} must be a number from 1 to 2^64 - 1, not {given!r}")
