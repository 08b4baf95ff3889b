"""Planned fleets as a picture: what arrived, how many engines were wanted, and how many served."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

WIDTH: Final = 720
PANEL: Final = 190
LEFT: Final = 48
RIGHT: Final = 56
TOP: Final = 34
BOTTOM: Final = 34
SMOOTH_TICKS: Final = 12
RATE: Final = "#999999"
TARGET: Final = "#d55e00"
SERVING: Final = "#0072b2"

Curve = Sequence[tuple[float, float, int, int]]
"""Time in seconds, requests a second, engines wanted, engines that serve."""


def picture(panels: Sequence[tuple[str, Curve]]) -> str:
    """An SVG with a panel for each; rates are means of some ticks."""
    height = PANEL * len(panels)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">'
    )
    parts = [head, f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>']
    for number, (title, curve) in enumerate(panels):
        parts.append(f'<g transform="translate(0,{number * PANEL})">')
        parts += _panel(title, curve)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(title: str, curve: Curve) -> list[str]:
    times = [point[0] for point in curve]
    rates = _smooth([point[1] for point in curve])
    end_s = max(times, default=1.0) or 1.0
    engines_max = max((max(point[2:]) for point in curve), default=1) + 1
    rate_max = 1.1 * max(rates, default=1.0) or 1.0

    def x(at_s: float) -> float:
        return LEFT + at_s / end_s * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return PANEL - BOTTOM - share * (PANEL - TOP - BOTTOM)

    def line(values: Sequence[float], most: float, colour: str) -> str:
        points = " ".join(
            f"{x(at_s):.1f},{y(value / most):.1f}"
            for at_s, value in zip(times, values, strict=True)
        )
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'

    parts = [f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>']
    legend = (("requests/s", RATE), ("engines wanted", TARGET), ("engines serving", SERVING))
    for place, (name, colour) in enumerate(legend):
        parts.append(
            f'<text x="{WIDTH - RIGHT - 120 * (2 - place)}" y="20" fill="{colour}" '
            f'text-anchor="end">{name}</text>'
        )
    for engines in range(0, engines_max + 1, max(engines_max // 4, 1)):
        at = y(engines / engines_max)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{engines}</text>'
        )
    parts += [
        f'<text x="{WIDTH - RIGHT + 6}" y="{y(share) + 4:.1f}" fill="{RATE}">'
        f"{share * rate_max:.1f}</text>"
        for share in (0.0, 0.5, 1.0)
    ]
    parts += [
        f'<text x="{x(minute * 60):.1f}" y="{PANEL - BOTTOM + 16}" text-anchor="middle">'
        f"{minute} min</text>"
        for minute in range(0, int(end_s // 60) + 1, 10)
    ]
    parts.append(line(rates, rate_max, RATE))
    parts.append(line([point[2] for point in curve], engines_max, TARGET))
    parts.append(line([point[3] for point in curve], engines_max, SERVING))
    return parts


def _smooth(values: Sequence[float]) -> list[float]:
    found = []
    for end in range(1, len(values) + 1):
        some = values[max(end - SMOOTH_TICKS, 0) : end]
        found.append(sum(some) / len(some))
    return found
