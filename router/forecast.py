"""What a request may expect of some workers: of the one it would be sent to now, and of all.

In seconds, whatever the policy chooses by: a caller compares pools with it that choose differently.
"""

from __future__ import annotations

import msgspec


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """`why` is set where nobody would take the request; then only what is said of all counts."""

    why: str | None = None
    worker: str | None = None
    tokens: int = 0  # of the prompt
    cached_tokens: int = 0  # of these, what that worker finds in some tier
    line_s: float = 0.0  # waiting for any worker to have room
    wait_s: float = 0.0  # then for prompts that were sent to it before; see `SecondsCost`
    room_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0
    decode_s: float = 0.0  # weighted, as the policy `kv` does
    step_s: float = 0.0  # from one token to the next, with this request there
    measured: bool = False  # its speeds are no assumptions
    # Of all workers:
    serving: int = 0
    busy: int = 0  # of these, over their limits
    waiting: int = 0  # requests in the line
    requests: int = 0
    prefill_tokens: int = 0  # assigned and not computed

    @property
    def first_token_s(self) -> float:
        return self.line_s + self.wait_s + self.room_s + self.load_s + self.compute_s

    @property
    def cost_s(self) -> float:
        """What pools are compared by, as workers are by the policy `kv`."""
        return self.first_token_s + self.decode_s


def split_between(prefill: Forecast, decode: Forecast) -> Forecast:
    """Of a request whose prompt is computed by one worker and that is decoded by another."""
    if prefill.why is not None:
        return msgspec.structs.replace(decode, why=f"prefill: {prefill.why}", worker=None)
    return msgspec.structs.replace(
        decode,
        cached_tokens=prefill.cached_tokens,
        line_s=decode.line_s + prefill.line_s,
        wait_s=decode.wait_s + prefill.wait_s,
        room_s=decode.room_s + prefill.room_s,
        load_s=prefill.load_s,
        compute_s=prefill.compute_s,
        measured=decode.measured and prefill.measured,
        serving=decode.serving + prefill.serving,
        busy=decode.busy + prefill.busy,
        waiting=decode.waiting + prefill.waiting,
        prefill_tokens=decode.prefill_tokens + prefill.prefill_tokens,
    )
