"""What the demo leaves behind: a table for the eye, JSON for programs, an SVG for a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from examples.demo.measure import COLD, G1, G2, G3, G4, OTHER, Row, Turn
from examples.demo.routed import RoutedRow

LABELS = {
    COLD: "computed",
    G1: "engine memory",
    G2: "host memory",
    OTHER: "host memory",
    G3: "SSD, restarted",
    G4: "S3, SSD emptied",
}
COLOURS = {
    COLD: "#8a8f98",
    G1: "#2f7d4f",
    G2: "#2f6fb2",
    OTHER: "#5b8fd0",
    G3: "#b9772c",
    G4: "#8a5bb0",
}
_HEADINGS = ("row", "KV from", "tier", "TTFT", "faster", "reused", "equal")
_ROUTED_HEADINGS = ("request", "engine", "TTFT", "expected", "reused", "equal", "why")
_WIDTH, _LABEL, _LEFT, _BAR, _ROW, _TOP = 860, 160, 300, 410, 44, 92


def write_json(
    path: Path,
    *,
    ok: bool,
    model: str,
    engine: str,
    rows: Sequence[Row],
    routed: Sequence[RoutedRow],
) -> None:
    """One object: a row per source, medians in seconds, and one per routed request."""
    fields = ("source", "ttft_s", "prompt_tokens", "tokens_reused", "output_equal")
    content = {
        "ok": ok,
        "model": model,
        "engine": engine,
        "rows": [{field: asdict(row)[field] for field in fields} for row in rows],
        "routed": [asdict(row) for row in routed],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_conversation(path: Path, turns: Sequence[Turn]) -> None:
    path.write_text(json.dumps([asdict(turn) for turn in turns], indent=2) + "\n")


def print_table(
    console: Console, rows: Sequence[Row], turns: Sequence[Turn], routed: Sequence[RoutedRow]
) -> None:
    """A table on a terminal; elsewhere one plain line for each row, tabs between the cells."""
    title = "Median time to first token, by where the KV came from"
    _print_lines(console, title, [_HEADINGS, *(_cells(row, rows) for row in rows)])
    for turn in turns:
        print(
            f"conversation, turn {turn.number} on {turn.engine}: {turn.ttft_s:.3f} s, "
            f"{turn.tokens_reused} of {turn.prompt_tokens} tokens reused"
        )
    if routed:
        print()
        title = "Through the frontend: the engine that was chosen, and what was known before"
        _print_lines(console, title, [_ROUTED_HEADINGS, *map(_routed_cells, routed)])


def _print_lines(console: Console, title: str, lines: Sequence[tuple[str, ...]]) -> None:
    if console.is_terminal:
        table = Table(*lines[0], title=title, box=SIMPLE)
        for cells in lines[1:]:
            table.add_row(*cells)
        console.print(table)
    else:
        widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
        for cells in lines:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            print("  ".join(padded).rstrip())


def write_svg(path: Path, rows: Sequence[Row], *, model: str, engine: str) -> None:
    """A bar for each source. Linear from zero: the point is how short the others are."""
    height = _TOP + _ROW * len(rows) + 52
    slowest_s = max(row.ttft_s for row in rows)
    bars = [bar for at, row in enumerate(rows) for bar in _bar(at, row, rows, slowest_s)]
    prompt = max(row.prompt_tokens for row in rows)
    same = "Every answer had the same tokens as the cold one."
    if not all(row.output_equal for row in rows):
        same = "Some answers differ from the cold ones."
    font = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{font}" role="img">',
        "<title>Time to first token, by where the KV cache came from</title>",
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(32, 42, "Time to first token, by where the KV cache came from", 20, weight=600),
        _text(32, 66, f"{model} on {engine}, prompts of about {prompt} tokens", 13, "#5f6672"),
        *bars,
        _text(32, height - 22, f"Medians. {same}", 12, "#5f6672"),
        "</svg>",
    ]
    path.write_text("\n".join(parts) + "\n")


def _bar(at: int, row: Row, rows: Sequence[Row], slowest_s: float) -> list[str]:
    top = _TOP + at * _ROW
    middle = top + _ROW / 2
    width = max(2.0, _BAR * row.ttft_s / slowest_s)
    value = _seconds(row.ttft_s) + (f", {_faster(row, rows)} faster" if row.source != COLD else "")
    place = f'x="{_LEFT}" y="{top + 9}" width="{width:.1f}" height="{_ROW - 18}"'
    return [
        _text(32, middle + 5, row.source, 14, weight=600),
        _text(_LABEL, middle + 5, LABELS[row.source], 13, "#3a404a"),
        f'<rect {place} rx="3" fill="{COLOURS[row.source]}"/>',
        _text(_LEFT + width + 10, middle + 5, value, 13),
    ]


def _text(
    x: float, y: float, content: str, size: int, fill: str = "#1c2026", *, weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}">{escape(content)}</text>'
    )


def _routed_cells(row: RoutedRow) -> tuple[str, ...]:
    return (
        row.request,
        row.engine,
        _seconds(row.ttft_s),
        f"{row.tokens_expected}/{row.prompt_tokens}",
        f"{row.tokens_reused}/{row.prompt_tokens}",
        "yes" if row.output_equal else "NO",
        row.why,
    )


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    return (
        row.source,
        LABELS[row.source],
        row.served_by,
        _seconds(row.ttft_s),
        "-" if row.source == COLD else _faster(row, rows),
        f"{row.tokens_reused}/{row.prompt_tokens}",
        "yes" if row.output_equal else "NO",
    )


def _seconds(value_s: float) -> str:
    return f"{value_s:.2f} s" if value_s >= 0.1 else f"{value_s * 1000:.0f} ms"


def _faster(row: Row, rows: Sequence[Row]) -> str:
    cold = next((other for other in rows if other.source == COLD), row)
    return f"{cold.ttft_s / row.ttft_s:.0f}x"
