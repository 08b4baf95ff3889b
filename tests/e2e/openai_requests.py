"""What OpenAI's own client asks, and what it is answered but for ids and times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import openai

from examples.demo.client import SERVED_NAME
from tests.e2e.texts import prompt

Call = Callable[[Any], Any]
"""Of a client, blocking or not: an answer, or a stream of chunks."""

TEXT: Final = prompt("of OpenAI's client", 300)
MESSAGES: Final = [
    {"role": "system", "content": "Say what you know of swallows."},
    {"role": "user", "content": [{"type": "text", "text": TEXT}]},
    {"role": "assistant", "content": "They fly."},
    {"role": "user", "content": "Über den Wolken?"},
]
SCHEMA: Final = {
    "type": "object",
    "properties": {"bird": {"enum": ["swallow", "swift"]}, "flies": {"type": "boolean"}},
    "required": ["bird", "flies"],
    "additionalProperties": False,
}
TOOL: Final = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks it up", "parameters": SCHEMA},
}
_SEEDED: Final = {"temperature": 0.8, "seed": 7}
_VOLATILE: Final = frozenset(
    {"id", "created", "created_at", "completed_at", "item_id", "call_id", "response_id"}
)

CHATS: Final[Mapping[str, Mapping[str, Any]]] = {
    "greedy": {},
    "several choices": {"n": 2, **_SEEDED},
    "stop": {"stop": ["a", "e", "W"], "max_tokens": 60},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "a schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "bird", "schema": SCHEMA},
        }
    },
    "a tool": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "look_up"}},
    },
    "engine's own fields": {
        "extra_body": {"top_k": 5, "min_p": 0.01, "return_token_ids": True},
        **_SEEDED,
    },
}
COMPLETIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "greedy": {},
    "several prompts": {"prompt": [TEXT, "Another one"], "n": 2, **_SEEDED},
    "tokens": {"prompt": [84, 70, 66, 90] * 20},
    "stop": {"stop": "W", "max_tokens": 60},
    "logprobs": {"logprobs": 2},
    "one of two": {"extra_body": {"structured_outputs": {"choice": ["swallow", "swift"]}}},
}
REFUSED: Final[Mapping[str, Call]] = {
    "a temperature": lambda client: client.chat.completions.create(
        model=SERVED_NAME, messages=MESSAGES, temperature=7
    ),
    "a length": lambda client: client.completions.create(
        model=SERVED_NAME, prompt=TEXT, max_tokens=1_000_000
    ),
    "a tool that is not there": lambda client: client.chat.completions.create(
        model=SERVED_NAME,
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "another"}},
    ),
    "embeddings": lambda client: client.embeddings.create(model=SERVED_NAME, input=TEXT),
}


def calls(*, stream: bool) -> dict[str, Call]:
    """By what they are."""
    more: dict[str, Any] = {"stream": True} if stream else {}
    found: dict[str, Call] = {"response": _response(more)}
    if stream:
        more["stream_options"] = {"include_usage": True}
    found |= {f"chat, {name}": _chat({**given, **more}) for name, given in CHATS.items()}
    for name, given in COMPLETIONS.items():
        found[f"completion, {name}"] = _completion({**given, **more})
    return found


def told(answer: Any) -> Any:
    """An answer, or a chunk, without what differs each time."""
    return _lasting(answer.model_dump())


async def collected(made: Awaitable[Any]) -> Any:
    """Of the client that does not block: an answer, or all chunks of a stream."""
    answer = await made
    return [one async for one in answer] if isinstance(answer, openai.AsyncStream) else answer


def taken(answer: Any) -> Any:
    """What is told: of an answer, or of a stream's chunks, those of each choice in their order."""
    if isinstance(answer, openai.BaseModel):
        return told(answer)
    return sorted((told(chunk) for chunk in answer), key=_choice)


def said(answer: Any) -> dict[int, tuple[str, Any]]:
    """The text of each choice and why it ended, of an answer or all chunks of a stream."""
    texts: dict[int, str] = defaultdict(str)
    ends: dict[int, Any] = {}
    parts: Iterable[Any] = [answer] if isinstance(answer, openai.BaseModel) else answer
    for part in parts:
        for choice in part.choices:
            of_chat = getattr(choice, "message", None) or getattr(choice, "delta", None)
            text = of_chat.content if of_chat is not None else choice.text
            texts[choice.index] += text or ""
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    return {index: (texts[index], end) for index, end in ends.items()}


def refusal(error: openai.APIStatusError) -> tuple[int, Any]:
    return error.status_code, error.response.json()


def _choice(chunk: Mapping[str, Any]) -> int:
    """Which choice a chunk is of: engines take turns with them as it happens."""
    choices = chunk.get("choices")
    return choices[0]["index"] if choices else -1 if choices is None else 1 << 10


def _chat(given: Mapping[str, Any]) -> Call:
    asked = {"model": SERVED_NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
    return lambda client: client.chat.completions.create(**{**asked, **given})


def _completion(given: Mapping[str, Any]) -> Call:
    asked = {"model": SERVED_NAME, "prompt": TEXT, "temperature": 0, "max_tokens": 16}
    return lambda client: client.completions.create(**{**asked, **given})


def _response(given: Mapping[str, Any]) -> Call:
    return lambda client: client.responses.create(
        model=SERVED_NAME,
        input="Über den Wolken?",
        instructions=TEXT,
        temperature=0,
        max_output_tokens=16,
        **given,
    )


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(one) for name, one in value.items() if name not in _VOLATILE}
    if isinstance(value, list):
        return [_lasting(one) for one in value]
    return value
