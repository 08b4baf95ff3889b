"""One request as the global router sees it, and as it asks about it in pools."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from router.asks import NAME_MAX, RouteAsk
from router.model import Part
from router.pools.grid import Features
from runtime.engine_card import Role
from runtime.generation import Generate, Hints
from runtime.hashing import block_hashes, seed_for

NO_HINTS = Hints()


class Owed:
    """Seconds of work that a pool is to get, until its router has heard of them."""

    def __init__(self, seconds: float, pay: Callable[[float], None]) -> None:
        self._seconds = seconds
        self._pay = pay

    def paid(self) -> None:
        """Idempotent."""
        seconds, self._seconds = self._seconds, 0.0
        self._pay(seconds)


NOTHING_OWED = Owed(0.0, lambda _: None)
_PARTS: dict[Role, Part] = {"aggregated": "all", "prefill": "prefill", "decode": "decode"}


class Asked:
    """`defaults`: targets of requests that give none."""

    def __init__(self, role: Role, model: str, request: Generate, defaults: Hints) -> None:
        hints = request.hints or NO_HINTS
        self.role: Role = role
        self.model = model
        self.request = request
        self.features = Features(
            len(request.token_ids),
            defaults.ttft_target_ms if hints.ttft_target_ms is None else hints.ttft_target_ms,
            defaults.itl_target_ms if hints.itl_target_ms is None else hints.itl_target_ms,
            hints.priority,
        )
        self.owed = NOTHING_OWED
        self.failed: set[int] = set()  # engines that could not be reached for it
        self._hashes: dict[int, list[int]] = {}

    def body(
        self, block_tokens: int, workers: list[str] | None, deadline_s: float | None = None
    ) -> bytes:
        """A `RouteAsk`, about its blocks rather than its tokens: they are hashed once."""
        request = self.request
        return msgspec.json.encode(
            RouteAsk(
                block_hashes=self._block_hashes(block_tokens),
                prompt_tokens=len(request.token_ids),
                model=self.model,
                part=_PARTS[self.role],
                priority=request.priority,
                session=(request.session or "")[-NAME_MAX:] or None,
                expected_output_tokens=request.sampling.max_tokens,
                workers=workers,
                deadline_s=deadline_s,
            )
        )

    def for_engine(self, dp_rank: int) -> Generate:
        """Without what is for those who hand it on."""
        return msgspec.structs.replace(self.request, dp_rank=dp_rank, hints=None, session=None)

    def _block_hashes(self, block_tokens: int) -> list[int]:
        found = self._hashes.get(block_tokens)
        if found is None:
            tokens = np.array(self.request.token_ids, dtype=np.uint32)
            seed = seed_for(None, self.request.cache_salt)
            found = block_hashes(tokens, block_tokens, seed=seed).tolist()
            self._hashes[block_tokens] = found
        return found
