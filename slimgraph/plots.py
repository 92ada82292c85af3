"""A comparison as a picture: perplexity and tasks against size, and tokens per second.

Needs matplotlib, which comes with the extra `report`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
    entries = _by_size(comparison)
    for text in comparison.entries[0].perplexities:
        found = [e.perplexities[text] for e in entries]
        axes.errorbar(
            [_share(comparison, e) for e in entries],
            [p.value for p in found],
            [p.standard_error for p in found],
            marker="o",
            capsize=3,
            label=text,
        )
    axes.set_yscale("log")
    axes.set_ylabel("perplexity (lower is better)")
    _finish_sizes(axes, comparison)


def _tasks(axes: Axes, comparison: Comparison) -> None:
    entries = _by_size(comparison)
    for task in comparison.entries[0].tasks:
        axes.plot([_share(comparison, e) for e in entries], [e.tasks[task] for e in entries], marker="o", label=task)
    axes.set_ylabel("score (higher is better)")
    _finish_sizes(axes, comparison)


def _speeds(axes: Axes, comparison: Comparison) -> None:
    measured = [(e.name, e.speed) for e in comparison.entries if e.speed is not None]
    names = [name for name, _ in measured]
    axes.barh(names, [s.decode.median for _, s in measured], xerr=[s.decode.spread for _, s in measured])
    axes.invert_yaxis()
    axes.set_xlabel("decoded tokens per second (higher is better)")


def _finish_sizes(axes: Axes, comparison: Comparison) -> None:
    axes.set_xlabel(f"parameters, % of {comparison.entries[0].name}")
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def _by_size(comparison: Comparison) -> list[Entry]:
    return sorted(comparison.entries, key=lambda e: -e.cost.parameters)


def _share(comparison: Comparison, entry: Entry) -> float:
    return 100 * comparison.share(entry)
