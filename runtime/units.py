"""Sizes and durations as people write them: "64GiB", "250ms".

Settings declare fields as `Size` (bytes, int) and `Duration` (seconds, float); plain numbers are
taken as bytes and seconds. Units must be spelled so that they mean one thing: "64GiB" and "64Gi"
are binary, "64GB" is decimal, and "64G" is refused because tools disagree about it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BeforeValidator, SecretStr

from runtime.secret import read_secret

_SIZE_UNITS: Final = {
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_DURATION_UNITS: Final = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_SIZE_ACCEPTED: Final = 'accepted: a whole number of bytes, or "512MiB", "64GiB", "2TB"'
_DURATION_ACCEPTED: Final = 'accepted: a number of seconds, or "250ms", "5s", "10min", "1h", "7d"'


@dataclass(frozen=True, slots=True)
class Kind:
    """Marks an annotated type for the generated documentation."""

    name: str


def parse_size(value: object) -> int:
    """Bytes of `value`; raises ValueError saying what is accepted."""
    number = _quantity(value, _SIZE_UNITS, 1, "a size", _SIZE_ACCEPTED)
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number of bytes; {_SIZE_ACCEPTED}")
    return int(number)


def parse_duration(value: object) -> float:
    """Seconds of `value`; raises ValueError saying what is accepted."""
    return float(_quantity(value, _DURATION_UNITS, 1.0, "a duration", _DURATION_ACCEPTED))


def format_size(size_bytes: int) -> str:
    """The shortest exact spelling, in binary units."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = _SIZE_UNITS[unit.lower()]
        if size_bytes and size_bytes % scale == 0:
            return f"{size_bytes // scale}{unit}"
    return str(size_bytes)


def format_duration(duration_s: float) -> str:
    """A short spelling of the same duration."""
    for unit in ("d", "h", "min", "s", "ms"):
        count = duration_s / _DURATION_UNITS[unit]
        if count >= 1 and math.isclose(count, round(count)):
            return f"{round(count)}{unit}"
    return f"{duration_s:g}s"


def _quantity(
    value: object, units: dict[str, int] | dict[str, float], plain: float, what: str, accepted: str
) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not {what}; {accepted}")  # noqa: TRY004 (pydantic's way)
    if isinstance(value, int | float):
        if value < 0 or not math.isfinite(value):
            raise ValueError(f"{value!r} is not {what}; {accepted}")
        return value * plain
    match = _QUANTITY.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is not {what}; {accepted}")
    number, unit = match.groups()
    scale = units.get(unit.lower()) if unit else plain
    if scale is None:
        raise ValueError(f"{value!r}: the unit {unit!r} is not known; {accepted}")
    # Whole numbers stay exact: a float has 53 bits, and sizes in bytes may need more.
    return int(number) * scale if "." not in number else float(number) * scale


Size = Annotated[int, BeforeValidator(parse_size), Kind("size")]
Duration = Annotated[float, BeforeValidator(parse_duration), Kind("duration")]
Secret = Annotated[SecretStr, BeforeValidator(read_secret), Kind("secret")]
