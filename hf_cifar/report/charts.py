"""Charts as SVG that take their colours from the page, for light and dark mode and print.

Every chart is one <svg> of class "plot" with a title and a description for screen readers; sizes are in the
units of its view box, which a phone shows at their original size. CSS classes: axis, grid, tick, series-0 to
series-3, bar, gap (overconfident or underconfident), ideal, whisker, leader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 38
LETTER = 6.6  # mean width of a character of a label


class Axes:
    """Linear axes of a chart: map values to positions, x from the left, y from the bottom."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], height: int = HEIGHT):
        self.x_range, self.y_range, self.height = x, y, height

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def draw(self, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None) -> list[str]:
        """Draw grid lines, tick labels and axis titles."""
        parts = []
        right, bottom = WIDTH - RIGHT, self.height - BOTTOM
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            parts.append(_text(LEFT - 6, y + 4, _number(value), "end"))
        for value in ticks(*self.x_range) if x_ticks is None else x_ticks:
            parts.append(_text(self.x(value), bottom + 16, _number(value), "middle"))
        parts.append(
            f'<path class="axis" d="M{LEFT},{TOP}V{bottom}H{right}"/>'
            + _text((LEFT + right) / 2, self.height - 4, x_label, "middle")
            + f'<g transform="translate(11,{(TOP + bottom) / 2:.0f}) rotate(-90)">'
            + _text(0, 0, y_label, "middle")
            + "</g>"
        )
        return parts


class LogAxes(Axes):
    """Axes with a logarithmic x axis."""

    def x(self, value: float) -> float:
        low, high = self.x_range
        share = math.log(value / low) / math.log(high / low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    from_zero: bool = False,
    log_x: bool = False,
) -> str:
    """Draw up to four named lines through points (x, y), with a legend if there is more than one.

    log_x: a logarithmic x axis.
    """
    points = [point for line in series.values() for point in line]
    xs, ys = zip(*points, strict=True)
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    kind = LogAxes if log_x else Axes
    axes = kind(_spread(min(xs), max(xs)), _rounded(*_spread(low, high)))
    parts = axes.draw(x_label, y_label, log_ticks(min(xs), max(xs)) if log_x else None)
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="line series-{number}" points="{path}"/>')
        if len(line) <= 40:
            parts += [
                f'<circle class="dot series-{number}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3">'
                f"<title>{escape(name)}: {x:g}, {y:.4g}</title></circle>"
                for x, y in line
            ]
    described = "; ".join(
        f"{name} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in series.items()
    )
    return _svg(title, described, parts) + (_legend(list(series)) if len(series) > 1 else "")


def trade_off(
    title: str,
    points: Mapping[str, tuple[float, float, Sequence[float]]],
    front: Sequence[str],
    x_label: str,
    y_label: str,
) -> str:
    """Draw named points (x, y, interval of y), with a line through those of the Pareto front.

    x has a logarithmic axis. Points of the front are blue, others orange.
    """
    xs = [x for x, _, _ in points.values()]
    ys = [end for _, _, interval in points.values() for end in interval]
    axes = LogAxes((0.8 * min(xs), 1.7 * max(xs)), _rounded(*_spread(min(ys), max(ys))))
    rounded = [float(f"{value:.2g}") for value in log_ticks(min(xs), max(xs))]
    parts = axes.draw(x_label, y_label, rounded)
    places = {name: (axes.x(x), axes.y(y)) for name, (x, y, _) in points.items()}
    labels = label_places(places)
    line = sorted(points[name][:2] for name in front)
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line)
    parts.append(f'<polyline class="line series-0" points="{path}"/>')
    for name, (x, y, (low, high)) in points.items():
        left, kind = axes.x(x), "series-0" if name in front else "series-1"
        parts.append(
            f"<g><title>{escape(name)}: {x:.3g}, {y:.4f} [{low:.4f}, {high:.4f}]</title>"
            f'<path class="whisker" d="M{left:.1f},{axes.y(low):.1f}V{axes.y(high):.1f}"/>'
            f'<circle class="dot {kind}" cx="{left:.1f}" cy="{axes.y(y):.1f}" r="4"/>'
            + _leader(left, axes.y(y), name, labels[name])
            + _text(*labels[name], name, "start")
            + "</g>"
        )
    described = "; ".join(f"{name} {x:.3g}, {y:.4f}" for name, (x, y, _) in points.items())
    return _svg(title, f"{described}; the front: {', '.join(front)}", parts)


