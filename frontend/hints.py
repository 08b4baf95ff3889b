"""What a request says of the pool that it should go to, in its body or in headers.

The body has NVIDIA's names: `nvext.router.ttft_target` and `itl_target` in milliseconds, and
`nvext.agent_hints.priority`. Headers are for proxies that set targets for their users; the body
goes before them.
"""

from __future__ import annotations

import math

from frontend import headers as names
from frontend.errors import bad_request
from frontend.gate import Scope
from frontend.request import AgentHints, RouterHints, Sampled
from runtime.generation import Hints

_NO_TARGETS = RouterHints()
_NO_PRIORITY = AgentHints()


def read_hints(scope: Scope, request: Sampled) -> Hints | None:
    """None where it says nothing. Raises ApiError."""
    given = request.nvext
    targets = (given and given.router) or _NO_TARGETS
    agent = (given and given.agent_hints) or _NO_PRIORITY
    ttft_ms, itl_ms = targets.ttft_target, targets.itl_target
    if ttft_ms is None:
        ttft_ms = _milliseconds(scope, names.TTFT_TARGET)
    if itl_ms is None:
        itl_ms = _milliseconds(scope, names.ITL_TARGET)
    priority = request.priority if agent.priority is None else agent.priority
    found = Hints(ttft_ms, itl_ms, priority)
    return None if found == _NOTHING else found


def _milliseconds(scope: Scope, name: bytes) -> float | None:
    given = names.first(scope["headers"], name)
    if given is None:
        return None
    try:
        found = float(given)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found >= 0.0):
        said = f"{given.decode('latin-1')!r} is no time: milliseconds, from 0"
        raise bad_request(said, name.decode(), "invalid_value")
    return found


_NOTHING = Hints()
