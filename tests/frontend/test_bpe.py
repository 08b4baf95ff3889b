"""Tokens of ASCII texts are those of the tokenizer they were taken from, for patterns in use."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from frontend.bpe import AsciiBpe
from frontend.bpe_kernel import WORD_BYTES_MAX
from tests.frontend.test_tokenizer import CORPUS, FAMILIES, SPECIAL

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": None, "llama3": LLAMA3, "qwen2": QWEN2, "o200k": O200K}


@cache
def made(name: str) -> FastTokenizer:
    fast = FastTokenizer(models.BPE(ignore_merges=name == "llama3"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=PATTERNS[name] is None)
    fast.pre_tokenizer = level
    if (pattern := PATTERNS[name]) is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if name == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CORPUS, trainer)
    if name != "llama3":
        return fast
    # A token that no merges make: with `ignore_merges` it is a word's all the same.
    told = json.loads(fast.to_str())
    told["model"]["vocab"]["swallow"] = len(told["model"]["vocab"])
    return FastTokenizer.from_str(json.dumps(told))


@cache
def ours(name: str) -> AsciiBpe:
    found = AsciiBpe.of(made(name))
    assert found is not None
    return found


WORDS = st.sampled_from(
    ["the", " quick", "DON'T", "we'll", " 12345", "\r\n", "\n\n ", "  ", "swallow", "(?!", *SPECIAL]
)
TEXTS = st.lists(WORDS | st.text(st.characters(codec="ascii"), max_size=8), max_size=60)


@pytest.mark.parametrize("name", PATTERNS)
@settings(deadline=None, max_examples=200)
@given(parts=TEXTS)
@example(parts=["".join(map(chr, range(128)))])
@example(parts=["\x1c \x1d\x85", "<|im_start|>user\n", "<s>", " <s"])
def test_tokens_are_the_tokenizers_own(name: str, parts: list[str]) -> None:
    text = "".join(parts)
    found = ours(name).encode(text)
    expected = made(name).encode(text, add_special_tokens=False).ids
    if found is None:
        assert not text.isascii() or (name == "llama3" and "swallow" in text)
    else:
        assert found.tolist() == expected


def test_a_word_that_is_a_token_is_left_to_the_tokenizer() -> None:
    assert made("llama3").encode("swallow").ids == [len(made("llama3").get_vocab()) - 1]
    assert ours("llama3").encode("swallow") is None


def test_long_words_and_other_letters_are_left_to_the_tokenizer() -> None:
    assert ours("gpt2").encode("naïve") is None
    assert ours("gpt2").encode("a" * (WORD_BYTES_MAX + 1)) is None
    assert ours("gpt2").encode("a" * WORD_BYTES_MAX) is not None
    nothing = ours("gpt2").encode("")
    assert nothing is not None and len(nothing) == 0


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"byte-level"}))
def test_other_kinds_are_left_to_the_tokenizer(name: str) -> None:
    assert AsciiBpe.of(FAMILIES[name]()) is None


@pytest.mark.parametrize(
    "pattern", [r"\p{L}+|\w", r"(\p{L})+|.", r"[a-z&&[^b]]+|.", r"\p{Greek}|."]
)
def test_patterns_that_may_mean_something_else_are_left_to_the_tokenizer(pattern: str) -> None:
    told = json.loads(made("qwen2").to_str())
    told["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    assert AsciiBpe.of(FastTokenizer.from_str(json.dumps(told))) is None


def test_a_token_that_takes_blanks_with_it_is_left_to_the_tokenizer() -> None:
    fast = FastTokenizer.from_str(made("gpt2").to_str())
    fast.add_tokens([AddedToken("<tool>", lstrip=True, normalized=False)])
    found = AsciiBpe.of(fast)
    assert found is not None
    assert found.encode("a <tool> b") is None
    assert found.encode("a tool b") is not None
