"""Prompts for the tiny models, whose tokens are bytes, and what of them can be reused."""

from __future__ import annotations

import random
import string

BLOCK_TOKENS = 32


def prompt(name: str, tokens: int = 1200) -> str:
    """A text of its own for each name; the engine adds a token before it."""
    letters = random.Random(name)
    return "".join(letters.choices(string.ascii_letters + " ", k=tokens - 1))


def reusable(tokens: int) -> int:
    """Most an engine can take from a cache: whole blocks, and not the prompt's last token."""
    return (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
