"""Tokens as they come, to text as it can be given out.

A character may take several tokens, and a stop string may begin in one and end in another: what
could still change is held back until the next token, or the end, settles it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream


class TextOut:
    """One choice's. `stopped` once a stop string was found; nothing comes after it."""

    def __init__(
        self,
        tokenizer: FastTokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = [one for one in stop if one]
        self._include_stop = include_stop
        self._held = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """What can be given out after these tokens."""
        if self.stopped is not None:
            return ""
        step, tokenizer = self._stream.step, self._tokenizer
        fresh = "".join([step(tokenizer, token) or "" for token in tokens])
        if not self._stop:
            return fresh
        text = self._held + fresh
        found = min(
            ((text.find(one), one) for one in self._stop if one in text),
            key=lambda place: place[0],
            default=None,
        )
        if found is not None:
            at, self.stopped = found
            self._held = ""
            return text[: at + len(self.stopped) if self._include_stop else at]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, at the end of the tokens."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(one.startswith(tail) for one in self._stop):
                return length
        return 0
