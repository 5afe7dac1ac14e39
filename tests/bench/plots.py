"""Plots as SVG text: bars with every single value on them, stacked bars, lines. Colours are the page's variables s0 to s7."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

_WIDTH: Final = 1000
_LEFT: Final = 260
_ROW: Final = 26
_RIGHT: Final = 110


def bars(caption: str, values: Mapping[str, Sequence[float]], unit: str) -> str:
    """Return a row for each name: a bar as long as its median, and a dot for each value."""
    most = max((value for each in values.values() for value in each), default=0.0) or 1.0
    drawn = []
    for row, (name, each) in enumerate(values.items()):
        y, middle = 10 + row * _ROW, statistics.median(each) if each else 0.0
        drawn.append(_text(_LEFT - 8, y + 13, name, "end"))
        colour = f"var(--s{0 if row == 0 else 5})"
        drawn.append(f'<rect x="{_LEFT}" y="{y}" width="{_length(middle, most):.1f}" height="18" fill="{colour}" opacity=".75"/>')
        drawn += [f'<circle cx="{_LEFT + _length(value, most):.1f}" cy="{y + 9}" r="2.5" fill="var(--fg)"/>' for value in each]
        furthest = max([middle, *each])
        drawn.append(
            _text(_LEFT + _length(furthest, most) + 8, y + 13, f"{middle:,.3g} {unit}" if middle < 1000 else f"{middle:,.0f} {unit}")
        )
    return _figure(caption, 20 + len(values) * _ROW, drawn)


def stacked(caption: str, rounds: Sequence[Mapping[str, float]], unit: str) -> str:
    """Return a row for each round: its parts one after another, with a legend."""
    most = max((sum(each.values()) for each in rounds), default=0.0) or 1.0
    names = list(rounds[0]) if rounds else []
    drawn = []
    for row, each in enumerate(rounds):
        y, x = 10 + row * _ROW, float(_LEFT)
        drawn.append(_text(_LEFT - 8, y + 13, f"cycle {row + 1}", "end"))
        for number, name in enumerate(names):
            width = _length(each.get(name, 0.0), most)
            title = f"<title>{escape(name)}: {each.get(name, 0.0):.3g} {escape(unit)}</title>"
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" fill="var(--s{number % 8})">{title}</rect>')
            x += width
        drawn.append(_text(x + 8, y + 13, f"{sum(each.values()):.3g} {unit}"))
    return _figure(caption, 40 + len(rounds) * _ROW, [*drawn, *_legend(names, 24 + len(rounds) * _ROW)])


def lines(caption: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Return lines through (x, y), with a legend; both axes begin at 0."""
    height, left = 340, 70
    most_x = max((max(xs) for xs, _ in curves.values()), default=1.0) or 1.0
    most_y = max((max(ys) for _, ys in curves.values()), default=1.0) or 1.0

    def place(x: float, y: float) -> str:
        return f"{left + x / most_x * (_WIDTH - left - 20):.1f},{height - 40 - y / most_y * (height - 60):.1f}"

    drawn = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(most_x * share, most_y * share).split(",")
        drawn.append(f'<line class="axis" x1="{left}" x2="{_WIDTH - 20}" y1="{y}" y2="{y}"/>')
        drawn.append(_text(left - 6, float(y) + 4, f"{most_y * share:,.0f}", "end"))
        drawn.append(_text(float(x), height - 24, f"{share:.0%}", "middle"))
    for number, (name, (xs, ys)) in enumerate(curves.items()):
        points = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
        stroke = f'fill="none" stroke="var(--s{number % 8})" stroke-width="2"'
        drawn.append(f'<polyline points="{points}" {stroke}><title>{escape(name)}</title></polyline>')
    return _figure(caption, height, [*drawn, *_legend(list(curves), height - 8)])


def _length(value: float, most: float) -> float:
    return value / most * (_WIDTH - _LEFT - _RIGHT)


def _legend(names: Sequence[str], y: int) -> list[str]:
    drawn, x = [], 70
    for number, name in enumerate(names):
        drawn.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="var(--s{number % 8})"/>')
        drawn.append(_text(x + 15, y, name))
        x += 30 + 7 * len(name)
    return drawn


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _figure(caption: str, height: int, drawn: Sequence[str]) -> str:
    label = escape(caption, quote=True)
    svg = f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
