"""Notes of one request's chunks: hashes of its tokens, the same as vLLM's own KV events yield.

They are made in the scheduler loop when chunks are stored, from tokens that are computed by then.
What a block's hash covers besides its tokens is what vLLM's events say it does: LoRA adapter,
cache salt, and the images in it.
"""

from __future__ import annotations

from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.request import Request

from kvbm.token_chain import TokenChain


class RequestNotes:
    """Follows a request as its tokens come; each is hashed once."""

    def __init__(self, request: Request, block_tokens: int, tokens_per_hash: int) -> None:
        """`block_tokens` of the cache group; `tokens_per_hash` of `request.block_hashes`."""
        self._request = request
        self._tokens_per_hash = tokens_per_hash
        lora = request.lora_request.name if request.lora_request else None
        self._chain = TokenChain(block_tokens, lora=lora, cache_salt=request.cache_salt)
        self._last = b""  # vLLM's own hash of the last block that is hashed here
        self._is_known = request.prompt_embeds is None

    def hash_to(self, tokens: int) -> None:
        """Have all whole blocks before this token hashed, if the tokens are known."""
        if not self._is_known or tokens > len(self._request.all_token_ids):
            return
        if self._last and self._hash_before(len(self._chain)) != self._last:
            self._chain.clear()  # a streaming session took back some of its tokens
        size, first = self._chain.block_tokens, len(self._chain)
        end = tokens // size
        if end <= first:
            return
        try:
            self._chain.extend(
                self._request.all_token_ids[first * size : end * size], self._media(first, end)
            )
        except OverflowError:  # no tokens: a model's own numbers
            self._is_known = False
            return
        self._last = self._hash_before(end)

    def note(self, domain: int, start: int, end: int) -> bytes:
        """Of the chunk from token `start` to before `end`; empty where `hash_to` found none."""
        size = self._chain.block_tokens
        if not 0 <= start < end <= size * len(self._chain) or start % size or end % size:
            return b""
        return self._chain.note(domain, start // size, end // size)

    def _hash_before(self, block: int) -> bytes:
        place = block * self._chain.block_tokens // self._tokens_per_hash - 1
        hashes = self._request.block_hashes
        return bytes(hashes[place]) if 0 <= place < len(hashes) else b""

    def _media(self, first: int, end: int) -> dict[int, list[str]]:
        """Identifiers of what is embedded in each block, counted from the first."""
        request, size = self._request, self._chain.block_tokens
        found: dict[int, list[str]] = {}
        at = 0  # the first of the features that may reach into the block
        for block in range(first, end) if request.mm_features else ():
            keys, at = generate_block_hash_extra_keys(request, block * size, (block + 1) * size, at)
            if names := [key[1] for key in keys or () if key[0] == "mm"]:
                found[block - first] = names
        return found
