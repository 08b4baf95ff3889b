"""Byte-level BPE of ASCII texts, several times as fast as the tokenizer it was taken from.

Most models' tokenizers are of this kind: a pattern cuts a text into words, and in each word the
pair of tokens with the lowest rank becomes one, until none is left that may. `tokenizers` spends
most of its time on what only other texts and other kinds need. Here the words are found by Python's
`re`, whose order of trial is the same, with the pattern's classes narrowed to ASCII; merging is
compiled. What is not understood in full (another kind, a text beyond ASCII, a long word) is left
to the tokenizer: `encode` says None.

Sources: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units",
2016; the format of `tokenizer.json` as `tokenizers` writes it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

Tokens = NDArray[np.uint32]

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the pre-tokenizer `ByteLevel` cuts by, where it is told to cut."""

_BLANKS: Final = r"\t\n\x0b\x0c\r "
_ASCII: Final = {
    **{rf"\p{{{kind}}}": "" for kind in ("M", "Mn", "Lt", "Lm", "Lo")},
    **dict.fromkeys((r"\p{N}", r"\p{Nd}", r"\d"), "0-9"),
    r"\p{L}": "A-Za-z",
    r"\p{Lu}": "A-Z",
    r"\p{Ll}": "a-z",
    r"\s": _BLANKS,
}
_PART: Final = re.compile(r"\\p\{\w+\}|\\.|\[\^?|.", re.DOTALL)
_SAME: Final = re.compile(r"\\[nrt/\W]")  # escapes that mean the same in both
_UNLIKE: Final = re.compile(r"&&|\(\?(?![:=!i])")  # what is another thing, or nothing, in `re`

# Each byte is a character: printable ones themselves, the others in order from U+0100 (GPT-2).
_PRINTABLE: Final = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
_CHARACTER_OF: Final = {byte: character for character, byte in BYTE_OF.items()}
_SAMPLES: Final = 64


class AsciiBpe:
    """`of` makes it, and says None for tokenizers of another kind."""

    def __init__(
        self,
        words: re.Pattern[str],
        model: Mapping[str, Any],
        added: Mapping[str, int],
        refused: Sequence[str],
    ) -> None:
        """`added` tokens stand for themselves; texts with a `refused` one are not encoded."""
        from frontend.bpe_kernel import encode  # compiled only for who has such a tokenizer

        vocabulary: Mapping[str, int] = model["vocab"]
        self._encode = encode
        self._words = words
        self._added = added
        self._find_added = _any_of(list(added))
        self._find_refused = _any_of(refused)
        self._of_byte = np.zeros(256, dtype=np.uint32)
        for byte, character in _CHARACTER_OF.items():
            self._of_byte[byte] = vocabulary.get(character, 0)
        self._table = _table(vocabulary, model["merges"])
        self._whole: frozenset[str] = frozenset()  # words that are tokens, whatever merging says
        if model.get("ignore_merges"):
            self._whole = frozenset(self._not_merged(vocabulary))

    @classmethod
    def of(cls, fast: FastTokenizer) -> Self | None:
        made = json.loads(fast.to_str())
        words = _words(made)
        if words is None or fast.truncation or fast.padding or fast.encode_special_tokens:
            return None
        added: dict[str, int] = {}
        refused = []
        for token, about in fast.get_added_tokens_decoder().items():
            if about.lstrip or about.rstrip or about.single_word or about.normalized:
                refused.append(about.content)
            else:
                added[about.content] = token
        found = cls(words, made["model"], added, refused)
        return found if found._agrees(fast) else None

    def encode(self, text: str) -> Tokens | None:
        """Its tokens; None: it is not for this to say."""
        if not text.isascii() or (self._find_refused and self._find_refused.search(text)):
            return None
        words: list[str] = []
        lengths: list[int] = []
        start = added_length = 0
        for match in self._find_added.finditer(text) if self._find_added else ():
            found = self._words.findall(text, start, match.start())
            words += found
            lengths += map(len, found)
            lengths.append(~self._added[match[0]])
            start = match.end()
            added_length += start - match.start()
        found = self._words.findall(text, start)
        words += found
        lengths += map(len, found)
        data = "".join(words).encode()
        if len(data) + added_length != len(text):  # the pattern leaves something out
            return None
        if self._whole and not self._whole.isdisjoint(words):
            return None
        return self._merged(data, lengths)

    def _merged(self, data: bytes, lengths: list[int]) -> Tokens | None:
        out = np.empty(len(data) + len(lengths), dtype=np.uint32)
        count = self._encode(
            self._table,
            self._of_byte,
            np.frombuffer(data, dtype=np.uint8),
            np.array(lengths, dtype=np.int64),
            out,
        )
        return None if count < 0 else out[:count].copy()

    def _not_merged(self, vocabulary: Mapping[str, int]) -> Iterator[str]:
        """Tokens that are words of their own, and that merging would not make."""
        for token, number in vocabulary.items():
            data = bytes(BYTE_OF.get(character, 0xFF) for character in token)
            if data.isascii():
                merged = self._merged(data, [len(data)])
                if merged is None or merged.tolist() != [number]:
                    yield data.decode()

    def _agrees(self, fast: FastTokenizer) -> bool:
        """Whether it says the same on samples as the tokenizer itself."""
        dice = random.Random(1)
        letters = [chr(code) for code in range(128)] + [*"aeiou  '\n0123"] * 4
        texts = ["".join(dice.choices(letters, k=64)) for _ in range(_SAMPLES)]
        texts += ["It's 3,141 swallows.\n\n\tThey  DON'T wait; they'll fly!  ", *self._added]
        return all(
            found is None or found.tolist() == fast.encode(text, add_special_tokens=False).ids
            for text, found in ((text, self.encode(text)) for text in texts)
        )


