"""The frontend's models over gRPC: `ModelInfer`, `ModelStreamInfer` and what describes them.

A request becomes a completion and goes the way of all others: same checks, routing, limits and
counters; its answer comes back as tensors. Inputs are `text_input` (one text) and, if a client
likes, `streaming`; parameters are those of `/v1/completions`. Outputs are `text_output` and
`finish_reason`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, Final

import grpc
import msgspec

from frontend.exchange import Exchange
from frontend.fleet import Fleet
from frontend.kserve.messages import PACKAGE, TYPE_BOOL, TYPE_STRING, message
from runtime.web.server import ListenError, ServerTls

SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"
PLATFORM: Final = "kvbm"
_PARTS_MAX: Final = 256
_LENGTH: Final = struct.Struct("<I")
_INPUTS: Final = {"text_input": "BYTES", "streaming": "BOOL"}
_OUTPUTS: Final = ("text_output", "finish_reason")
_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    529: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

Response = message("ModelInferResponse")
StreamResponse = message("ModelStreamInferResponse")


class InferError(Exception):
    """What a client is told; `status` is HTTP's."""

    def __init__(self, status: int, said: str) -> None:
        self.code = _CODES.get(status, grpc.StatusCode.UNAVAILABLE)
        super().__init__(said)


class InferenceService:
    """`completions` is the exchange of `/v1/completions`."""

    def __init__(self, fleet: Fleet, completions: Exchange, version: str) -> None:
        self._fleet = fleet
        self._completions = completions
        self._version = version

    def handlers(self) -> grpc.GenericRpcHandler:
        unary: dict[str, tuple[Callable[..., Any], str]] = {
            "ServerLive": (self._live, "ServerLive"),
            "ServerReady": (self._ready, "ServerReady"),
            "ModelReady": (self._model_ready, "ModelReady"),
            "ServerMetadata": (self._server_metadata, "ServerMetadata"),
            "ModelMetadata": (self._model_metadata, "ModelMetadata"),
            "ModelConfig": (self._model_config, "ModelConfig"),
            "ModelInfer": (self._infer, "ModelInfer"),
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                _refusing(method),
                request_deserializer=message(f"{stem}Request").FromString,
                response_serializer=message(f"{stem}Response").SerializeToString,
            )
            for name, (method, stem) in unary.items()
        }
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream_infer,
            request_deserializer=message("ModelInferRequest").FromString,
            response_serializer=StreamResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    # -- what describes --------------------------------------------------------------------

    async def _live(self, request: Any, context: Any) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _ready(self, request: Any, context: Any) -> Any:
        return message("ServerReadyResponse")(ready=bool(self._fleet.models()))

    async def _model_ready(self, request: Any, context: Any) -> Any:
        ready = any(model.name == request.name for model in self._fleet.models())
        return message("ModelReadyResponse")(ready=ready)

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return message("ServerMetadataResponse")(name=PLATFORM, version=self._version)

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        self._check(request.name)
        made = message("ModelMetadataResponse")(
            name=request.name, versions=["1"], platform=PLATFORM
        )
        for name, kind in _INPUTS.items():
            made.inputs.add(name=name, datatype=kind, shape=[1])
        for name in _OUTPUTS:
            made.outputs.add(name=name, datatype="BYTES", shape=[-1])
        return made

    async def _model_config(self, request: Any, context: Any) -> Any:
        self._check(request.name)
        made = message("ModelConfigResponse")()
        config = made.config
        config.name, config.platform, config.backend = request.name, PLATFORM, PLATFORM
        config.input.add(name="text_input", data_type=TYPE_STRING, dims=[1])
        config.input.add(name="streaming", data_type=TYPE_BOOL, dims=[1], optional=True)
        for name in _OUTPUTS:
            config.output.add(name=name, data_type=TYPE_STRING, dims=[-1])
        config.model_transaction_policy.decoupled = True
        return made

    def _check(self, model: str) -> None:
        known = [one.name for one in self._fleet.models()]
        if model not in known:
            listed = ", ".join(sorted(known)) or "none at the moment"
            raise InferError(404, f"the model {model!r} does not exist here; served are: {listed}")

    # -- inference -------------------------------------------------------------------------

    async def _infer(self, request: Any, context: Any) -> Any:
        body = _completion_of(request, stream=False)
        answer = _Collected()
        await self._ask(request, body, context, answer.take)
        found = answer.json()
        choice = found["choices"][0]
        return _response(request, found.get("id", ""), choice["text"], choice["finish_reason"])

    async def _stream_infer(
        self, requests: AsyncGenerator[Any, None], context: Any
    ) -> AsyncGenerator[Any, None]:
        """Each request is answered before the next is read; an error ends none but its own."""
        async for request in requests:
            try:
                streaming = _streaming(request)
                body = _completion_of(request, stream=streaming)
                if not streaming:
                    yield StreamResponse(infer_response=await self._infer(request, context))
                    continue
                async for event in self._events(request, body, context):
                    choice = event["choices"][0]
                    yield StreamResponse(
                        infer_response=_response(
                            request, event["id"], choice["text"], choice["finish_reason"]
                        )
                    )
            except InferError as error:
                yield StreamResponse(error_message=str(error))

    async def _events(
        self, request: Any, body: bytes, context: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        parts: asyncio.Queue[bytes | None] = asyncio.Queue(_PARTS_MAX)
        answer = _Collected(parts)

        async def work() -> None:
            try:
                await self._ask(request, body, context, answer.take)
            finally:
                await parts.put(None)

        task = asyncio.ensure_future(work())
        buffer = b""
        try:
            while (part := await parts.get()) is not None:
                buffer += part
                *events, buffer = buffer.split(b"\n\n")
                for event in events:
                    found = _event(event)
                    if found is not None:
                        yield found
            await task
        finally:
            task.cancel()

    async def _ask(
        self,
        request: Any,
        body: bytes,
        context: Any,
        take: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """As if it had come over HTTP. Raises InferError."""
        headers = [
            (name.lower().encode(), value.encode())
            for name, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        ]
        if request.id:
            headers.append((b"x-request-id", request.id.encode()))
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        sent = False

        async def receive() -> MutableMapping[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # a client that leaves cancels this call
            raise AssertionError

        await self._completions(scope, receive, take)


class _Collected:
    """An answer over ASGI; of a stream the parts go to a queue."""

    def __init__(self, parts: asyncio.Queue[bytes | None] | None = None) -> None:
        self._parts = parts
        self._status = 0
        self._body: list[bytes] = []

    async def take(self, said: MutableMapping[str, Any]) -> None:
        if said["type"] == "http.response.start":
            self._status = said["status"]
            return
        data = said.get("body", b"")
        if self._parts is not None and self._status < 400:
            if data:
                await self._parts.put(data)
            return
        self._body.append(data)
        if self._parts is not None and not said.get("more_body", False):
            self.json()

    def json(self) -> dict[str, Any]:
        """Raises InferError."""
        body = b"".join(self._body)
        try:
            found: dict[str, Any] = msgspec.json.decode(body)
        except msgspec.DecodeError as error:
            raise InferError(502, f"the engine's answer is no JSON: {error}") from error
        if self._status >= 400:
            raise InferError(self._status, str(found.get("error", {}).get("message", found)))
        return found


def _event(event: bytes) -> dict[str, Any] | None:
    """None for what says nothing: the end, a comment, the usage. Raises InferError."""
    if not event.startswith(b"data: ") or event == b"data: [DONE]":
        return None
    found: dict[str, Any] = msgspec.json.decode(event[6:])
    if "error" in found:
        raise InferError(502, str(found["error"].get("message")))
    return found if found.get("choices") else None


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except InferError as error:
            await context.abort(error.code, str(error))

    return call


def _completion_of(request: Any, *, stream: bool) -> bytes:
    """The body of a completion. Raises InferError."""
    text = _input(request, "text_input")
    if text is None:
        raise InferError(400, "there is no input text_input of datatype BYTES with one element")
    found: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(parameter, kind)
    try:
        prompt = text.decode()
    except UnicodeDecodeError as error:
        raise InferError(400, f"text_input is no UTF-8: {error}") from error
    given = {**found, "model": request.model_name, "prompt": prompt, "stream": stream}
    return msgspec.json.encode(given)


def _streaming(request: Any) -> bool:
    """Unless the request says otherwise, what is asked on a stream is streamed."""
    found = _input(request, "streaming")
    return found is None or found != b"\0"


def _input(request: Any, name: str) -> bytes | None:
    """The one element of an input, by whichever of the two ways it was sent."""
    for index, tensor in enumerate(request.inputs):
        if tensor.name != name:
            continue
        if request.raw_input_contents:
            if index >= len(request.raw_input_contents):
                return None
            return _raw(request.raw_input_contents[index], _INPUTS[name])
        if tensor.contents.bytes_contents:
            return bytes(tensor.contents.bytes_contents[0])
        if tensor.contents.bool_contents:
            return bytes([tensor.contents.bool_contents[0]])
    return None


def _raw(data: bytes, kind: str) -> bytes | None:
    """An element of BYTES is its length, as four little-endian bytes, and itself."""
    if kind != "BYTES":
        return data
    if len(data) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(data)
    text = data[_LENGTH.size :]
    return text if len(text) == length else None


def _response(request: Any, answer_id: str, text: str, finish_reason: str | None) -> Any:
    made = Response(model_name=request.model_name, model_version="1", id=request.id or answer_id)
    for name, value in zip(_OUTPUTS, (text, finish_reason or ""), strict=True):
        made.outputs.add(name=name, datatype="BYTES", shape=[1])
        encoded = value.encode()
        made.raw_output_contents.append(_LENGTH.pack(len(encoded)) + encoded)
    return made


async def start_server(
    service: InferenceService, host: str, port: int, *, bytes_max: int, tls: ServerTls | None = None
) -> grpc.aio.Server:
    """Listening. Raises ListenError."""
    options = [("grpc.max_receive_message_length", bytes_max), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((service.handlers(),))
    address = f"{host}:{port}"
    try:
        if tls is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, _credentials(tls))
    except (RuntimeError, OSError) as error:
        raise ListenError(f"the kserve server cannot listen on {address}: {error}") from error
    await server.start()
    return server


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Raises OSError."""
    pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    authority = None if tls.client_ca is None else tls.client_ca.read_bytes()
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authority, require_client_auth=authority is not None
    )
