"""What a pruning run did, in words: per layer, in all, and how long each stage took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from slimgraph.pipeline import Result

__all__ = ["LayerReport", "layers_of", "report", "table"]


@dataclass(frozen=True)
class LayerReport:
    """What a layer has before and after.

    Attributes:
        layer: its index.
        heads, kv_groups, channels: (before, after); None where the layer has none that were looked at.
        unit_ratio: share of the units that went, the mean over its sites; None where there is no site.
        similarity: cosine similarity of its input and output on the dense model, or None.
    """

    layer: int
    heads: tuple[int, int] | None
    kv_groups: tuple[int, int] | None
    channels: tuple[int, int] | None
    unit_ratio: float | None
    similarity: float | None


def layers_of(result: Result) -> list[LayerReport]:
    """Every layer of a result."""
    found = []
    for layer in range(len(result.structure.layers)):
        counts: dict[str, tuple[int, int]] = {}
        shares = []
        for site in result.structure.prunable_sites():
            if site.layer != layer:
                continue
            before, after = _units(result, layer, site.groups)
            counts[site.kind] = _sum(counts.get(site.kind), before, after)
            shares.append(1 - after / before)
            if len(site.groups) > 1:
                counts["kv"] = _sum(counts.get("kv"), *_units(result, layer, site.groups[:1]))
        found.append(
            LayerReport(
                layer,
                counts.get("heads"),
                counts.get("kv"),
                counts.get("channels"),
                1.0 if result.structure.layers[layer] in result.plan.skipped else fmean(shares) if shares else None,
                result.similarity[layer] if result.similarity else None,
            )
        )
    return found


def report(result: Result, *, inner: Mapping[str, str] | None = None) -> str:
    """Everything a reader wants to know about a result, as text.

    Args:
        result: of `slimgraph.prune`.
        inner: stage -> the stage that its seconds are among; see `slimgraph.progress.Stopwatch.outer`.
    """
    before, after = result.parameters_before, result.parameters_after
    lines = [
        _layer_table(layers_of(result)),
        "",
        f"parameters   {before:,} -> {after:,}: {1 - after / before:.2%} removed",
    ]
    if result.difference is not None:
        lines.append(f"module       logits differ from the graph's by {result.difference:.1e} of the largest logit")
    lines.append(f"seconds      {seconds(result.seconds, inner or {})}")
    return "\n".join(lines)


def seconds(stages: Mapping[str, float], inner: Mapping[str, str]) -> str:
    """Seconds by stage, stages inside others in brackets, and their sum.

    >>> seconds({"sweep": 2.0, "solves": 0.5, "surgery": 1.0}, {"solves": "sweep"})
    'sweep 2.0 (solves 0.5), surgery 1.0, in all 3.0'
    """
    parts = []
    for stage, spent in stages.items():
        if stage in inner:
            continue
        inside = ", ".join(f"{name} {stages[name]:.1f}" for name, outer in inner.items() if outer == stage)
        parts.append(f"{stage} {spent:.1f}" + (f" ({inside})" if inside else ""))
    whole = math.fsum(spent for stage, spent in stages.items() if stage not in inner)
    return ", ".join([*parts, f"in all {whole:.1f}"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, for a terminal.

    >>> print(table(["layer", "heads"], [["0", "9 -> 6"], ["10", "9"]]))
    layer   heads
        0  9 -> 6
       10       9
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [header, *rows])


def _layer_table(layers: Sequence[LayerReport]) -> str:
    """Columns that say nothing are left out."""
    columns: dict[str, list[str]] = {
        "layer": [str(each.layer) for each in layers],
        "heads": [_change(each.heads) for each in layers],
        "kv groups": [_change(each.kv_groups) for each in layers],
        "channels": [_change(each.channels) for each in layers],
        "unit ratio": ["" if each.unit_ratio is None else f"{each.unit_ratio:.3f}" for each in layers],
        "similarity": ["" if each.similarity is None else f"{each.similarity:.3f}" for each in layers],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return table(list(shown), list(zip(*shown.values(), strict=True)))


def _change(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return ""
    before, after = counts
    return str(before) if before == after else f"{before} -> {after}"


def _units(result: Result, layer: int, groups: Sequence[str]) -> tuple[int, int]:
    """Units of nested groups before and after; none are left of a layer that is skipped."""
    cuts = result.plan.cuts
    before = math.prod(result.structure.group(name).units for name in groups)
    if result.structure.layers[layer] in result.plan.skipped:
        return before, 0
    after = math.prod(cuts[name].kept if name in cuts else result.structure.group(name).units for name in groups)
    return before, after


def _sum(counts: tuple[int, int] | None, before: int, after: int) -> tuple[int, int]:
    return (before, after) if counts is None else (counts[0] + before, counts[1] + after)
