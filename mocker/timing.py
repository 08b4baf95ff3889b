"""How long a mock engine takes: steps of a model on a GPU, and loads from the tiers below it.

A step costs `overhead + max(weights, token x tokens) + pair x pairs + kv x kv tokens`: the linear
layers are bound either by reading the weights or by computing the step's tokens; attention of
prefill is bound by computing (query, key) pairs, attention of decode by reading KV. The prefill
and decode parts of one step are added, which is an assumption on the slow side.

All durations are whole picoseconds (1e-12 s). Sums of integers are exact in any order, so many
decode steps at once take exactly as long as one after another.

Where the presets come from. Public: parameters, layers, heads and KV bytes of the models from
their configuration files; 989.4 TFLOP/s dense BF16 and 3.35 TB/s of an H100 SXM from NVIDIA's
data sheet; about 50 GB/s one way between host and GPU over PCIe 5 from vLLM's blog (January 2026).
Assumed: the fraction of those peaks that is reached, the overhead of a step, everything about SSD
and S3. They are figures to compare policies with, not predictions of a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PS_PER_S: Final = 10**12
PS_PER_MS: Final = 10**9

H100_FLOP_PER_S: Final = 989.4e12
H100_BYTES_PER_S: Final = 3.35e12
LINEAR_EFFICIENCY: Final = 0.5  # assumed, of the peak FLOP/s
ATTENTION_EFFICIENCY: Final = 0.4  # assumed, of the peak FLOP/s
MEMORY_EFFICIENCY: Final = 0.8  # assumed, of the peak bytes/s
STEP_OVERHEAD_PS: Final = PS_PER_MS  # assumed: scheduling, launches, sampling


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Durations of an engine's steps; every parameter may be set, none may be negative."""

    overhead_ps: int
    weights_ps: int  # reading all weights once
    token_ps: int  # linear layers, each token of prefill or decode
    pair_ps: int  # attention of prefill, each (new token, token it sees)
    kv_token_ps: int  # attention of decode, each token of KV read

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}: whole picoseconds, 0 or more, are needed")
        if self.overhead_ps + self.weights_ps == 0:
            raise ValueError("overhead_ps and weights_ps are both 0: a step must take time")

    def step_ps(
        self, prefill_tokens: int, prefill_pairs: int, decode_sequences: int, decode_kv_tokens: int
    ) -> int:
        """One step that prefills so many tokens and decodes one token of each sequence."""
        linear_ps = self.token_ps * (prefill_tokens + decode_sequences)
        return (
            self.overhead_ps
            + max(self.weights_ps, linear_ps)
            + self.pair_ps * prefill_pairs
            + self.kv_token_ps * decode_kv_tokens
        )

    def prefill_ps(self, new_tokens: int, context_tokens: int = 0) -> int:
        """A step that does nothing but prefill tokens after a context that is there."""
        return self.step_ps(new_tokens, pairs(new_tokens, context_tokens), 0, 0)

    def decode_ps(self, sequences: int, kv_tokens: int) -> int:
        """A step that does nothing but decode; `kv_tokens` of all sequences, the new ones too."""
        return self.step_ps(0, 0, sequences, kv_tokens)


def pairs(new_tokens: int, context_tokens: int) -> int:
    """(query, key) pairs of causal attention: each token sees the context and up to itself."""
    return new_tokens * context_tokens + new_tokens * (new_tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class LinkTiming:
    """What bytes take from a tier to the engine: a latency, and then a bandwidth of its own.

    The whole path counts as the tier's: SSD and S3 are slower than the bus they share with G2.
    """

    bytes_per_s: int
    latency_ps: int

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.latency_ps < 0:
            raise ValueError("a link needs a bandwidth above 0 and a latency of 0 or more")

    def transfer_ps(self, count_bytes: int) -> int:
        """Without the latency, which transfers one after another do not add up."""
        return -(-count_bytes * PS_PER_S // self.bytes_per_s)

    def load_ps(self, count_bytes: int) -> int:
        """For one load on an idle link."""
        return self.latency_ps + self.transfer_ps(count_bytes)


@dataclass(frozen=True, slots=True)
class TierTiming:
    """The links of one node; see the module's docstring for what is measured and what assumed."""

    g2: LinkTiming = LinkTiming(50 * 10**9, PS_PER_MS // 10)
    g3: LinkTiming = LinkTiming(6 * 10**9, PS_PER_MS // 2)
    g4: LinkTiming = LinkTiming(2 * 10**9, 50 * PS_PER_MS)


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on its GPUs."""

    step: StepTiming
    kv_bytes_per_token: int
    kv_tokens: int  # what fits into G1


def machine(
    *,
    parameters: float,
    layers: int,
    query_width: int,
    kv_width: int,
    gpus: int = 1,
    flop_per_s: float = H100_FLOP_PER_S,
    bytes_per_s: float = H100_BYTES_PER_S,
    memory_bytes: float = 80e9,
    overhead_ps: int = STEP_OVERHEAD_PS,
) -> Machine:
    """16-bit weights and KV, split over the GPUs evenly and at no cost, which is assumed.

    `query_width`, `kv_width`: heads times head size. KV gets 90 % of the memory less the weights
    and 4 GB a GPU for activations, which is assumed.
    """
    weights_bytes = 2 * parameters
    kv_bytes = 2 * 2 * kv_width * layers
    linear = gpus * flop_per_s * LINEAR_EFFICIENCY
    attention = gpus * flop_per_s * ATTENTION_EFFICIENCY
    memory = gpus * bytes_per_s * MEMORY_EFFICIENCY
    room_bytes = gpus * (0.9 * memory_bytes - 4e9) - weights_bytes
    return Machine(
        StepTiming(
            overhead_ps=overhead_ps,
            weights_ps=round(PS_PER_S * weights_bytes / memory),
            token_ps=round(PS_PER_S * 2 * parameters / linear),
            pair_ps=round(PS_PER_S * 4 * query_width * layers / attention),
            kv_token_ps=round(PS_PER_S * kv_bytes / memory),
        ),
        kv_bytes_per_token=kv_bytes,
        kv_tokens=int(room_bytes / kv_bytes),
    )


PRESETS: Final[dict[str, Machine]] = {
    "llama-8b-h100": machine(parameters=8.03e9, layers=32, query_width=4096, kv_width=1024),
    "llama-70b-4xh100": machine(
        parameters=70.6e9, layers=80, query_width=8192, kv_width=1024, gpus=4
    ),
}
