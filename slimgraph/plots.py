"""A comparison as a picture: perplexity and tasks against size, and tokens per second.

Needs matplotlib, which comes with the extra `report`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from slimgraph.compare import Comparison, Entry
from slimgraph.errors import CheckpointError, EvaluationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SUFFIXES", "check_plot", "plot"]

SUFFIXES = (".png", ".svg")

_PANEL = (5.2, 4.0)  # inches


def check_plot(path: Path) -> None:
    """Check, before the work, that a picture can be made there.

    Raises:
        CheckpointError: the path is not that of a picture in a directory that exists.
        EvaluationError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise CheckpointError(f"{path} is not a file in a directory that exists; give another place for the picture")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EvaluationError(
            "pictures need matplotlib, which is not installed: pip install 'slimgraph[report]'"
        ) from error


def plot(comparison: Comparison, path: str | Path) -> Path:
    """Draw a comparison: one panel each for perplexities, tasks and speed, as far as they were measured.

    Args:
        comparison: of models with something to draw.
        path: of the picture, `.png` or `.svg`; replaced when it is there.

    Raises:
        CheckpointError: the picture cannot be written.
        EvaluationError: matplotlib is not installed, or nothing was measured that can be drawn.
    """
    target = Path(path)
    check_plot(target)
    from matplotlib.figure import Figure

    first = comparison.entries[0]
    panels: list[Callable[[Axes, Comparison], None]] = [
        *([_perplexities] if first.perplexities else []),
        *([_tasks] if first.tasks else []),
        *([_speeds] if first.speed else []),
    ]
    if not panels:
        raise EvaluationError("nothing to draw: ask for a text, a task or the speed as well")
    figure = Figure(figsize=(_PANEL[0] * len(panels), _PANEL[1]), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        panel(axes, comparison)
    partial = target.with_name(f".{target.name}.partial{target.suffix}")
    try:
        figure.savefig(partial, dpi=150)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def _perplexities(axes: Axes, comparison: Comparison) -> None:
    for number, text in enumerate(comparison.entries[0].perplexities):
        _by_share(axes, comparison, f"C{number}", text, partial(_perplexity, text))
    axes.set_yscale("log")
    axes.set_ylabel("perplexity (lower is better)")
    _finish_shares(axes, comparison)


def _tasks(axes: Axes, comparison: Comparison) -> None:
    for number, task in enumerate(comparison.entries[0].tasks):
        _by_share(axes, comparison, f"C{number}", task, partial(_score, task))
    axes.set_ylabel("score (higher is better)")
    _finish_shares(axes, comparison)


def _perplexity(text: str, entry: Entry) -> tuple[float, float]:
    """A value and its error."""
    found = entry.perplexities[text]
    return found.value, 0.0 if math.isnan(found.standard_error) else found.standard_error


def _score(task: str, entry: Entry) -> tuple[float, float]:
    return entry.tasks[task], 0.0


def _by_share(
    axes: Axes, comparison: Comparison, colour: str, label: str, value: Callable[[Entry], tuple[float, float]]
) -> None:
    """Points over the share of parameters that is left; those of one series are joined."""
    labels = [label]
    for series in dict.fromkeys(e.series for e in comparison.entries):
        entries = sorted((e for e in comparison.entries if e.series == series), key=comparison.share)
        shares, values = [100 * comparison.share(e) for e in entries], [value(e) for e in entries]
        axes.errorbar(
            shares,
            [v for v, _ in values],
            [error for _, error in values],
            color=colour,
            marker="o",
            capsize=3,
            label=labels.pop() if labels else None,
        )
        if len(entries) == 1:  # a point that no line explains
            axes.annotate(
                entries[0].name, (shares[0], values[0][0]), (4, 4), textcoords="offset points", fontsize="x-small"
            )


def _speeds(axes: Axes, comparison: Comparison) -> None:
    measured = [(e.name, e.speed) for e in comparison.entries if e.speed is not None]
    names = [name for name, _ in measured]
    axes.barh(names, [s.decode.median for _, s in measured], xerr=[s.decode.spread for _, s in measured])
    axes.invert_yaxis()
    axes.set_xlabel("decoded tokens per second (higher is better)")


def _finish_shares(axes: Axes, comparison: Comparison) -> None:
    axes.set_xlabel(f"parameters, % of {comparison.entries[0].name}")
    axes.invert_xaxis()
    axes.margins(0.12)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
