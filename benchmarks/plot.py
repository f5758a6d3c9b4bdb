"""The plot of benchmarks/peers.py: ratios to the Llama on a logarithmic axis, as an SVG that needs no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["bars"]

LEFT, WIDTH, ROW, GAP = 250, 420, 18, 14
LOW, HIGH = -3, 3  # powers of ten
COLOURS = ("#0b6e4f", "#888888", "#c44536", "#e09f3e", "#335c67")


def bars(rows: Sequence[dict[str, Any]]) -> str:
    """One bar a row, grouped by case; its length is the logarithm of the ratio, from 1 to the left or right."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    parts, y = [], 30
    for case in cases:
        for row in (row for row in rows if row["case"] == case):
            parts += _bar(row, y, COLOURS[systems.index(row["system"]) % len(COLOURS)])
            y += ROW
        y += GAP
    axis = [_tick(power, y) for power in range(LOW, HIGH + 1)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{y + 20}" '
    title = '<text x="8" y="16">tokens/s, ratio to a Hugging Face Llama of equal size</text>'
    return "\n".join([head + 'font-family="sans-serif" font-size="12">', title, *axis, *parts, "</svg>", ""])


def _place(ratio: float) -> float:
    power = min(max(math.log10(ratio), LOW), HIGH)
    return LEFT + WIDTH * (power - LOW) / (HIGH - LOW)


def _bar(row: dict[str, Any], y: int, colour: str) -> list[str]:
    ratio = row["ratio_to_llama"]
    label = f'<text x="8" y="{y + 12}">{row["case"]}: {row["system"]}</text>'
    if not ratio:
        return [label]
    begin, end = sorted((_place(1.0), _place(ratio)))
    size = f'x="{begin:.1f}" y="{y + 2}" width="{max(end - begin, 1):.1f}" height="{ROW - 5}"'
    return [label, f'<rect {size} fill="{colour}"/>', f'<text x="{end + 4:.1f}" y="{y + 12}">{ratio:.3g}</text>']


def _tick(power: int, height: int) -> str:
    x = _place(10.0**power)
    line = f'<line x1="{x}" y1="24" x2="{x}" y2="{height}" stroke="#ddd"/>'
    return f'{line}<text x="{x}" y="{height + 14}" text-anchor="middle">{10.0**power:g}</text>'
