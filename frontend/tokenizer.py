"""Text to tokens, where a conversation that has grown costs only what is new.

A text is cut into pieces at places where its tokenizer begins a new word whatever stands around
them, and each piece's tokens are remembered. Where to cut depends on the text before alone, so
equal beginnings have equal pieces. Two kinds of places are used, both `_PIECE_CHARS` or more after
the last: before a special token, which every tokenizer splits off first, and between a letter and a
space before another letter. That no token crosses such a place is looked up in the vocabulary, and
that pieces and whole agree is tried out on samples, when the tokenizer is loaded; one that fails
either is never cut, only slower.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from frontend.encoder import SAMPLE, Encoder, Tokens

CACHE_BYTES: Final = 64 << 20
_PIECE_CHARS: Final = 256
_ENTRY_BYTES: Final = 400  # what a remembered piece takes besides its characters and tokens
_WORDS: Final = r"(?<=[^\W\d_])(?= [^\W\d_])"


class TokenizerError(Exception):
    """The tokenizer cannot be loaded; the message says from where, and why."""


@dataclass(frozen=True, slots=True)
class CacheStatus:
    hit_tokens_total: int
    miss_tokens_total: int
    pieces: int
    used_bytes: int


class Tokenizer:
    """A model's tokenizer. Not thread-safe. `cache_bytes` bounds what is remembered."""

    def __init__(self, fast: FastTokenizer, *, cache_bytes: int = CACHE_BYTES) -> None:
        fast.no_truncation()  # a tokenizer's file may have what somebody trained with
        fast.no_padding()
        self._fast = fast
        self._encoder = Encoder(fast, self._forget)
        self._cache_bytes = cache_bytes
        self._pieces: OrderedDict[str, Tokens] = OrderedDict()
        self._used_bytes = 0
        self._hit_tokens_total = 0
        self._miss_tokens_total = 0
        self._cut = _cut_pattern(fast)
        if self._cut is not None and not self._agrees():
            self._cut = None
        self._forget()
        self._around = self._specials()

    @classmethod
    def load(cls, folder: Path, *, cache_bytes: int = CACHE_BYTES) -> Tokenizer:
        """From a model's `tokenizer.json`. Raises TokenizerError."""
        path = folder / "tokenizer.json"
        try:
            return cls(FastTokenizer.from_file(str(path)), cache_bytes=cache_bytes)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path}: {error}") from error

    @property
    def cuts(self) -> bool:
        """Whether texts are cut, so that beginnings are remembered."""
        return self._cut is not None

    @property
    def is_quick(self) -> bool:
        """Whether the quicker of two libraries encodes; see `frontend.encoder`."""
        return self._encoder.is_quick

    @property
    def fast(self) -> FastTokenizer:
        return self._fast

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Tokens:
        """The tokens of a text. Special tokens written in it are recognised."""
        if not add_special_tokens:
            return self._plain(text)
        if self._around is None:
            return _ids(self._fast.encode_batch_fast([text])[0].ids)
        before, after = self._around
        return np.concatenate([before, self._plain(text), after])

    def _plain(self, text: str) -> Tokens:
        *pieces, last = self._split(text)
        was_quick = self._encoder.is_quick
        parts: list[Tokens] = []
        for piece in pieces:
            tokens = self._pieces.get(piece)
            if tokens is None:
                tokens = self._encoder.encode(piece)
                self._miss_tokens_total += len(tokens)
            else:
                self._hit_tokens_total += len(tokens)
            self._remember(piece, tokens)
            parts.append(tokens)
        tokens = self._encoder.encode(last)  # grows with the conversation: another one next time
        self._miss_tokens_total += len(tokens)
        if self._encoder.is_quick != was_quick:
            return self._plain(text)  # the parts before are as doubtful
        return np.concatenate([*parts, tokens]) if parts else tokens

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._fast.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def status(self) -> CacheStatus:
        return CacheStatus(
            self._hit_tokens_total, self._miss_tokens_total, len(self._pieces), self._used_bytes
        )

    def _split(self, text: str) -> list[str]:
        if self._cut is None:
            return [text]
        pieces: list[str] = []
        start = 0
        while len(text) - start > _PIECE_CHARS:
            found = self._cut.search(text, start + _PIECE_CHARS)
            if found is None:
                break
            end = found.start()
            pieces.append(text[start:end])
            start = end
        pieces.append(text[start:])
        return pieces

    def _remember(self, piece: str, tokens: Tokens) -> None:
        """As the latest; also if it was forgotten meanwhile for other pieces of its text."""
        if piece in self._pieces:
            self._pieces.move_to_end(piece)
            return
        self._pieces[piece] = tokens
        self._used_bytes += _bytes_of(piece, tokens)
        while self._used_bytes > self._cache_bytes:
            self._used_bytes -= _bytes_of(*self._pieces.popitem(last=False))

    def _forget(self) -> None:
        self._pieces.clear()
        self._used_bytes = self._hit_tokens_total = self._miss_tokens_total = 0

    def _specials(self) -> tuple[Tokens, Tokens] | None:
        """What the model puts before and after a text; None if that depends on the text."""
        found: set[tuple[tuple[int, ...], tuple[int, ...]] | None] = set()
        for text in ("a", SAMPLE):
            plain = self._fast.encode(text, add_special_tokens=False).ids
            whole = self._fast.encode(text).ids
            starts = range(len(whole) - len(plain) + 1)
            at = next((n for n in starts if whole[n : n + len(plain)] == plain), None)
            found.add(None if at is None else (tuple(whole[:at]), tuple(whole[at + len(plain) :])))
        only = found.pop()
        return None if found or only is None else (_ids(only[0]), _ids(only[1]))

    def _agrees(self) -> bool:
        """Whether pieces and whole give the same on samples, with special tokens and without."""
        special = sorted(_special(self._fast))[:4]
        texts = [SAMPLE * 8, "\n".join([SAMPLE] * 6)]
        texts += [f"{token}user\n{SAMPLE * 3}{token}" * 3 for token in special]
        return all(
            len(self._split(text)) > 1
            and np.array_equal(
                self.encode(text), self._fast.encode(text, add_special_tokens=False).ids
            )
            for text in texts
        )


