"""The report's charts: each function draws one, from plain numbers, and returns its PNG."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.core.records import Metric
from pipeline.explore import plots

WIDTH, HEIGHT = 4.6, 2.7  # inches: readable on a phone at full width


def in_both_lights(draw: Callable[[bool], bytes]) -> dict[str, str]:
    """One chart as data URIs for a light and for a dark page; draw: gets dark, returns a PNG."""
    return {"light": plots.data_uri(draw(False)), "dark": plots.data_uri(draw(True))}


def training_curve(
    steps: dict[str, Sequence[float]], values: dict[str, Sequence[float]], label: str, dark: bool
) -> bytes:
    """Lines over training steps: {name: steps}, {name: values}; a name with floor in it is dashed."""
    with plots.style(dark) as colours:
        figure, ax = _chart()
        for name, line in values.items():
            floor = "floor" in name
            style = {
                "color": colours["floor" if floor else "student"],
                "ls": "--" if floor else "-",
            }
            single = "o" if len(line) == 1 else None
            ax.plot(steps[name], line, label=name, marker=single, lw=1.4, **style)
        ax.set(xlabel="training step", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(values) > 1:
            ax.legend()
        return plots.png(figure, transparent=True)


def quality_chart(rows: list[tuple[str, Metric]], dark: bool) -> bytes:
    """Each figure with its interval, as its share of the way from floor (0) to ceiling (1)."""
    with plots.style(dark) as colours:
        figure = plots.Figure(figsize=(WIDTH, 0.6 + 0.26 * len(rows)), layout="constrained")
        ax = figure.subplots()
        for line, (_, metric) in enumerate(rows):
            interval = [metric.share(metric.low), metric.share(metric.high)]
            ax.plot(interval, [line, line], color=colours["student"], lw=3, alpha=0.5)
            ax.plot([metric.share(metric.value)], [line], "o", color=colours["student"], ms=5)
        ax.axvline(0, color=colours["floor"], ls="--", lw=1)
        ax.axvline(1, color=colours["teacher"], ls="--", lw=1)
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xticks([0, 0.5, 1], ["floor", "half-way", "ceiling"])
        ax.set_xlim(-0.15, 1.15)  # a figure whose ceiling is near its floor may leave the chart
        return plots.png(figure, transparent=True)


def distance_chart(distances: np.ndarray, dark: bool) -> bytes:
    """(L, H) mean attention distances in px: a dot per head over its layer."""
    with plots.style(dark) as colours:
        figure, ax = _chart()
        layers, heads = distances.shape
        ax.plot(
            np.repeat(np.arange(1, layers + 1), heads),
            distances.ravel(),
            "o",
            color=colours["student"],
            ms=4,
            alpha=0.6,
        )
        ax.set(xlabel="layer", ylabel="mean distance, px", xticks=range(1, layers + 1))
        ax.set_ylim(0, 1.1 * distances.max())
        return plots.png(figure, transparent=True)


def histogram(values: np.ndarray, label: str, limit: float, dark: bool) -> bytes:
    """How values are spread, and a dashed line at a limit."""
    with plots.style(dark) as colours:
        figure, ax = _chart()
        ax.hist(values, bins=40, color=colours["student"], alpha=0.8)
        ax.axvline(limit, color=colours["floor"], ls="--", lw=1)
        ax.set(xlabel=label, ylabel="patches")
        return plots.png(figure, transparent=True)


def speed_chart(
    series: dict[str, Sequence[tuple[float, float]]], floor: float, dark: bool
) -> bytes:
    """A point per run: {name: [(images a second, cosine to the teacher)]}; floor: a cosine."""
    with plots.style(dark) as colours:
        figure, ax = _chart()
        baselines = iter("s^vPXd")
        for name, points in series.items():
            own = {"student": "o", "teacher": "D"}
            marker = own[name] if name in own else next(baselines, "x")
            colour = colours["teacher" if name == "teacher" else "student"]
            face = colour if name in own else "none"
            ax.plot(*zip(*points, strict=True), marker, color=colour, mfc=face, label=name)
        ax.axhline(floor, color=colours["floor"], ls="--", lw=1, label="the mean embedding")
        ax.set(xlabel="images per second", ylabel="cosine to the teacher", xscale="log")
        ax.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.legend()
        return plots.png(figure, transparent=True)


def mosaic(tiles: np.ndarray, columns: int, gap: int = 1, paper: int = 255) -> np.ndarray:
    """(n, h, w, 3) uint8 -> one image, in rows of so many columns with gaps of px between them."""
    n, height, width, _ = tiles.shape
    rows = -(-n // columns)
    sheet = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), paper, np.uint8
    )
    for i, one in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = one
    return sheet


def coloured(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(...) values -> (..., 3) uint8 colours of the scale from low to high."""
    return (plots.MAP(((values - low) / max(high - low, 1e-12)).clip(0, 1))[..., :3] * 255).astype(
        np.uint8
    )


def _chart() -> tuple[plots.Figure, Any]:
    figure = plots.Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots()
