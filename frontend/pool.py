"""One model's engines and the router that chooses among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Final, Self

from frontend.errors import ApiError, overloaded
from frontend.fleet import Assigned, Job, ModelInfo
from frontend.prompt import PromptMaker
from router.index import WorkerId
from router.queue import Urgency
from router.router import Prompt, Query, Rejected, Routed, Router
from router.selector import Wishes
from runtime.engine_card import EngineCard
from runtime.hashing import block_hashes, seed_for, sequence_hashes

AVOIDED_S: Final = 2.0
"""An engine that failed is passed over as long; then one request finds out whether it is back."""

_STATUS: Final = {
    "no-worker": 503,
    "busy": 503,
    "queue-full": 429,
    "deadline": 503,
    "duplicate": 409,
}


class Pool:
    """Called from one event loop. Whoever owns it tells of engines that come and go."""

    def __init__(
        self,
        model: str,
        router: Router,
        block_tokens: int,
        text: PromptMaker | None,
        *,
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wait_s`: longest that a request waits for an engine to have room."""
        self.model = model
        self.text = text
        self._router = router
        self._block_tokens = block_tokens
        self._wait_s = wait_s
        self._clock = clock
        self._created_s = int(time.time())
        self._engines: dict[int, EngineCard] = {}
        self._avoided: dict[int, float] = {}  # instance -> until when

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def info(self) -> ModelInfo:
        contexts = [card.context_tokens for card in self._engines.values() if card.context_tokens]
        return ModelInfo(
            self.model, self._created_s, len(self._engines), min(contexts, default=None)
        )

    def joined(self, instance: int, card: EngineCard) -> None:
        self._engines[instance] = card
        self._avoided.pop(instance, None)

    def left(self, instance: int) -> None:
        self._engines.pop(instance, None)
        self._avoided.pop(instance, None)

    def avoid(self, instance: int) -> None:
        self._avoided[instance] = self._clock() + AVOIDED_S

    async def assign(self, job: Job) -> Assigned:
        """Raises ApiError."""
        local = block_hashes(job.tokens, self._block_tokens, seed=seed_for(None, job.cache_salt))
        prompt = Prompt(len(job.tokens), local, sequence_hashes(local))
        pinned = None if job.pinned is None else WorkerId(job.pinned)
        wishes = Wishes(among=self._among(job.excluded), pinned=pinned, session=job.session)
        query = Query(
            job.id if not job.excluded else f"{job.id}/{len(job.excluded)}",
            prompt,
            wishes,
            Urgency(job.priority),
            job.output_tokens_max or 0,
        )
        routed = await self._router.route(query, deadline_s=self._wait_s)
        if isinstance(routed, Rejected):
            raise self._refusal(routed)
        card = self._engines.get(routed.worker.instance)
        if card is None:  # it left while the request waited
            routed.end()
            raise overloaded(f"the engine chosen for {self.model!r} has just left", 1)
        return _Assigned(self, routed, card, self._block_tokens)

    def _among(self, excluded: Collection[int]) -> frozenset[WorkerId] | None:
        """None: all. An engine to be avoided is taken rather than none."""
        if self._avoided:
            now = self._clock()
            self._avoided = {i: until for i, until in self._avoided.items() if until > now}
        if not excluded and not self._avoided:
            return None
        able = self._engines.keys() - set(excluded)
        return frozenset(
            WorkerId(instance, rank)
            for instance in (able - self._avoided.keys() or able)
            for rank in range(self._engines[instance].dp_size)
        )

    def _refusal(self, rejected: Rejected) -> ApiError:
        status = _STATUS[rejected.kind]
        said = f"No engine for {self.model!r}: {rejected.why}"
        if status == 409:
            return ApiError(409, said, "duplicate_request_id")
        return overloaded(said, 1, status)


class _Assigned:
    """See `frontend.fleet.Assigned`."""

    def __init__(self, pool: Pool, routed: Routed, card: EngineCard, block_tokens: int) -> None:
        self._pool = pool
        self._routed = routed
        self._card = card
        self._block_tokens = block_tokens

    @property
    def instance(self) -> int:
        return self._routed.worker.instance

    @property
    def dp_rank(self) -> int:
        return self._routed.worker.dp_rank

    @property
    def dp_size(self) -> int:
        return self._card.dp_size

    @property
    def url(self) -> str:
        return self._card.url

    @property
    def transport(self) -> str:
        return ""

    @property
    def cached_tokens(self) -> int:
        chosen = self._routed.chosen
        return int(chosen.request.covered[-1, chosen.row]) * self._block_tokens

    def first_token(self) -> None:
        self._routed.first_token()

    def output(self, tokens: int) -> None:
        self._routed.output(tokens)

    def failed(self) -> None:
        self._pool.avoid(self.instance)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._routed.end()
