"""What a request says of sampling, where the frontend itself makes the answer from tokens."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from frontend.errors import UNSUPPORTED, bad_request
from runtime.generation import Sampling

STOPS_MAX: Final = 16
CHOICES_MAX: Final = 128

_ENGINES_OWN: Final = "is made by the engine's own server: it needs a model that is passed through"


class SamplingFields(msgspec.Struct, kw_only=True):
    """Decoded from the same body as the rest."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    logprobs: bool | int | None = None
    response_format: dict[str, Any] | None = None
    tool_choice: Any = None
    best_of: int | None = None
    suffix: Any = None
    prompt_embeds: Any = None
    truncate_prompt_tokens: Any = None
    prompt_logprobs: Any = None
    logprob_token_ids: Any = None
    return_token_ids: Any = None
    use_beam_search: Any = None
    structured_outputs: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None
    vllm_xargs: Any = None
    kv_transfer_params: Any = None
    chat_template: Any = None
    continue_final_message: Any = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def check(self, *, has_tools: bool) -> None:
        """Raises ApiError for what cannot be made here, and for what is out of bounds."""
        if self.logprobs:  # false and 0 ask for none
            raise bad_request(f"logprobs {_ENGINES_OWN}", "logprobs", UNSUPPORTED)
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise bad_request(f"response_format {_ENGINES_OWN}", "response_format", UNSUPPORTED)
        if has_tools and self.tool_choice != "none":
            raise bad_request(f"A tool call {_ENGINES_OWN}", "tools", UNSUPPORTED)
        for name in _OWN_FIELDS:
            if getattr(self, name):
                raise bad_request(f"{name} {_ENGINES_OWN}", name, UNSUPPORTED)
        if self.best_of is not None and self.best_of > 1:
            raise bad_request(f"best_of {_ENGINES_OWN}", "best_of", UNSUPPORTED)
        if len(self.stops) > STOPS_MAX:
            raise bad_request(f"At most {STOPS_MAX} stop strings", "stop", "invalid_value")
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)

    def sampling(self, max_tokens: int, index: int = 0) -> Sampling:
        """Of the prompt's choice with this index, each with a seed of its own. Raises ApiError."""
        try:
            bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise bad_request(
                "logit_bias maps tokens, as numbers, to numbers", "logit_bias", "invalid_value"
            ) from error
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed + index,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=bias or None,
            stop=self.stops,
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=self.ignore_eos,
        )


_FIELDS: Final = SamplingFields.__struct_fields__
_OWN_FIELDS: Final = _FIELDS[_FIELDS.index("suffix") :]


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise bad_request(f"{name} is {value:g}; it must be in {low:g} to {high:g}", name, "range")


sampling_decoder = msgspec.json.Decoder(SamplingFields)
