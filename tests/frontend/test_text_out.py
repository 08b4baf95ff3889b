"""Text in pieces is the text of the whole, up to the first stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from frontend.text_out import TextOut
from tests.frontend.test_tokenizer import TEXTS, byte_level_once

STOPS = st.lists(st.sampled_from(["the", "fox ", "\n", "e q", "ü", "图书", "42", "fo"]), max_size=3)


def pieces(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    found, at = [], 0
    for size in [*sizes, len(tokens)]:
        found.append(tokens[at : at + size])
        at += size
    return found


@given(text=TEXTS, sizes=st.lists(st.integers(0, 4), max_size=200))
@settings(deadline=None, max_examples=100)
def test_pieces_are_the_whole(text: str, sizes: list[int]) -> None:
    fast = byte_level_once()
    tokens = fast.encode(text, add_special_tokens=False).ids
    out = TextOut(fast)
    given_out = "".join(out.feed(piece) for piece in pieces(tokens, sizes)) + out.end()
    assert given_out == fast.decode(tokens)


@given(
    text=TEXTS, stop=STOPS, sizes=st.lists(st.integers(1, 3), max_size=200), include=st.booleans()
)
@settings(deadline=None, max_examples=200)
def test_nothing_comes_from_a_stop_string_on(
    text: str, stop: list[str], sizes: list[int], include: bool
) -> None:
    fast = byte_level_once()
    tokens = fast.encode(text, add_special_tokens=False).ids
    whole = fast.decode(tokens)
    # With one token at a time what is found first is what ends first.
    out = TextOut(fast, stop, include_stop=include)
    parts = [out.feed([token]) for token in tokens]
    found = "".join(parts) + out.end()
    ends = sorted((whole.find(one) + len(one), whole.find(one)) for one in stop if one in whole)
    if not ends:
        assert (found, out.stopped) == (whole, None)
    else:
        assert out.stopped in stop
        assert whole.startswith(found)
        at = whole.find(out.stopped)
        assert found == whole[: at + len(out.stopped) * include]
        assert not any(one in found for one in stop) or include


def test_what_may_become_a_stop_string_is_held_back() -> None:
    fast = byte_level_once()
    out = TextOut(fast, ["fox jumps"])
    said = [out.feed([token]) for token in fast.encode("the fox jolts").ids]
    assert "".join(said) + out.end() == "the fox jolts"
    assert out.stopped is None


@given(tokens=st.lists(st.integers(0, byte_level_once().get_vocab_size() - 1), max_size=60))
@settings(deadline=None, max_examples=200)
def test_tokens_that_are_no_text_come_out_as_something(tokens: list[int]) -> None:
    out = TextOut(byte_level_once(), ["\x00never"], prompt=tokens[:20])
    out.feed(tokens)
    out.end()
    assert out.tokens == len(tokens)


def test_the_first_word_begins_as_behind_the_prompt() -> None:
    words = {"\u2581hello": 0, "\u2581world": 1}
    sentences = Tokenizer(models.WordLevel(words, unk_token="\u2581hello"))
    sentences.decoder = decoders.Metaspace()
    assert TextOut(sentences, prompt=[0]).feed([1]) == " world"
    assert TextOut(sentences).feed([1, 0]) == "world hello"


def test_half_a_letter_at_the_prompts_end_brings_none_of_the_prompt_back() -> None:
    fast = bytes_only()
    said = fast.encode("say \u00fc", add_special_tokens=False).ids
    out = TextOut(fast, prompt=said[:-1])
    assert "say" not in out.feed([said[-1]]) + out.feed(fast.encode("x").ids)


def test_bytes_that_make_no_letter_take_back_none_that_did() -> None:
    """Byte tokens side by side are shown as letters only if all of them make letters."""
    fast = Tokenizer(models.WordLevel({"<0x41>": 0, "<0xE2>": 1, "x": 2}, unk_token="x"))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    out = TextOut(fast)
    said = [out.feed([token]) for token in (0, 1, 2, 0)]
    assert said[0] == "A"
    assert "".join(said).endswith("xA")


def test_what_ends_first_counts_and_nothing_before_the_least_tokens() -> None:
    fast = bytes_only()
    tokens = fast.encode("abcdef abc", add_special_tokens=False).ids
    out = TextOut(fast, ["abcde", "bc"])
    assert (out.feed(tokens), out.stopped, out.tokens) == ("a", "bc", 3)
    out = TextOut(fast, ["abcde", "bc"], min_tokens=3, include_stop=True)
    assert (out.feed(tokens), out.stopped, out.tokens) == ("abcde", "abcde", 5)
    out = TextOut(fast, ["bc"], min_tokens=3)
    assert (out.feed(tokens) + out.end(), out.stopped) == ("abcdef a", "bc")


def bytes_only() -> Tokenizer:
    """A token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made
