"""Line charts as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 10, 34
MOST_POINTS = 240
_LONGEST = 26
"""Letters of an axis's name that fit beside it."""
Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], title: str) -> str:
    """An SVG of lines of `title` over the step, a line a name, each in its colour and dashes.

    Empty without a finite point; other values are left out.

    Long lines are shown by the means of up to `MOST_POINTS` equal shares.
    """
    lines = {name: thinned([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    everything = [point for points in lines.values() for point in points]
    if not everything:
        return ""
    xs, ys = ticks(*_range([x for x, _ in everything])), ticks(*_range([y for _, y in everything]))
    low_x, high_x = min(x for x, _ in everything), max(x for x, _ in everything)
    low_y, high_y = min(ys[0], *(y for _, y in everything)), max(ys[-1], *(y for _, y in everything))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        up = (y - low_y) / (high_y - low_y) if high_y > low_y else 0.5
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in ys:
        _, at = place(low_x, y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{label(y, ys[1] - ys[0])}</text>'
        )
    for x in [x for x in xs if low_x <= x <= high_x]:
        at, _ = place(x, low_y)
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{label(x, xs[1] - xs[0])}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    name = title if len(title) <= _LONGEST else f"{title[: _LONGEST - 1]}…"
    beside = f"translate(12 {(_TOP + HEIGHT - _BOTTOM) / 2}) rotate(-90)"
    parts.append(f'<text class="axis" transform="{beside}" text-anchor="middle">{escape(name)}</text>')
    for index, points in enumerate(lines.values()):
        placed = [place(*point) for point in points]
        if len(placed) == 1:
            parts.append(f'<circle class="dot s{index % 6}" cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="3"/>')
        elif placed:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline class="line s{index % 6}" points="{path}"/>')
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step">'
    return f"{head}{''.join(parts)}</svg>"


def thinned(points: Points) -> list[tuple[float, float]]:
    """The means of equal shares of the points, in order, if there are more than `MOST_POINTS`."""
    size = math.ceil(len(points) / MOST_POINTS)
    shares = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in shares]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from below `low` to above `high`."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float, step: float) -> str:
    """A tick's number, short, with the digits that tell it from the next one, `step` away."""
    if abs(value) < step / 2:
        return "0"
    digits = min(math.floor(math.log10(abs(value))) - math.floor(math.log10(step)) + 2, 8)
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{max(digits - 1, 1)}e}".partition("e")
        return f"{mantissa.rstrip('0').removesuffix('.')}e{int(exponent)}"
    return f"{value:.{max(digits, 4)}g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin
