"""The engines behind the frontend, as it sees them: which models there are, who takes a request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from frontend.encoder import Tokens
from frontend.prompt import PromptMaker
from runtime.generation import Hints


@dataclass(frozen=True, slots=True)
class Job:
    """What a request needs of an engine, as far as choosing one goes."""

    id: str
    model: str
    tokens: Tokens  # that it begins with; empty if they are not known
    output_tokens_max: int | None = None
    priority: int = 0
    session: str | None = None
    cache_salt: str | None = None
    pinned: int | None = None  # an instance, and no other
    hints: Hints | None = None  # of the pool that it should go to
    excluded: Collection[int] = field(default=())  # instances that have failed it already

    def without(self, instances: Collection[int]) -> Job:
        return replace(self, excluded=tuple(instances)) if instances else self


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    created_s: int
    engines: int
    context_tokens: int | None


class Place(Protocol):
    """A worker that a request is sent to."""

    @property
    def instance(self) -> int: ...

    @property
    def dp_rank(self) -> int: ...

    @property
    def dp_size(self) -> int: ...

    @property
    def url(self) -> str:
        """Of the engine's OpenAI server, without /v1; empty if it has none."""
        ...

    @property
    def transport(self) -> str:
        """Where it is on the request plane, if it takes tokens there."""
        ...

    @property
    def relays(self) -> bool:
        """Whether it hands requests on: that one was lost behind it is no fault of its own."""
        ...


class Assigned(Protocol):
    """A request on its engine. Leaving the context ends it, however it went."""

    @property
    def place(self) -> Place: ...

    @property
    def prefill(self) -> Place | None:
        """Who is to compute the prompt first; None: the engine itself."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, expected to be at hand in some tier for the one who computes it."""
        ...

    def prefilled(self) -> None:
        """`prefill` has done its part."""
        ...

    def first_token(self) -> None: ...

    def output(self, tokens: int) -> None:
        """So many more have come; fewer than 0: fewer had come than were told of."""
        ...

    def answered(self, tokens: int) -> None:
        """A whole answer of so many has come at once: when each did is not known."""
        ...

    def end(self) -> None:
        """Its answer is whole. Idempotent."""
        ...

    def failed(self) -> None:
        """The engine could not be reached or broke off: avoid it for a moment."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...


class Fleet(Protocol):
    def models(self) -> Sequence[ModelInfo]:
        """Those with an engine that serves."""
        ...

    def waits_for(self) -> Mapping[str, str]:
        """What is not there yet that finding engines needs, and why; by what it is."""
        ...

    def text(self, model: str) -> PromptMaker | None:
        """How the model's prompts become tokens; None if that is not known here.

        Raises ApiError if there is no such model.
        """
        ...

    def takes_tokens(self, model: str) -> bool:
        """Whether its engines are given tokens; false also if there is no such model."""
        ...

    def places(self) -> Sequence[Place]:
        """Engines with an OpenAI server, each once, whether they take new requests or not."""
        ...

    def has_servers(self, model: str) -> bool:
        """Whether its engines have OpenAI servers, so that requests can be passed through."""
        ...

    async def assign(self, job: Job) -> Assigned:
        """The engine for a request; may wait for room. Raises ApiError if there is none."""
        ...
