"""A class whose async generators are endpoints, with its settings in YAML.

    @service(namespace="production")
    class Processor:
        @endpoint("chat/completions")
        async def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
            yield Chunk(...)

    Processor:
      ServiceArgs: {workers: 4, resources: {gpu: 1}}
      temperature: 0.5

What stands beside `ServiceArgs` goes to the class's constructor. Payloads are JSON of what the
annotations say (pydantic checks them); a method annotated with `bytes` gets and gives them as they
are. A method that has a parameter annotated `RequestContext` is given the request's.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from runtime.component import Runtime, Serving
from runtime.names import EndpointName
from runtime.requests import Canary, RequestContext
from runtime.requests.base import Handler

WORKERS_MAX: Final = 256
_SERVICE: Final = "__kvbm_service__"
_ENDPOINT: Final = "__kvbm_endpoint__"

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., AsyncIterator[Any]])


class ServiceError(ValueError):
    """A class that is no service, or settings that do not fit it."""


class Resources(BaseModel):
    """What one worker needs; told in its labels, not enforced here."""

    model_config = ConfigDict(extra="forbid")

    gpu: int = Field(default=0, ge=0)
    cpu: float = Field(default=0.0, ge=0.0)
    memory: str | None = None


class ServiceArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    workers: int = Field(default=1, ge=1, le=WORKERS_MAX)
    resources: Resources = Field(default_factory=Resources)


@dataclass(frozen=True, slots=True)
class Service:
    namespace: str
    name: str
    args: ServiceArgs


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    name: str
    canary: Canary | None = None


@dataclass(slots=True)
class Worker:
    """One object of a service's class and the instances of its endpoints."""

    service: object
    serving: list[Serving] = field(default_factory=list)


def service(
    *, namespace: str, name: str | None = None, workers: int = 1, gpu: int = 0
) -> Callable[[C], C]:
    """Make a class a service; `name`, its component's, is the class's by default."""
    args = ServiceArgs(workers=workers, resources=Resources(gpu=gpu))

    def mark(cls: C) -> C:
        named = Service(namespace, name or cls.__name__, args)
        if not _endpoints(cls):
            raise ServiceError(f"{cls.__name__} has no method marked with @endpoint")
        for spec in _endpoints(cls).values():
            EndpointName(named.namespace, named.name, spec.name)  # raises NameRefused
        setattr(cls, _SERVICE, named)
        return cls

    return mark


def endpoint(name: str | None = None, *, canary: Canary | None = None) -> Callable[[F], F]:
    """Make an async generator method an endpoint; `name` is the method's by default."""

    def mark(method: F) -> F:
        # A guard of this type would narrow `method` to something that is no F any more.
        yields: bool = inspect.isasyncgenfunction(method)
        if not yields:
            raise ServiceError(f"{method.__qualname__} is no async generator: it has to yield")
        setattr(method, _ENDPOINT, EndpointSpec(name or method.__name__, canary))
        return method

    return mark


async def serve(
    runtime: Runtime, cls: type, settings: Mapping[str, Any] | None = None
) -> list[Worker]:
    """Start a service's workers in this program: each an object of its own, on one event loop.

    More processes are the same program started again. Raises ServiceError.
    """
    about: Service | None = getattr(cls, _SERVICE, None)
    if about is None:
        raise ServiceError(f"{cls.__name__} is not marked with @service")
    given = dict(settings or {})
    args = _args(about, given.pop("ServiceArgs", None))
    workers: list[Worker] = []
    for _ in range(args.workers):
        try:
            worker = Worker(cls(**given))
        except TypeError as error:
            raise ServiceError(f"{about.name}: {error}") from error
        workers.append(worker)
        for method_name, spec in _endpoints(cls).items():
            place = runtime.namespace(about.namespace).component(about.name).endpoint(spec.name)
            handler = handler_of(getattr(worker.service, method_name))
            labels = {"gpu": str(args.resources.gpu)}
            worker.serving.append(await place.serve(handler, canary=spec.canary, labels=labels))
    return workers


def handler_of(method: Callable[..., AsyncIterator[Any]]) -> Handler:
    """The request plane's handler of a bound method or a function, by its annotations."""
    hints = get_type_hints(method)
    parameters = list(inspect.signature(method).parameters)
    context_name = next((n for n in parameters if hints.get(n) is RequestContext), None)
    values = [name for name in parameters if name != context_name]
    if len(values) != 1 or values[0] not in hints:
        raise ServiceError(f"{method.__qualname__} needs one annotated parameter for the request")
    request = _codec(hints[values[0]])
    answer = _codec(_item_of(method, hints.get("return")))

    async def handle(payload: bytes, context: RequestContext) -> AsyncGenerator[bytes, None]:
        arguments = {values[0]: _decoded(request, payload)}
        if context_name is not None:
            arguments[context_name] = context
        items = method(**arguments)
        try:
            async for item in items:
                yield item if answer is None else answer.dump_json(item)
        finally:
            if isinstance(items, AsyncGenerator):
                await items.aclose()

    return handle


def _endpoints(cls: type) -> dict[str, EndpointSpec]:
    """By method."""
    found = {name: getattr(method, _ENDPOINT, None) for name, method in inspect.getmembers(cls)}
    return {name: spec for name, spec in found.items() if spec is not None}


def _args(about: Service, given: Any) -> ServiceArgs:
    if given is None:
        return about.args
    try:
        return ServiceArgs.model_validate({**about.args.model_dump(), **given})
    except (ValidationError, TypeError) as error:
        raise ServiceError(f"ServiceArgs of {about.name}: {error}") from error


def _codec(annotation: Any) -> TypeAdapter[Any] | None:
    """None for bytes, which are not touched."""
    return None if annotation is bytes else TypeAdapter(annotation)


def _item_of(method: Callable[..., AsyncIterator[Any]], annotation: Any) -> Any:
    """`T` of `AsyncIterator[T]` or `AsyncGenerator[T, None]`."""
    origin = typing.get_origin(annotation)
    if origin not in {AsyncIterator, AsyncGenerator}:
        raise ServiceError(f"{method.__qualname__} must be annotated to return AsyncIterator[...]")
    return get_args(annotation)[0]


def _decoded(codec: TypeAdapter[Any] | None, payload: bytes) -> Any:
    if codec is None:
        return payload
    try:
        return codec.validate_json(payload)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'request'}: {one['msg']}" for one in error.errors()
        )
        raise ValueError(f"the request is not accepted: {problems}") from error
