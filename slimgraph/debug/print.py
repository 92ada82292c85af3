"""What was inferred about a model, in words: layers, heads, channels, what is tied, what is frozen and why."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from slimgraph.analysis import Refusal
from slimgraph.groups import Group, Site, Structure, infer
from slimgraph.pretrained import load_model
from slimgraph.trace import trace

__all__ = ["Inspection", "inspect", "kinds_of_layers"]

_STATIC_SHAPE = (1, 16)  # (batch, tokens) for models that cannot be traced with free ones
_MOST_NAMES = 6  # listed before "and n more"


@dataclass(frozen=True, repr=False)
class Inspection:
    """What was inferred about a model. Prints as text, and as HTML in notebooks.

    Attributes:
        model: name of the model's class.
        parameters: number of them; tied ones count once.
        structure: groups, sites and layers, for programs.
    """

    model: str
    parameters: int
    structure: Structure

    def sections(self) -> list[Section]:
        """The description, layers that are alike taken together."""
        structure = self.structure
        return [
            Section("Residual stream", _residual(structure)),
            *(Section(title, _layer_lines(structure, layer)) for title, layer in kinds_of_layers(structure)),
            Section("Outside the layers", _outside(structure)),
            Section("Tied parameters", [f"{name} is read in {n} places" for name, n in structure.tied.items()]),
            Section("Frozen axes", _frozen_outside(structure)),
            Section("Operators without a rule", _refusals(structure)),
        ]

    def __repr__(self) -> str:
        blocks = [self._headline()]
        for section in self.sections():
            lines = section.lines or [Line("none")]
            blocks.append("\n".join([f"{section.title}:", *(str(line) for line in lines)]))
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self._headline())}</b></p>"]
        for section in self.sections():
            rows = "".join(
                f'<tr><td style="text-align:left;padding-left:{1 + line.depth}em">{html.escape(line.text)}</td></tr>'
                for line in (section.lines or [Line("none")])
            )
            parts.append(
                f"<details open><summary>{html.escape(section.title)}</summary><table>{rows}</table></details>"
            )
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every group, site and layer; see `slimgraph.groups.Structure.to_dict`."""
        return self.structure.to_dict()

    def _headline(self) -> str:
        paths = self.structure.layers
        ends = f" ({paths[0]} to {paths[-1]})" if len(paths) > 1 else ""
        count = f"{len(paths)} layer{'' if len(paths) == 1 else 's'}"
        return f"{self.model}: {self.parameters:,} parameters in {count}{ends}"


class Line:
    """A line of the description, indented by its depth."""

    def __init__(self, text: str, depth: int = 0) -> None:
        self.text = text
        self.depth = depth

    def __str__(self) -> str:
        return "  " * (self.depth + 1) + self.text


class Section:
    """A title and its lines."""

    def __init__(self, title: str, lines: Sequence[Line | str]) -> None:
        self.title = title
        self.lines = [Line(line) if isinstance(line, str) else line for line in lines]


def inspect(model: nn.Module | str | Path, *, trust_remote_code: bool = False) -> Inspection:
    """Trace a model and say what was inferred about it.

    Args:
        model: a causal language model, or the directory or hub name of one, of which only the configuration is read.
        trust_remote_code: let the checkpoint bring its own modeling code.

    Raises:
        ModelError: there is no such model, or it cannot be traced.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model, meta=True, trust_remote_code=trust_remote_code)
    structure = infer(trace(model, shape=_STATIC_SHAPE))
    return Inspection(type(model).__name__, sum(p.numel() for p in model.parameters()), structure)


# ---- the layers ----


def kinds_of_layers(structure: Structure) -> Iterator[tuple[str, int]]:
    """A title for each kind of layer, and the first layer of that kind."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for layer in range(len(structure.layers)):
        # Names of graph nodes in a reason differ in their number only.
        kind = tuple(re.sub(r"_\d+\b", "", str(line)) for line in _layer_lines(structure, layer))
        kinds.setdefault(kind, []).append(layer)
    for layers in kinds.values():
        first = structure.layers[layers[0]]
        many = "Layers" if len(layers) > 1 else "Layer"
        yield f"{many} {_ranges(layers)} ({re.sub(r'[0-9]+$', '*', first) if len(layers) > 1 else first})", layers[0]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short.

    >>> _ranges([0, 1, 2, 4, 6, 7])
    '0-2, 4, 6-7'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _layer_lines(structure: Structure, layer: int) -> list[Line]:
    prefix = structure.layers[layer] + "."
    lines: list[Line] = []
    for site in structure.sites:
        if site.layer == layer:
            lines += _site_lines(structure, site, prefix)
    lines += _inner_lines(structure, prefix)
    for group in structure.groups.values():
        if group.frozen and group.name.startswith(prefix):
            lines.append(Line(f"frozen: {group.name.removeprefix(prefix)}, {group.units} positions: {group.frozen}"))
    return lines or [Line("nothing that can be removed")]