def _words(made: Mapping[str, Any]) -> re.Pattern[str] | None:
    """What cuts a text into words; None if the tokenizer is of a kind that is not done here."""
    model, normalizer, cutting = made["model"], made["normalizer"], made["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if normalizer is not None and normalizer["type"] != "NFC":  # which leaves ASCII as it is
        return None
    if any(_CHARACTER_OF[byte] not in model["vocab"] for byte in range(128)) or cutting is None:
        return None
    match cutting:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _narrowed(_GPT2)
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return _narrowed(pattern)
    return None


def _narrowed(pattern: str) -> re.Pattern[str] | None:
    """The pattern for ASCII texts; None if it has something whose meaning is not known here."""
    parts: list[str] = []
    in_class = False
    for part in _PART.findall(pattern):
        if part in _ASCII:
            parts.append(_ASCII[part] if in_class else f"[{_ASCII[part]}]")
        elif part == r"\S" and not in_class:
            parts.append(f"[^{_BLANKS}]")
        elif part[0] == "\\" and not _SAME.fullmatch(part):
            return None
        else:
            if part[0] == "[" and in_class:
                return None  # a class in a class
            in_class = (in_class or part[0] == "[") and part != "]"
            parts.append(part)
    narrowed = "".join(parts)
    if _UNLIKE.search(narrowed):
        return None
    try:
        found = re.compile(narrowed)
    except re.error:
        return None
    return None if found.groups else found


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    """The longest that is there."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _table(vocabulary: Mapping[str, int], merges: Sequence[str | Sequence[str]]) -> Any:
    """Of pairs of tokens: rank and what they become. See `frontend.bpe_kernel`."""
    from frontend.bpe_kernel import fill

    pairs = np.empty(len(merges), dtype=np.uint64)
    become = np.empty(len(merges), dtype=np.uint64)
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs[rank] = vocabulary[left] << 32 | vocabulary[right]
        become[rank] = rank << 32 | vocabulary[left + right]
    table = np.full(4 << max(len(merges), 1).bit_length(), (1 << 64) - 1, dtype=np.uint64)
    fill(table, pairs, become)
    return table