def _cut_pattern(fast: FastTokenizer) -> re.Pattern[str] | None:
    """Where a text may be cut; None: nowhere."""
    special = _special(fast)
    added = {token.content for token in fast.get_added_tokens_decoder().values()}
    if any(re.search(_WORDS, text) for text in added):
        return None
    places = [] if _crosses_words(fast, added) else [_WORDS]
    places += [f"(?={re.escape(text)})" for text in sorted(special, key=len, reverse=True)]
    return re.compile("|".join(places)) if places else None


def _special(fast: FastTokenizer) -> set[str]:
    """Special tokens that are split off as they are written."""
    return {
        token.content
        for token in fast.get_added_tokens_decoder().values()
        if token.special and not (token.lstrip or token.rstrip or token.single_word)
    }


def _crosses_words(fast: FastTokenizer, added: set[str]) -> bool:
    """Whether some token has a letter, or part of one, then a space."""
    vocabulary = fast.get_vocab(with_added_tokens=False).keys() - added
    if "ByteLevel" in repr(fast.decoder):
        texts = (_of_bytes(token) for token in vocabulary)
    else:
        texts = (token.replace("▁", " ") for token in vocabulary)  # sentencepiece's space
    return any(_CROSSING.search(text) for text in texts)


def _of_bytes(token: str) -> str:
    """The text of a byte-level vocabulary's token; bytes that are no whole letter are U+FFFD.

    Each of its characters stands for a byte: printable ones for themselves, the others for those
    that are left, in order from U+0100 on (GPT-2's table).
    """
    return bytes(_BYTE_OF.get(character, 0xFF) for character in token).decode(errors="replace")


_CROSSING: Final = re.compile(r"(?:[^\W\d_]|\ufffd) ")
_PRINTABLE: Final = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


def _ids(ids: Sequence[int]) -> Tokens:
    return np.array(ids, dtype=np.uint32)


def _bytes_of(piece: str, tokens: Tokens) -> int:
    return 2 * len(piece) + tokens.nbytes + _ENTRY_BYTES
