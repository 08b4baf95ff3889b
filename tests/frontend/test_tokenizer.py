"""Tokens of a text in pieces are the tokens of the whole, for tokenizers of every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from frontend import encoder
from frontend.encoder import CHECK_EVERY
from frontend.tokenizer import Tokenizer, TokenizerError

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "[UNK]"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, doesn't it? 12345 times",
    "naïve Zürich 图书馆 Каждый охотник желает знать где сидит фазан",
    "def main(argv):\n    return [x for x in argv if x]\n\n\nmain(['a', 'b'])\n",
] * 20


def byte_level() -> FastTokenizer:
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def crossing_words() -> FastTokenizer:
    """Byte-level without words: tokens learn to reach over spaces."""
    made = FastTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


WORDS_OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern: str, normalizer: normalizers.Normalizer | None = None) -> FastTokenizer:
    made = FastTokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def metaspace(scheme: str) -> FastTokenizer:
    made = FastTokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def prepending() -> FastTokenizer:
    """As Llama 2 has it: a space is put before whatever text is given."""
    made = metaspace("never")
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return made


def unigram() -> FastTokenizer:
    made = FastTokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def word_piece() -> FastTokenizer:
    made = FastTokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


FAMILIES: dict[str, Callable[[], FastTokenizer]] = {
    "byte-level": byte_level,
    "as Llama 3": lambda: split_by(WORDS_OF_LLAMA_3),
    "as Qwen": lambda: split_by(WORDS_OF_LLAMA_3.replace("{1,3}", ""), normalizers.NFC()),
    "crossing words": crossing_words,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "prepending": prepending,
    "unigram": unigram,
    "word piece": word_piece,
}
MADE = {name: Tokenizer(make()) for name, make in FAMILIES.items()}
WORDS = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "the",
        " quick",
        "fox ",
        "ü",
        "a\u0301",
        "图书馆",
        "don't",
        "42",
        "?!",
        *SPECIAL,
    ]
)
TEXTS = st.lists(WORDS | st.text(max_size=6), max_size=400).map("".join)


@pytest.mark.parametrize("name", FAMILIES)
@given(text=TEXTS, more=TEXTS)
@example(text="the fox " * 100, more=" and on")
@settings(deadline=None, max_examples=60)
def test_pieces_give_the_tokens_of_the_whole(name: str, text: str, more: str) -> None:
    tokenizer = MADE[name]
    for given_text in (text, text + more, text):
        whole = tokenizer.fast.encode(given_text, add_special_tokens=False).ids
        assert tokenizer.encode(given_text).tolist() == whole


@pytest.mark.parametrize(
    ("name", "cuts"), [("byte-level", True), ("metaspace first", True), ("word piece", True)]
)
def test_families_in_use_are_cut(name: str, cuts: bool) -> None:
    assert MADE[name].cuts is cuts


@pytest.mark.parametrize(
    ("name", "quick"),
    [("byte-level", True), ("as Llama 3", True), ("as Qwen", True), ("unigram", False)],
)
def test_the_quicker_library_has_what_it_knows(name: str, quick: bool) -> None:
    assert MADE[name].is_quick is quick


class Wrong:
    """A quick library that is right about all that is tried when a tokenizer is loaded."""

    def __init__(self, right: FastTokenizer) -> None:
        self._right = right
        self.refuses = False

    def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        if self.refuses:
            raise ValueError("match limit exceeded")
        [text] = texts
        ids = self._right.encode(text, add_special_tokens=False).ids
        return np.array([one + 1 for one in ids], np.uint32).tobytes(), b""


def test_a_library_that_is_wrong_is_found_out_and_what_it_gave_is_forgotten() -> None:
    fast = byte_level()
    tokenizer = Tokenizer(fast)
    tokenizer._encoder._quick = Wrong(fast)
    text = "the quick brown fox jumps over the lazy dog " * 40
    right = fast.encode(text, add_special_tokens=False).ids
    for _ in range(CHECK_EVERY):
        if tokenizer.encode(text).tolist() == right:
            break
    assert not tokenizer.is_quick
    assert tokenizer.encode(text).tolist() == right


def test_what_the_quicker_library_refuses_the_slower_one_encodes() -> None:
    fast = byte_level()
    tokenizer = Tokenizer(fast)
    refusing = tokenizer._encoder._quick = Wrong(fast)
    refusing.refuses = True
    text = "the quick brown fox " * 40
    assert tokenizer.encode(text).tolist() == fast.encode(text, add_special_tokens=False).ids
    assert tokenizer.is_quick


def test_a_library_that_differs_on_samples_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = split_by(r"\w")

    class Other:
        @staticmethod
        def from_json_str(text: str) -> FastTokenizer:
            return other

    monkeypatch.setattr(encoder, "QuickTokenizer", Other)
    assert not Tokenizer(byte_level()).is_quick


def test_a_file_that_says_to_cut_off_is_not_heeded() -> None:
    fast = byte_level()
    fast.enable_truncation(max_length=8)
    fast.enable_padding(length=64)
    text = "the quick brown fox " * 100
    assert Tokenizer(fast).encode(text).tolist() == byte_level_once().encode(text).ids


def test_a_tokenizer_that_puts_a_space_before_every_text_is_not_cut() -> None:
    assert not MADE["prepending"].cuts


def test_words_that_tokens_cross_are_no_places_to_cut() -> None:
    crossing = MADE["crossing words"]
    text = "the quick brown fox jumps over the lazy dog " * 40
    crossing.encode(text)
    assert crossing.status().pieces == 0


def test_a_conversation_that_has_grown_costs_what_is_new() -> None:
    tokenizer = Tokenizer(byte_level())
    text = "the quick brown fox jumps over the lazy dog " * 100
    first = tokenizer.encode(text)
    before = tokenizer.status()
    grown = tokenizer.encode(text + "and runs away")
    after = tokenizer.status()
    hits = after.hit_tokens_total - before.hit_tokens_total
    assert hits > 0.9 * len(first)
    assert hits + after.miss_tokens_total - before.miss_tokens_total == len(grown)


def test_what_is_remembered_is_bounded() -> None:
    tokenizer = Tokenizer(byte_level(), cache_bytes=20_000)
    for number in range(50):
        tokenizer.encode(f"{number} " + f"the fox of number {number} jumps " * 40)
        assert tokenizer.status().used_bytes <= 20_000
    assert tokenizer.status().pieces > 0
    kept = sum(2 * len(p) + t.nbytes + 400 for p, t in tokenizer._pieces.items())
    assert kept == tokenizer.status().used_bytes


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("template", ["<s> $A", "$A <|im_end|>", "<s> $A <|im_end|>", "$A"])
@given(text=TEXTS)
@settings(deadline=None, max_examples=20)
def test_special_tokens_of_the_model_come_where_they_are_asked_for(
    template: str, text: str
) -> None:
    fast = byte_level_once()
    special = [(token, fast.token_to_id(token)) for token in SPECIAL]
    fast.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    tokenizer = Tokenizer(fast)
    assert tokenizer.encode(text, add_special_tokens=True).tolist() == fast.encode(text).ids
    plain = fast.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text).tolist() == plain


@cache
def byte_level_once() -> FastTokenizer:
    return byte_level()