def _leader(x: float, y: float, name: str, label: tuple[float, float]) -> str:
    """Draw a line from a point to the nearer end of its label, if the label is not beside it."""
    left, middle = label[0], label[1] - 4
    if abs(middle - y) < 14:
        return ""
    end = left - 2 if left > x else left + LETTER * len(name) + 2
    return f'<path class="leader" d="M{x:.1f},{y:.1f}L{end:.1f},{middle:.1f}"/>'


def label_places(points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return the start (x, y) of a label for each named point: beside it, or further up or down where others
    are in the way, and inside the chart."""
    taken = [(x - 5, x + 5, y) for x, y in points.values()]
    found = {}
    for name, (x, y) in sorted(points.items(), key=lambda point: point[1]):
        width = LETTER * len(name)
        sides = [side for side in (x + 7, x - 7 - width) if LEFT < side < WIDTH - width]
        lefts = sides or [WIDTH - width]
        # Nearer heights first, and on both sides of the point.
        heights = sorted(range(-68, 69, 12), key=abs) if sides else [12, -12, 24, -24, 36, -36]
        places = [
            (left, y + 4 + height)
            for height in heights
            for left in lefts
            if TOP < y + height < HEIGHT - BOTTOM
        ]

        def is_free(place: tuple[float, float], width: float = width) -> bool:
            left, height = place
            return not any(
                low < left + width and left < high and abs(height - 4 - middle) < 12
                for low, high, middle in taken
            )

        left, height = next(filter(is_free, places), places[0])
        taken.append((left, left + width, height - 4))
        found[name] = (left, height)
    return found


def reliability_diagram(title: str, bins: Sequence[Mapping[str, float]]) -> str:
    """Draw accuracy against confidence. bins: low, high, num_images, accuracy, confidence, 0..1.

    For a calibrated classifier, the bars end at the diagonal. The gap between accuracy and mean confidence
    has its own colour, and the strip below shows the number of images in each bin.
    """
    axes = Axes((0, 1), (0, 1), HEIGHT + 60)
    parts = axes.draw("confidence", "accuracy", x_ticks=(0, 0.2, 0.4, 0.6, 0.8, 1))
    most = max(part["num_images"] for part in bins)
    for part in bins:
        x, width = axes.x(part["low"]), axes.x(part["high"]) - axes.x(part["low"])
        low, high = sorted((part["accuracy"], part["confidence"]))
        kind = "overconfident" if part["confidence"] > part["accuracy"] else "underconfident"
        text = (
            f"confidence {part['low']:.2f} to {part['high']:.2f}: {part['num_images']:,} images, "
            f"accuracy {part['accuracy']:.3f}, mean confidence {part['confidence']:.3f}"
        )
        parts.append(
            f"<g><title>{text}</title>"
            + _column("bar", x, width, axes.y(low), axes.y(0))
            + _column(f"gap {kind}", x, width, axes.y(high), axes.y(low))
            + "</g>"
        )
    parts.append(
        f'<line class="ideal" x1="{axes.x(0):.1f}" y1="{axes.y(0):.1f}" x2="{axes.x(1):.1f}" '
        f'y2="{axes.y(1):.1f}"/>'
    )
    strip = Axes((0, 1), (0, most), 80)
    counts = [
        _text(LEFT - 6, TOP + 8, f"{most:,}", "end"),
        _text(LEFT - 6, 80 - BOTTOM, "0", "end"),
    ]
    for part in bins:
        x = strip.x(part["low"])
        width = strip.x(part["high"]) - x
        counts.append(_column("bar", x, width, strip.y(part["num_images"]), strip.y(0)))
    counts.append(
        _text((LEFT + WIDTH - RIGHT) / 2, 80 - BOTTOM + 18, "images at this confidence", "middle")
    )
    worst = max(bins, key=lambda part: abs(part["accuracy"] - part["confidence"]))
    described = (
        f"{len(bins)} bins; the largest gap is at confidence {worst['confidence']:.2f}, where the accuracy "
        f"is {worst['accuracy']:.2f}"
    )
    return _svg(title, described, parts, axes.height) + _svg(
        "Images by confidence", f"at most {most:,} in one bin", counts, 70
    )


def interval_bars(
    title: str,
    rows: Mapping[str, tuple[float, Sequence[float] | None]],
    x_label: str,
    label: int = 92,
) -> str:
    """Draw a horizontal bar 0..1 for each name, with its interval [low, high] as a whisker. label: width of
    the names."""
    line = 22
    height = TOP + line * len(rows) + BOTTOM
    scale = WIDTH - label - RIGHT - 44
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        x = label + value * scale
        bottom = height - BOTTOM
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 16, _number(value), "middle"))
    for number, (name, (value, interval)) in enumerate(rows.items()):
        y = TOP + number * line
        middle = y + line / 2
        shown = _shortened(name, label * 14 // 92)
        parts.append(f"<g><title>{escape(name)}: {value:.4f}</title>")
        parts.append(_text(label - 6, middle + 4, shown, "end"))
        parts.append(
            f'<rect class="bar" x="{label}" y="{y + 4}" width="{value * scale:.1f}" height="{line - 8}"/>'
        )
        if interval:
            low, high = (label + end * scale for end in interval)
            parts.append(
                f'<path class="whisker" d="M{low:.1f},{middle}H{high:.1f}M{low:.1f},{middle - 4}v8'
                f'M{high:.1f},{middle - 4}v8"/>'
            )
        parts.append(_text(label + scale + 8, middle + 4, f"{value:.3f}", "start") + "</g>")
    parts.append(_text(label + scale / 2, height - 4, x_label, "middle"))
    lowest = min(rows, key=lambda name: rows[name][0])
    highest = max(rows, key=lambda name: rows[name][0])
    described = f"lowest {lowest} {rows[lowest][0]:.3f}, highest {highest} {rows[highest][0]:.3f}"
    return _svg(title, described, parts, height)


def interval_dots(
    title: str,
    series: Sequence[str],
    rows: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    x_label: str,
) -> str:
    """Draw up to four values with their intervals [low, high] for each name, one below the other, from 0 on.

    series: what the values are, for the legend; a name may have only the first ones.
    """
    label, line = 92, 10 + 9 * len(series)
    height = TOP + line * len(rows) + BOTTOM
    most = max(high for values in rows.values() for _, (_, high) in values)
    scale = (WIDTH - label - RIGHT) / _rounded(0, most)[1]
    parts = []
    for value in ticks(0, _rounded(0, most)[1]):
        x, bottom = label + value * scale, height - BOTTOM
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 16, _number(value), "middle"))
    for number, (name, values) in enumerate(rows.items()):
        top = TOP + number * line
        shown = name if len(name) <= 14 else name[:13] + "…"
        words = "; ".join(
            f"{each} {value:.4f} [{low:.4f}, {high:.4f}]"
            for each, (value, (low, high)) in zip(series, values, strict=False)
        )
        parts.append(f"<g><title>{escape(name)}: {escape(words)}</title>")
        parts.append(_text(label - 6, top + line / 2 + 4, shown, "end"))
        for place, (value, (low, high)) in enumerate(values):
            y = top + 9.5 + 9 * place
            low, high = label + low * scale, label + high * scale
            parts.append(
                f'<path class="whisker" d="M{low:.1f},{y}H{high:.1f}"/>'
                f'<circle class="dot series-{place}" cx="{label + value * scale:.1f}" cy="{y}" r="3.5"/>'
            )
        parts.append("</g>")
    parts.append(_text((label + WIDTH - RIGHT) / 2, height - 4, x_label, "middle"))
    described = "; ".join(
        f"{name} {', '.join(f'{value:.3f}' for value, _ in values)}"
        for name, values in rows.items()
    )
    return _svg(title, described, parts, height) + _legend(series)


def scatter(
    title: str,
    points: Sequence[tuple[float, float, str]],
    best: int,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    words: Sequence[str] = (),
    line: Sequence[tuple[float, float]] = (),
) -> str:
    """Draw points (x, y, text). best: position of the highlighted point. words: names of x = 0, 1, ...
    line: through the chart, dashed."""
    xs, ys, _ = zip(*points, strict=True)
    ends = (-0.5, len(words) - 0.5) if words else _spread(min(xs), max(xs))
    axes = (LogAxes if log_x else Axes)(ends, _rounded(*_spread(min(ys), max(ys))))
    rounded = [float(f"{value:.2g}") for value in log_ticks(*ends)] if log_x else None
    parts = axes.draw(x_label, y_label, [] if words else rounded)
    for column, word in enumerate(words):
        parts.append(_text(axes.x(column), axes.height - BOTTOM + 16, _shortened(word), "middle"))
    if line:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="line series-1" points="{path}"/>')
    for place in sorted(range(len(points)), key=lambda place: place == best):  # the best one on top
        kind, radius = ("series-1", 5) if place == best else ("series-0", 3)
        parts.append(
            f'<circle class="dot {kind}" cx="{axes.x(xs[place]):.1f}" cy="{axes.y(ys[place]):.1f}" '
            f'r="{radius}"><title>{escape(points[place][2])}</title></circle>'
        )
    described = f"{len(points)} points; the best one: {points[best][2]}"
    return _svg(title, described, parts)


def parallel_coordinates(
    title: str,
    axes: Mapping[str, tuple[str, Sequence[tuple[float, str]]]],
    lines: Sequence[tuple[Sequence[float], str]],
    best: int,
) -> str:
    """Draw a line for each set of values, through vertical axes.

    axes: by name, its label and ticks (position, text); positions are 0..1. lines: a position on each axis,
    and the text of the line; the position on the last axis, 1 for the best, says how strong a line is. best:
    number of the highlighted line.
    """
    width, top, bottom = 2 * WIDTH, 34, HEIGHT + 20
    left, right = 40, width - 60
    gap = (right - left) / (len(axes) - 1)

    def y(share: float) -> float:
        return bottom - share * (bottom - top)

    parts = []
    for number in sorted(
        range(len(lines)), key=lambda number: (number == best, lines[number][0][-1])
    ):
        places, text = lines[number]
        path = " ".join(f"{left + i * gap:.1f},{y(share):.1f}" for i, share in enumerate(places))
        kind = "series-1 whole" if number == best else "series-0"
        opacity = 1 if number == best else 0.15 + 0.55 * places[-1]
        parts.append(
            f'<polyline class="line {kind}" points="{path}" opacity="{opacity:.2f}">'
            f"<title>{escape(text)}</title></polyline>"
        )
    for i, (label, marks) in enumerate(axes.values()):
        x = left + i * gap
        # Labels of neighbours are at two heights, so that long names do not meet.
        parts.append(f'<path class="axis" d="M{x:.1f},{top}V{bottom}"/>')
        parts.append(_text(x, top - (22 if i % 2 else 8), label, "middle"))
        for share, text in marks:
            parts.append(
                f'<path class="axis" d="M{x:.1f},{y(share):.1f}h4"/>'
                f'<g class="halo">{_text(x + 6, y(share) + 4, _shortened(text), "start")}</g>'
            )
    described = f"{len(lines)} lines; the best one: {lines[best][1]}"
    return _svg(title, described, parts, bottom + 10, width)


def _shortened(word: str, limit: int = 14) -> str:
    return word if len(word) <= limit else word[: limit - 1] + "…"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Choose about `about` round numbers between low and high."""
    step = _step(low, high, about)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Choose the powers of ten between low and high, or both ends if there are fewer than two."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**exponent for exponent in range(first, last + 1)]
    return powers if len(powers) > 1 else [low, high]


def _step(low: float, high: float, about: int = 5) -> float:
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Widen the range to whole steps."""
    step = _step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _spread(low: float, high: float) -> tuple[float, float]:
    """Widen an empty range."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def thinned(points: Sequence[tuple[float, float]], limit: int = 200) -> list[tuple[float, float]]:
    """Reduce points to at most `limit`, by averaging consecutive groups."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(np.mean(group, axis=0).tolist()) for group in groups]


def _number(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:g}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _column(kind: str, x: float, width: float, top: float, bottom: float) -> str:
    return (
        f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{top:.1f}" width="{max(width - 1, 1):.1f}" '
        f'height="{bottom - top:.1f}"/>'
    )


def _legend(names: Sequence[str]) -> str:
    entries = "".join(
        f'<li><span class="swatch series-{number}"></span>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend" aria-hidden="true">{entries}</ul>'


def _svg(
    title: str, described: str, parts: Sequence[str], height: float = HEIGHT, width: float = WIDTH
) -> str:
    name = re.sub(r"\W+", "-", title.lower())  # titles are unique in a page
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(described)}</desc>' + "".join(parts) + "</svg>"
    )
