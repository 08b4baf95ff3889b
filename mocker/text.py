"""Made-up text of made-up tokens: four bytes each, both ways.

A token of an answer is a blank and three letters. A prompt is cut every four bytes; four bytes that
are a token's text are that token, others a token of their own. So a conversation that is sent back
with its answers is found in the cache, whatever was said in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

LETTERS: Final = b"abcdefghijklmnopqrstuvwxyz012345"
VOCABULARY: Final = len(LETTERS) ** 3
TOKEN_BYTES: Final = 4
_BLANK: Final = ord(" ")


def _texts() -> list[bytes]:
    return [b" %c%c%c" % (a, b, c) for a in LETTERS for b in LETTERS for c in LETTERS]


TEXTS: Final = _texts()
_NUMBER_OF = np.full(256, 255, np.uint32)
_NUMBER_OF[np.frombuffer(LETTERS, np.uint8)] = np.arange(len(LETTERS))


def tokens_of(text: str) -> list[int]:
    """At least one; a last piece that is shorter is filled up."""
    data = text.encode("utf-8", "surrogatepass")
    data = data.ljust(max(-(-len(data) // TOKEN_BYTES) * TOKEN_BYTES, TOKEN_BYTES), b"\0")
    pieces = np.frombuffer(data, np.uint8).reshape(-1, TOKEN_BYTES)
    numbers = _NUMBER_OF[pieces[:, 1:]]
    known = (pieces[:, 0] == _BLANK) & (numbers < len(LETTERS)).all(axis=1)
    ours = (numbers[:, 0] * len(LETTERS) + numbers[:, 1]) * len(LETTERS) + numbers[:, 2]
    others = pieces.view("<u4")[:, 0].astype(np.uint32) | np.uint32(1 << 31)
    tokens: list[int] = np.where(known, ours, others).tolist()
    return tokens


def text_of(tokens: Iterable[int]) -> str:
    return b"".join(TEXTS[token % VOCABULARY] for token in tokens).decode()


def conversation(messages: Sequence[tuple[str, str]]) -> str:
    """Roles and what they said, each beginning at a token of its own, up to the answer to come."""
    return "".join([*(_padded(f"<{role}>") + _padded(said) for role, said in messages), _ANSWER])


def _padded(text: str) -> str:
    return text + "\0" * (-len(text.encode("utf-8", "surrogatepass")) % TOKEN_BYTES)


_ANSWER: Final = _padded("<assistant>")