def _site_lines(structure: Structure, site: Site, prefix: str) -> list[Line]:
    why = structure.left_alone(site)
    groups = [structure.group(name) for name in site.groups]
    origins = dict.fromkeys(f"{o.parameter}[{o.dim}]" for o in site.origins)
    lines = [
        Line(f"{_what(site, groups)}"),
        Line(f"site: {site.name.removeprefix(prefix)}{'' if why is None else ', left alone: ' + why}", 1),
        Line(f"made by: {_listed(name.removeprefix(prefix) for name in origins) or 'no projection'}", 1),
    ]
    projections = {site.parameter, *(o.parameter for o in site.origins)}
    others = dict.fromkeys(o.source for g in groups for o in g.occurrences if o.source not in projections)
    if others:
        lines.append(Line(f"also cut: {_listed(name.removeprefix(prefix) for name in others)}", 1))
    return lines


def _what(site: Site, groups: Sequence[Group]) -> str:
    if site.kind == "channels" and site.writes_residual:
        return f"feed-forward: {groups[0].units} channels"
    inside = site.channels
    for g in groups:
        inside //= g.units
    if site.kind != "heads":
        return f"{site.kind}: {groups[0].units}"
    if len(groups) == 2:
        return f"attention: {groups[0].units} kv groups × {groups[1].units} heads × {inside}"
    return f"attention: {groups[0].units} heads × {inside}"


def _inner_lines(structure: Structure, prefix: str) -> Iterator[Line]:
    """Positions inside heads, and experts."""
    for group in structure.groups.values():
        if group.kind not in ("inner", "experts") or group.frozen:
            continue
        times = Counter((o.source, o.dim) for o in group.occurrences if o.source.startswith(prefix))
        if not times:
            continue
        if group.kind == "experts":
            yield Line(f"experts: {group.units}, left alone: a router picks from them")
            continue
        places = _listed(f"{source.removeprefix(prefix)}[{dim}]" for source, dim in times)
        tied = "; its halves are tied, as by a rotary embedding" if _has_halves(group) else ""
        yield Line(f"inside: {group.units} positions: {places}{tied}")


def _has_halves(group: Group) -> bool:
    """Whether the group is several neighbouring parts of what lies inside a head."""
    parents = Counter((o.source, o.dim, o.place[:-1]) for o in group.occurrences if len(o.place) > 1)
    return any(times > 1 for times in parents.values())


# ---- the rest ----


def _residual(structure: Structure) -> list[str]:
    lines = []
    for group in structure.groups.values():
        if group.kind == "residual":
            tensors = len({o.source for o in group.occurrences})
            line = f"{group.units} positions, the same ones in {tensors} tensors of all layers: {group.name}"
            if group.statistics:
                line += f"; {len(group.statistics)} means, variances or sums are taken over it"
            lines.append(line + (f"; frozen: {group.frozen}" if group.frozen else "") + "; left alone")
    return lines


def _outside(structure: Structure) -> list[str]:
    """Sites that belong to no layer."""
    return [f"site: {site.name}, {site.structure} {site.kind}" for site in structure.sites if site.layer is None]


def _frozen_outside(structure: Structure) -> list[str]:
    """Frozen groups outside the layers, without those that no parameter or buffer has."""
    made = {node.name for node in structure.analysis.created}
    return [
        f"{group.name}, {group.units} positions: {group.frozen}"
        for group in structure.groups.values()
        if group.frozen
        and group.kind != "residual"
        and any(o.source not in made for o in group.occurrences)
        and not any(group.name.startswith(path + ".") for path in structure.layers)
    ]


def _refusals(structure: Structure) -> list[str]:
    alike: dict[str, list[Refusal]] = {}
    for refusal in structure.refusals:
        alike.setdefault(refusal.operator + (f" ({refusal.why})" if refusal.why else ""), []).append(refusal)
    lines = []
    for what, found in alike.items():
        axes = dict.fromkeys(axis for refusal in found for axis in refusal.frozen)
        lines.append(f"{what} at {_listed(refusal.node for refusal in found)}: froze {_listed(axes)}")
    return lines


def _listed(names: Iterable[str]) -> str:
    """Names with commas, not too many of them.

    >>> _listed("abcdefgh")
    'a, b, c, d, e, f and 2 more'
    """
    everything = list(names)
    shown = ", ".join(everything[:_MOST_NAMES])
    return shown if len(everything) <= _MOST_NAMES else f"{shown} and {len(everything) - _MOST_NAMES} more"
