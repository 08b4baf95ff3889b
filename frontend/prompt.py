"""The tokens that a request begins with, as the engine will see them: what it is routed by.

They need not be right for the answer to be: in pass-through the engine makes its own. Where they
are not known (no tokenizer here, an image whose tokens only the engine knows) the request is
routed by what is known, at the worst by load alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from frontend.encoder import Tokens
from frontend.errors import bad_request
from frontend.request import ChatRequest, CompletionRequest, Content
from frontend.template import ChatTemplate, TemplateError
from frontend.tokenizer import CACHE_BYTES, Tokenizer

NO_TOKENS: Tokens = np.empty(0, np.uint32)
_TOKEN_MAX: Final = (1 << 32) - 1
_TEXT_PARTS: Final = frozenset(("text", "input_text", "output_text"))  # chat, then responses


class PromptMaker:
    """Of one model. Not thread-safe, as its tokenizer is not."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.template = template

    @classmethod
    def load(cls, folder: Path, cache_bytes: int = CACHE_BYTES) -> PromptMaker:
        """From a model's folder. Raises TokenizerError or TemplateError."""
        return cls(Tokenizer.load(folder, cache_bytes=cache_bytes), ChatTemplate.load(folder))

    def of_chat(self, request: ChatRequest) -> Tokens:
        """Raises ApiError if the template refuses the messages."""
        return self.tokenizer.encode(
            self.chat_text(request), add_special_tokens=request.add_special_tokens
        )

    def chat_text(self, request: ChatRequest) -> str:
        """The messages as the model's template writes them. Raises ApiError."""
        if self.template is None:
            raise bad_request("The model has no chat template", "messages", "no_chat_template")
        if not request.messages:
            raise bad_request("There must be at least one message", "messages", "empty")
        try:
            return self.template.render(
                [_with_text(message) for message in request.messages],
                tools=request.tools,
                add_generation_prompt=request.add_generation_prompt,
                kwargs=request.template_kwargs,
            )
        except TemplateError as error:
            raise bad_request(str(error), "messages", "chat_template") from error

    def of_completion(self, request: CompletionRequest) -> list[Tokens]:
        """One for each prompt. Raises ApiError if a token is none."""
        prompt = request.prompt
        if prompt is None:
            return [NO_TOKENS]
        if isinstance(prompt, str):
            return [self._of_text(prompt, request)]
        if not prompt:
            raise bad_request("There must be at least one prompt", "prompt", "empty")
        if isinstance(prompt[0], int):
            return [of_ids(prompt)]
        return [
            self._of_text(one, request) if isinstance(one, str) else of_ids(one) for one in prompt
        ]

    def _of_text(self, text: str, request: CompletionRequest) -> Tokens:
        return self.tokenizer.encode(text, add_special_tokens=request.add_special_tokens)


def has_only_text(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Images and the like become tokens at the engine alone."""
    return all(
        part.get("type") in _TEXT_PARTS
        for message in messages
        if isinstance(content := message.get("content"), list)
        for part in content
    )


def of_ids(ids: Any) -> Tokens:
    """Of a prompt given as tokens. Raises ApiError."""
    if not isinstance(ids, list) or not all(_is_token(one) for one in ids):
        raise bad_request(
            "A prompt is a text, or tokens: numbers from 0 to 2^32 - 1", "prompt", "invalid_value"
        )
    return np.array(ids, dtype=np.uint32)


def _is_token(given: Any) -> bool:
    return isinstance(given, int) and 0 <= given <= _TOKEN_MAX


def _with_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """With parts of text as one text, which is what most templates expect."""
    content: Content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part.get("text") or "" for part in content if part.get("type") in _TEXT_PARTS]
    return {**message, "content": "\n".join(texts)}
