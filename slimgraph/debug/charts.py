"""Small charts for the report, as SVG that takes its colours from the page; and the same as files, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from slimgraph.errors import CheckpointError, ModelError

__all__ = ["Series", "bars", "lines", "write_plots"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 230, 52, 12, 14, 34
_TICKS = 5

Series = Mapping[str, Sequence[float | None]]
"""What is drawn, by name: one number per layer, None where there is none."""


def lines(series: Series, label: str, unit: str = "") -> Markup:
    """A line per series over the layers; every point can be reached by mouse and keyboard."""
    drawn = [v for s in series.values() for v in s if v is not None]
    low, top = _range(min([0.0, *drawn]), max([0.0, *drawn]))
    count = max((len(s) for s in series.values()), default=0)
    parts = _frame(label, count, low, top)
    for i, (name, values) in enumerate(series.items()):
        points = [(_x(k, count), _y(v, low, top), k, v) for k, v in enumerate(values) if v is not None]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in points) if points else ""
        parts.append(Markup('<path class="line s{}" d="{}"/>').format(i, path))
        for x, y, layer, value in points:
            tip = f"layer {layer}\n{name}: {value:.4g}{unit}"
            parts.append(
                Markup(
                    '<circle class="dot s{}" tabindex="0" role="img" aria-label="{}" data-tip="{}" cx="{:.1f}" '
                ).format(i, tip, tip, x)
                + Markup('cy="{:.1f}" r="3.5"/>').format(y)
            )
    return _closed(parts)


def bars(before: Sequence[float], after: Sequence[float], label: str) -> Markup:
    """A pair of bars per layer: what it had, as an outline, and what it has."""
    _, top = _range(0.0, max([*before, 1.0]))
    count = len(before)
    parts = _frame(label, count, 0.0, top)
    width = max(2.0, (_WIDTH - _LEFT - _RIGHT) / max(1, count) * 0.62)
    for k, (old, new) in enumerate(zip(before, after, strict=True)):
        x = _x(k, count) - width / 2
        tip = f"layer {k}\n{old:,.0f} before, {new:,.0f} after\n{1 - new / old:.1%} less" if old else f"layer {k}"
        bar = '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5"/>'
        parts.append(Markup('<g class="bar" tabindex="0" role="img" aria-label="{}" data-tip="{}">').format(tip, tip))
        for style, value in (("was", old), ("is", new)):
            y = _y(value, 0.0, top)
            parts.append(Markup(bar).format(style, x, y, width, _HEIGHT - _BOTTOM - y))
        parts.append(Markup("</g>"))
    return _closed(parts)


def write_plots(directory: Path, plots: Mapping[str, tuple[str, Series]]) -> list[Path]:
    """Draw line charts over the layers, each as PNG and SVG.

    Args:
        directory: where to; made if need be.
        plots: file name without ending -> (label of the vertical axis, series).

    Raises:
        ModelError: matplotlib is not installed.
        CheckpointError: the directory cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModelError("plots are drawn by matplotlib: pip install 'slimgraph[report]'") from error
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": "slimgraph", "font.size": 9}):
            for name, (label, series) in plots.items():
                figure = Figure(figsize=(7.2, 3.0), layout="constrained")
                _plot(figure.subplots(), label, series)
                for ending in ("png", "svg"):
                    written.append(directory / f"{name}.{ending}")
                    figure.savefig(written[-1], dpi=160)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error
    return written


def _plot(axes: Any, label: str, series: Series) -> None:
    for name, values in series.items():
        axes.plot(range(len(values)), [math.nan if v is None else v for v in values], marker="o", ms=3, label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


# ---- the frame of a chart ----


def _frame(label: str, count: int, low: float, top: float) -> list[Markup]:
    parts = [
        Markup('<svg class="chart" role="group" aria-label="{}" viewBox="0 0 {} {}">').format(label, _WIDTH, _HEIGHT)
    ]
    for i in range(_TICKS + 1):
        value = low + (top - low) * i / _TICKS
        y = _y(value, low, top)
        parts.append(
            Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, y, _WIDTH - _RIGHT)
            + Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                _LEFT - 8, y + 4, _short(value)
            )
        )
    step = max(1, math.ceil(count / 16))
    parts += [
        Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            _x(k, count), _HEIGHT - 16, k
        )
        for k in range(0, count, step)
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">layer</text>').format(middle, _HEIGHT - 2)
    )
    return parts


def _closed(parts: Sequence[Markup]) -> Markup:
    return Markup("").join([*parts, Markup("</svg>")])


def _x(index: int, count: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (index + 0.5) / max(1, count)


def _y(value: float, low: float, top: float) -> float:
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (top - low))


def _range(low: float, top: float) -> tuple[float, float]:
    """Ends of an axis whose ticks are round numbers, zero among them.

    >>> _range(0.0, 0.861), _range(-0.0113, 0.0963)
    ((0.0, 1.0), (-0.025, 0.1))
    """
    step = _nice((top - low) / _TICKS)
    first = math.floor(low / step)
    while first * step + _TICKS * step < top:
        step = _nice(step * 1.01)
        first = math.floor(low / step)
    return round(first * step, 12), round((first + _TICKS) * step, 12)


def _nice(value: float) -> float:
    """The next round number: 1, 2, 2.5 or 5 times a power of ten.

    >>> [_nice(v) for v in (0.861, 0.03, 7.0)]
    [1.0, 0.05, 10.0]
    """
    if value <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= value * (1 - 1e-9)), 10 * power)


def _short(value: float) -> str:
    """A number on an axis.

    >>> [_short(v) for v in (0.0, 0.25, 1500.0, 2_500_000.0)]
    ['0', '0.25', '1.5k', '2.5M']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.3g}"
