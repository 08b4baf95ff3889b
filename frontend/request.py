"""What of an OpenAI request decides where it goes and what it costs; the rest is the engine's.

The body is decoded once, into the fields named here, and passed on as it came. So a field that is
new or the engine's own works without a word here. Fields that are named are checked: a wrong kind
of value is answered with which field it was and what it has to be.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec

from frontend.errors import INVALID_JSON, ApiError, bad_request

Content = str | list[dict[str, Any]] | None


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class RouterHints(msgspec.Struct, frozen=True):
    ttft_target: Annotated[float, msgspec.Meta(ge=0.0)] | None = None  # milliseconds
    itl_target: Annotated[float, msgspec.Meta(ge=0.0)] | None = None


class AgentHints(msgspec.Struct, frozen=True):
    priority: int | None = None


class Extension(msgspec.Struct, frozen=True):
    """What is read of `nvext`, NVIDIA's extension of OpenAI's API."""

    router: RouterHints | None = None
    agent_hints: AgentHints | None = None


class Sampled(msgspec.Struct, kw_only=True):
    """Common to requests that generate."""

    model: str = ""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    priority: int | None = None
    cache_salt: str | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    nvext: Extension | None = None

    @property
    def output_tokens_max(self) -> int | None:
        """What the request allows; None if it does not say."""
        return None


class ChatRequest(Sampled, kw_only=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the template is told besides the messages, as vLLM tells it."""
        told: dict[str, Any] = {"documents": self.documents}
        if self.reasoning_effort is not None:
            told["reasoning_effort"] = self.reasoning_effort
            told["enable_thinking"] = self.reasoning_effort != "none"
        return {**told, **(self.chat_template_kwargs or {})}

    @property
    def output_tokens_max(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None  # of tokens, all alike, or texts
    max_tokens: int | None = 16
    add_special_tokens: bool = True

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_tokens


class ResponsesRequest(Sampled, kw_only=True):
    """OpenAI's newer interface."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_output_tokens

    @property
    def as_chat(self) -> ChatRequest:
        """The messages that it comes to; what only the engine knows of is left out."""
        if isinstance(self.input, str):
            messages = [{"role": "user", "content": self.input}]
        else:
            messages = [item for item in self.input if "role" in item and "content" in item]
        if self.instructions:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        return ChatRequest(model=self.model, messages=messages, tools=self.tools)


class MessagesRequest(Sampled, kw_only=True):
    """Anthropic's interface."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None

    @property
    def output_tokens_max(self) -> int | None:
        return self.max_tokens

    @property
    def as_chat(self) -> ChatRequest:
        """Its tools are written in another way and left out."""
        messages = self.messages
        if self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        return ChatRequest(model=self.model, messages=messages)


class GenerateRequest(Sampled, kw_only=True):
    """vLLM's: tokens in, tokens out, for clients that have template and tokenizer themselves."""

    token_ids: list[int]
    sampling_params: dict[str, Any] | None = None

    @property
    def output_tokens_max(self) -> int | None:
        given = (self.sampling_params or {}).get("max_tokens")
        return given if isinstance(given, int) else None


class ModelRequest(msgspec.Struct, kw_only=True):
    """Of whatever else names a model: embeddings, scores, tokens of a text."""

    model: str = ""


R = TypeVar("R")

# As msgspec says it: what was expected, and behind " - at `$." where.
_PLACE = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)


def decode(decoder: msgspec.json.Decoder[R], body: bytes) -> R:
    """Raises ApiError: 400 with the field that is wrong."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The body is no JSON: {error}", code=INVALID_JSON) from error


def _refusal(said: str) -> ApiError:
    match = _PLACE.fullmatch(said)
    assert match is not None  # it matches any text
    what, where = match.groups()
    missing = re.fullmatch(r"Object missing required field `(.+)`", what)
    param = where or (missing and missing[1]) or None
    at = f" in {where!r}" if where else ""
    return bad_request(f"{what}{at}", param, "missing" if missing else "invalid_value")


chat_decoder = msgspec.json.Decoder(ChatRequest)
completion_decoder = msgspec.json.Decoder(CompletionRequest)
responses_decoder = msgspec.json.Decoder(ResponsesRequest)
messages_decoder = msgspec.json.Decoder(MessagesRequest)
generate_decoder = msgspec.json.Decoder(GenerateRequest)
model_decoder = msgspec.json.Decoder(ModelRequest)
