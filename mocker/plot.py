"""A replay as a picture: by policy, the share of requests that had their first token by a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

import numpy as np

WIDTH: Final = 720
HEIGHT: Final = 400
LEFT: Final = 56
RIGHT: Final = 16
TOP: Final = 40
BOTTOM: Final = 48
POINTS: Final = 200
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def plot(title: str, ttfts_s: Mapping[str, Sequence[float]]) -> str:
    """An SVG; time is on a logarithmic scale, from the first request's to the last one's."""
    values = {name: np.sort(np.asarray(some)) for name, some in ttfts_s.items() if len(some)}
    if not values:
        raise ValueError("no policy has answered any request")
    low = float(min(some[0] for some in values.values()))
    high = float(max(some[-1] for some in values.values()))
    low, high = max(low, high / 1e6), max(high, low * 1.01)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
    )
    parts = [
        head,
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        *_axes(low, high),
    ]
    for number, (name, some) in enumerate(values.items()):
        colour = COLOURS[number % len(COLOURS)]
        shares = np.linspace(0, 1, POINTS)
        at = np.quantile(some, shares, method="inverted_cdf")
        points = " ".join(
            f"{_x(float(time), low, high):.1f},{_y(float(share)):.1f}"
            for time, share in zip(at, shares, strict=True)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(
            f'<text x="{WIDTH - RIGHT - 8}" y="{_y(0) - 10 - 16 * number:.0f}" fill="{colour}" '
            f'text-anchor="end">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _axes(low: float, high: float) -> list[str]:
    parts = []
    for exponent in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1):
        for factor in (1, 2, 5):
            time = factor * 10.0**exponent
            if low <= time <= high:
                x = _x(time, low, high)
                parts.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
                    f'stroke="#ddd"/><text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" '
                    f'text-anchor="middle">{time:g}</text>'
                )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        "time to first token, s</text>"
    )
    return parts


def _x(time: float, low: float, high: float) -> float:
    share = np.log(max(time, low) / low) / np.log(high / low)
    return LEFT + float(share) * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
