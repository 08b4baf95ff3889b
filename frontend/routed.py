"""The fleet through a router in this process: engines from discovery, chosen on tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from frontend.errors import ApiError, model_not_found, overloaded
from frontend.fleet import Assigned, Job, ModelInfo, Place
from frontend.prompt import PromptMaker
from router.assembly import Assembly
from router.index import WorkerId
from router.model import Engine, ModelRouter, Placed
from router.queue import Urgency
from router.router import Prompt, Query, Rejected
from router.selector import Wishes
from runtime.hashing import block_hashes, seed_for, sequence_hashes

AVOIDED_S: Final = 2.0
"""An engine that failed is passed over as long; then one request finds out whether it is back."""


class RoutedFleet:
    """See `frontend.fleet.Fleet`. Called from one event loop, the assembly's."""

    def __init__(
        self,
        assembly: Assembly,
        text_of: Callable[[str], PromptMaker | None],
        *,
        tokens_for: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`text_of` a model, where it is known.

        Models in `tokens_for` are given tokens even if they need not be.
        """
        self._assembly = assembly
        self._text_of = text_of
        self._tokens_for = frozenset(tokens_for)
        self._clock = clock
        self._started_s = int(time.time())
        self._avoided: dict[int, float] = {}  # instance -> until when

    def models(self) -> Sequence[ModelInfo]:
        return [
            self._info(model)
            for model in self._assembly.models.values()
            if any(engine.serving for engine in model.engines.values())
        ]

    def waits_for(self) -> Mapping[str, str]:
        found = self._assembly.readiness()
        return {name: why for name, why in found.items() if why is not None}

    def text(self, model: str) -> PromptMaker | None:
        self._router(model)
        return self._text_of(model)

    def takes_tokens(self, model: str) -> bool:
        """Also if it could be passed through; not if it could and its tokens are not known here."""
        if not self.has_servers(model):
            return model in self._assembly.models
        return model in self._tokens_for and self._text_of(model) is not None

    def has_servers(self, model: str) -> bool:
        found = self._assembly.models.get(model)
        return found is not None and all(e.card.url for e in found.engines.values())

    def places(self) -> Sequence[Place]:
        return [
            _place(engine, WorkerId(instance))
            for model in self._assembly.models.values()
            for instance, engine in model.engines.items()
            if engine.card.url
        ]

    async def assign(self, job: Job) -> Assigned:
        model = self._router(job.model)
        local = block_hashes(job.tokens, model.block_tokens, seed=seed_for(None, job.cache_salt))
        prompt = Prompt(len(job.tokens), local, sequence_hashes(local))
        wishes = Wishes(
            among=self._among(model, job.excluded),
            pinned=None if job.pinned is None else WorkerId(job.pinned),
            session=job.session,
        )
        again = f"/{len(job.excluded)}" if job.excluded else ""
        query = Query(
            job.id + again, prompt, wishes, Urgency(job.priority), job.output_tokens_max or 0
        )
        deadline_s = self._assembly.settings.queue.deadline
        placed = await model.route(query, deadline_s=deadline_s)
        if isinstance(placed, Rejected):
            raise self._refusal(job.model, placed)
        engine = model.engines.get(placed.worker.instance)
        if engine is None:  # it left while the request waited
            placed.end("worker-gone")
            raise overloaded(f"The engine chosen for {job.model!r} has just left", 1)
        return _Assigned(self, placed, engine, model)

    def avoid(self, instance: int) -> None:
        """It has failed just now."""
        self._avoided[instance] = self._clock() + AVOIDED_S

    def _router(self, model: str) -> ModelRouter:
        found = self._assembly.models.get(model)
        if found is None:
            raise model_not_found(model, [one.name for one in self.models()])
        return found

    def _info(self, model: ModelRouter) -> ModelInfo:
        engines = [engine for engine in model.engines.values() if engine.serving]
        contexts = [e.card.context_tokens for e in engines if e.card.context_tokens]
        return ModelInfo(model.name, self._started_s, len(engines), min(contexts, default=None))

    def _among(self, model: ModelRouter, excluded: Collection[int]) -> frozenset[WorkerId] | None:
        """None: all. An engine to be avoided is taken rather than none."""
        if self._avoided:
            now = self._clock()
            self._avoided = {i: until for i, until in self._avoided.items() if until > now}
        if not excluded and not self._avoided:
            return None
        able = model.engines.keys() - set(excluded)
        return frozenset(
            worker
            for instance in (able - self._avoided.keys() or able)
            for worker in model.engines[instance].workers
        )

    def _refusal(self, model: str, rejected: Rejected) -> ApiError:
        said = f"No engine for {model!r}: {rejected.why}"
        busy = self._assembly.settings.busy
        match rejected.kind:
            case "duplicate":
                return ApiError(409, said, "duplicate_request_id")
            case "no-worker" | "no-prefill-worker":
                return overloaded(said, 1)
            case _:
                return overloaded(said, max(round(busy.retry_after), 1), busy.status)


@dataclass(frozen=True, slots=True)
class _Place:
    """See `frontend.fleet.Place`."""

    instance: int
    dp_rank: int
    dp_size: int
    url: str
    transport: str
    relays: bool


class _Assigned:
    """See `frontend.fleet.Assigned`."""

    def __init__(
        self, fleet: RoutedFleet, placed: Placed, engine: Engine, model: ModelRouter
    ) -> None:
        self._fleet = fleet
        self._placed = placed
        self._block_tokens = model.block_tokens
        self.place: Place = _place(engine, placed.worker)
        self.prefill: Place | None = None
        if placed.prefill is not None:
            worker = placed.prefill.worker
            found = model.engines.get(worker.instance)
            self.prefill = None if found is None else _place(found, worker)

    @property
    def cached_tokens(self) -> int:
        chosen = self._placed.computes.chosen
        return int(chosen.request.covered[-1, chosen.row]) * self._block_tokens

    def prefilled(self) -> None:
        self._placed.prefilled()

    def first_token(self) -> None:
        self._placed.first_token()

    def output(self, tokens: int) -> None:
        self._placed.output(tokens)

    def answered(self, tokens: int) -> None:
        self._placed.answered(tokens)

    def end(self) -> None:
        self._placed.end()

    def failed(self) -> None:
        self._fleet.avoid(self.place.instance)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        gone = kind is not None and not issubclass(kind, Exception)
        self._placed.end("cancelled" if gone else "done" if kind is None else "failed")


def _place(engine: Engine, worker: WorkerId) -> Place:
    card = engine.card
    return _Place(
        worker.instance, worker.dp_rank, card.dp_size, card.url, engine.transport, card.relays
    )
