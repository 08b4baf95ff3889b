"""What an engine says of itself in discovery: the labels of its instance's record.

A router learns from it which model an engine serves and how much fits into it, a frontend where
its OpenAI server is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import msgspec

Role = Literal["aggregated", "prefill", "decode"]

COMPONENT = "backend"
ENDPOINT = "generate"


class CardRefused(ValueError):
    """Labels that are no engine's; says which of them, and what is accepted."""


class EngineCard(msgspec.Struct, frozen=True, kw_only=True):
    """One engine instance; all its data-parallel ranks are alike."""

    model: str  # as requests name it
    url: str  # of its OpenAI server, without /v1: http://HOST:PORT; empty if it has none
    block_tokens: int
    kv_blocks: int = 0  # of each rank; 0: not known
    batch_tokens: int = 0  # most that one step computes; 0: not known
    context_tokens: int = 0  # longest sequence; 0: not known
    dp_size: int = 1
    role: Role = "aggregated"
    path: str = ""  # the model's folder, or its name at a hub, as the engine was given it
    relays: bool = False  # it hands requests on to engines, and may be asked again for one it lost

    def labels(self) -> dict[str, str]:
        return {field: str(value) for field, value in msgspec.to_builtins(self).items()}

    @classmethod
    def of_labels(cls, labels: Mapping[str, str]) -> Self:
        """Labels that are not known are skipped. Raises CardRefused."""
        known = {name: labels[name] for name in cls.__struct_fields__ if name in labels}
        try:
            card = msgspec.convert(known, cls, strict=False)
        except msgspec.ValidationError as error:
            raise CardRefused(f"the record is no engine's: {error}") from error
        counts = (card.kv_blocks, card.batch_tokens, card.context_tokens)
        if card.block_tokens < 1 or card.dp_size < 1 or min(counts) < 0:
            raise CardRefused("the record is no engine's: a count is out of range")
        return card
