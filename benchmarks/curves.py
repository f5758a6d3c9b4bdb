"""Losses by step as lines on a logarithmic axis: an SVG that needs no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["curves"]

LEFT, TOP, WIDTH, HEIGHT, KEY = 60, 30, 460, 280, 130
COLOURS = ("#0b6e4f", "#c44536", "#335c67", "#e09f3e", "#7b2d8b", "#888888", "#1b98e0", "#b08968")
MOST_POINTS = 200


def curves(title: str, lines: Mapping[str, Sequence[float]]) -> str:
    """One line a name; what is not finite or not above 0 interrupts it."""
    found = [v for values in lines.values() for v in values if 0 < v < math.inf]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    low, high = max(low, high - 12), max(high, low + 1)
    steps = max(len(values) for values in lines.values())

    def place(i: int, value: float) -> str:
        power = min(max(math.log10(value), low), high)
        return f"{LEFT + WIDTH * i / max(1, steps - 1):.1f},{TOP + HEIGHT * (high - power) / (high - low):.1f}"

    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + KEY}" height="{TOP + HEIGHT + 30}" '
    parts = [head + 'font-family="sans-serif" font-size="12">', f'<text x="8" y="18">{title}</text>']
    parts += [_tick(power, high - low, high) for power in range(low, high + 1)]
    parts.append(f'<text x="{LEFT}" y="{TOP + HEIGHT + 18}">0</text>')
    parts.append(f'<text x="{LEFT + WIDTH}" y="{TOP + HEIGHT + 18}" text-anchor="end">{steps} steps</text>')
    for number, (name, values) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        y = TOP + 14 + 18 * number
        parts.append(f'<text x="{LEFT + WIDTH + 8}" y="{y}" fill="{colour}">{name}</text>')
        for run in _runs(values):
            points = " ".join(place(i, value) for i, value in run)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return "\n".join([*parts, "</svg>", ""])


def _runs(values: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Stretches of drawable points, thinned."""
    stride = max(1, len(values) // MOST_POINTS)
    runs: list[list[tuple[int, float]]] = [[]]
    for i in range(0, len(values), stride):
        if 0 < values[i] < math.inf:
            runs[-1].append((i, values[i]))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _tick(power: int, span: int, high: int) -> str:
    y = TOP + HEIGHT * (high - power) / span
    line = f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}" stroke="#ddd"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'
