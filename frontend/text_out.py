"""Tokens as they come, to text as it can be given out.

A character may take several tokens, and a stop string may begin in one and end in another: what
could still change is held back until the next token, or the end, settles it. The text is the one
that vLLM makes of the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS: Final = 8
"""Of the prompt's end: whether the first token begins with a space depends on what it follows."""


class TextOut:
    """One choice's. `stopped` once a stop string was found; nothing comes after it.

    Up to `min_tokens` stop strings do not count.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        stop: Sequence[str] = (),
        *,
        prompt: Sequence[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.stopped: str | None = None
        self.tokens = 0  # that were taken: none behind a stop string
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = self._after(list(prompt[-CONTEXT_TOKENS:]))
        self._stop = [one for one in stop if one]
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._held = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """What can be given out after these tokens."""
        if not self._stop:
            self.tokens += len(tokens)
            return "".join([self._decoded(token) for token in tokens])
        said = ""
        for token in tokens:
            if self.stopped is not None:
                break
            self.tokens += 1
            said += self._up_to_stop(self._decoded(token))
        return said

    def end(self) -> str:
        """What was held back, at the end of the tokens."""
        held, self._held = self._held, ""
        return held

    def _after(self, context: list[int]) -> DecodeStream:
        skip = self._skip_special_tokens
        if context and self._tokenizer.decode(context, skip_special_tokens=skip).endswith("\ufffd"):
            context = []  # half a character: the stream would give out all of it again
        return DecodeStream(ids=context, skip_special_tokens=skip)

    def _decoded(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception as error:  # the library raises nothing narrower
            if not str(error).startswith("Invalid prefix"):
                raise
            # Bytes that are no text at all: what they are shown as has changed in hindsight.
            self._stream = self._after([])
            return self._stream.step(self._tokenizer, token) or ""

    def _up_to_stop(self, fresh: str) -> str:
        text = self._held + fresh
        if self.tokens > self._min_tokens and (found := self._first_stop(text)) is not None:
            at, self.stopped = found
            self._held = ""
            return text[: at + len(self.stopped) if self._include_stop else at]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """The stop string that ends first, and not in what was held back."""
        held = len(self._held)
        found = [
            (at + len(one), at, one)
            for one in self._stop
            if (at := text.find(one, max(held - len(one) + 1, 0))) >= 0
        ]
        return min(found)[1:] if found else None

    def _undecided(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(one.startswith(tail) for one in self._stop):
                return length
        return 0
