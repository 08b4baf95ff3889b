"""Text to token ids: by the quicker library where it gives what the slower one gives.

`tokenizers` is what engines use, so what it gives is right. `fastokens` is quicker with the BPE
tokenizers that it knows. It is used for a tokenizer only after both have agreed on samples, and one
piece of text in `CHECK_EVERY`, unless it is long, is given to both from then on: should they ever
differ, the slower one has the tokenizer for good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import structlog
from fastokens import Tokenizer as QuickTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

Tokens = NDArray[np.uint32]

CHECK_EVERY: Final = 1024
CHECKED_CHARS_MAX: Final = 8192
"""Of a longer text the slower library would hold up other requests for milliseconds."""

SAMPLE: Final = (
    "It's a quiet morning  in Zürich, 2026: 3,141 swallows don't wait -- they fly over the Limmat\t"
    "and back; naïve readers won't notice (should they?). Über den Wolken muss die Freiheit wohl "
    "grenzenlos sein. Каждый охотник желает знать. 我们今天去图书馆 and then home again. "
)
_ODD: Final = (
    "",
    " ",
    "   \n\n\t \r\n  x  ",
    "I'LL we'Ve THEY'RE o'clock ''' \"quoted\"",
    "1 12 123 1234 12345678 3.14e-10 0x1F ١٢٣ ½ ²",
    "a\u0301 é ﬁ İ ß \u00a0 \u2028 \u200d \x00 \ufeff \ufffd",
    "👩‍👩‍👧 🇨🇭 한국어 हिन्दी עברית العربية ไทย",
    "def f(x):\n        return {'a': [x, -1]}  # ok\n\n\n\n",
    "=" * 200 + "a" * 300 + "\n" * 50 + " " * 300,
)

_log = structlog.get_logger("kvbm.frontend")


class Encoder:
    """Not thread-safe. `on_wrong` is called when what was given before may have been wrong."""

    def __init__(self, fast: FastTokenizer, on_wrong: Callable[[], None]) -> None:
        self._fast = fast
        self._on_wrong = on_wrong
        self._until_check = CHECK_EVERY
        self._quick = _quick(fast)

    @property
    def is_quick(self) -> bool:
        return self._quick is not None

    def encode(self, text: str) -> Tokens:
        """Without the tokens that the model puts around a text; special ones are recognised."""
        if self._quick is None:
            return self._slowly(text)
        try:
            ids, _ = self._quick.encode_batch_flat([text])
        except (ValueError, RuntimeError):  # a pattern's limits, which the other has not
            return self._slowly(text)
        tokens = np.frombuffer(ids, np.uint32)
        self._until_check -= 1
        if self._until_check <= 0 and len(text) <= CHECKED_CHARS_MAX:
            self._until_check = CHECK_EVERY
            right = self._slowly(text)
            if not np.array_equal(tokens, right):
                _log.error("tokenizers_differ", characters=len(text), meant="the slower is used")
                self._quick = None
                self._on_wrong()
                return right
        return tokens

    def _slowly(self, text: str) -> Tokens:
        [found] = self._fast.encode_batch_fast([text], add_special_tokens=False)
        return np.array(found.ids, dtype=np.uint32)


def _quick(fast: FastTokenizer) -> QuickTokenizer | None:
    """None where the quicker library does not know such a tokenizer, or gives something else."""
    try:
        made = QuickTokenizer.from_json_str(fast.to_str())
        special = [t.content for t in fast.get_added_tokens_decoder().values()]
        texts = [SAMPLE, *_ODD, *special, *(f" {t}user\n{SAMPLE}{t}{t} " for t in special[:64])]
        for text in texts:
            if made.encode(text).ids != fast.encode(text, add_special_tokens=False).ids:
                return None
    except (ValueError, RuntimeError):
        return None
    return made
