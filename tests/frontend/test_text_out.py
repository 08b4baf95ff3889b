"""Text in pieces is the text of the whole, up to the first stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

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
