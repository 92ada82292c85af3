"""What pruning changed, read off two graphs and the checkpoint's manifest; no weights are needed."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from slimgraph.attributes import integers_of
from slimgraph.debug.opened import Opened, Source, open_model, original, parameters_of, plan_between, skipped_in
from slimgraph.debug.report import table
from slimgraph.debug.weave import align
from slimgraph.errors import ModelError, PlanError
from slimgraph.groups import Structure
from slimgraph.plan import Plan, resolve
from slimgraph.rules import operator_name
from slimgraph.trace import module_path

__all__ = ["Attribute", "Difference", "GroupChange", "LayerChange", "Parameter", "View", "diff"]

_MOST_UNITS = 12  # listed before "..."


@dataclass(frozen=True)
class GroupChange:
    """A group that lost units.

    Attributes:
        group, kind, layer: as in the structure.
        units: before, counted over all units of `within`, if any.
        kept: after.
        removed: indices that went: one row, or one for each unit of the group `within`.
        within: the group on whose unit it depends which ones went, or None.
    """

    group: str
    kind: str
    layer: int | None
    units: int
    kept: int
    removed: tuple[tuple[int, ...], ...]
    within: str | None

    @property
    def share(self) -> float:
        """Share of the units that went."""
        return 1 - self.kept / self.units


@dataclass(frozen=True)
class Parameter:
    """A parameter whose shape changed; `before` is None for one that was added, `after` for one that went."""

    name: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None


@dataclass(frozen=True)
class View:
    """A graph node whose size arguments changed: its operator, the module that runs it, and its arguments."""

    node: str
    operator: str
    module: str
    before: str
    after: str


@dataclass(frozen=True)
class Attribute:
    """A Python attribute of a module that holds another value."""

    module: str
    attribute: str
    before: Any
    after: Any


@dataclass(frozen=True)
class LayerChange:
    """A layer's parameters before and after, and (before, after) units of each kind."""

    layer: int
    path: str
    parameters: tuple[int, int]
    units: dict[str, tuple[int, int]]


@dataclass(frozen=True, repr=False)
class Difference:
    """The structural difference of two models; prints as text, and as HTML in notebooks.

    Attributes:
        dense, pruned: what was compared.
        parameters_before, parameters_after: numbers of them; tied ones count once.
        groups, parameters, views, attributes: what changed.
        layers: every layer.
        notes: what could not be told.
    """

    dense: str
    pruned: str
    parameters_before: int
    parameters_after: int
    groups: tuple[GroupChange, ...]
    parameters: tuple[Parameter, ...]
    views: tuple[View, ...]
    attributes: tuple[Attribute, ...]
    layers: tuple[LayerChange, ...]
    notes: tuple[str, ...] = ()

    @property
    def biases(self) -> list[Parameter]:
        """Parameters that the dense model does not have."""
        return [p for p in self.parameters if p.before is None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        groups = [{**asdict(g), "share": g.share} for g in self.groups]
        return {**asdict(self), "groups": groups, "biases": [p.name for p in self.biases]}

    def to_markdown(self) -> str:
        """The same as Markdown tables."""
        parts = [f"# {self.pruned} against {self.dense}", _headline(self)]
        for title, header, rows in _tables(self):
            body = [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
            parts.append("\n".join([f"## {title}", "", *(body if rows else ["none"])]))
        return "\n\n".join([*parts, *self.notes]) + "\n"

    def __repr__(self) -> str:
        parts = [f"{self.pruned} against {self.dense}\n{_headline(self)}"]
        parts += [
            f"{title}:\n{_indented(table(header, rows)) if rows else '  none'}" for title, header, rows in _tables(self)
        ]
        return "\n\n".join([*parts, *self.notes])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{html.escape(self.pruned)}</b> against {html.escape(self.dense)}: {_headline(self)}</p>"]
        for title, header, rows in _tables(self):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
            parts.append(
                f"<details><summary>{title} ({len(rows)})</summary><table><tr>{head}</tr>{body}</table></details>"
            )
        return "".join([*parts, *(f"<p>{html.escape(note)}</p>" for note in self.notes)])


def diff(dense: Source | Opened | None, pruned: Source | Opened, *, trust_remote_code: bool = False) -> Difference:
    """Say how a pruned model differs in structure from the one it was made from. Reads no weights.

    Args:
        dense: a model in memory, or the directory or hub name of one; None for what the pruned model's class builds
            from its configuration, which is what it was made from.
        pruned: likewise.
        trust_remote_code: let checkpoints bring their own modeling code.

    Raises:
        ModelError: a model cannot be loaded or traced, or the two are not of one kind.
    """
    after = open_model(pruned, values=False, trust_remote_code=trust_remote_code)
    if dense is None:
        before = open_model(original(after.model), values=False)
        before = Opened("its original", before.model, before.structure, before.weights, None, before.device)
    else:
        before = open_model(dense, values=False, trust_remote_code=trust_remote_code)
    if type(before.model) is not type(after.model):
        raise ModelError(
            f"{before.name} is a {type(before.model).__name__} and {after.name} a {type(after.model).__name__}; "
            "expected a model and one pruned from it"
        )
    skipped = skipped_in(before, after)
    groups, notes = _groups(before, after)
    return Difference(
        dense=before.name,
        pruned=after.name,
        parameters_before=sum(p.numel() for p in before.model.parameters()),
        parameters_after=sum(p.numel() for p in after.model.parameters()),
        groups=tuple(groups),
        parameters=tuple(_parameters(before.model, after.model)),
        views=tuple(_views(before.graph, after.graph)),
        attributes=tuple(_attributes(before.model, after.model)),
        layers=tuple(_layers(before, after, groups, skipped)),
        notes=tuple(notes),
    )


# ---- what changed ----


def _groups(dense: Opened, pruned: Opened) -> tuple[list[GroupChange], list[str]]:
    """By the plan where there is one, else by the sizes of the groups of both graphs."""
    by_size = _by_size(dense.structure, pruned.structure)
    try:
        plan = plan_between(dense.manifest, pruned.manifest)
        if plan is None:
            return by_size, []
        resolve(dense.structure, plan)
    except PlanError as error:
        return by_size, [f"the plan is not one for this dense model, so that indices are not known: {error}"]
    return _by_plan(dense.structure, plan), []


def _by_plan(dense: Structure, plan: Plan) -> list[GroupChange]:
    found = []
    for name, group in dense.groups.items():
        cut = plan.cuts.get(name)
        if cut is not None:
            removed = tuple(tuple(sorted(set(range(cut.units)) - set(row))) for row in cut.keep)
            rows = len(cut.keep)
            found.append(
                GroupChange(name, group.kind, group.layer, cut.units * rows, cut.kept * rows, removed, cut.within)
            )
    return found


def _by_size(dense: Structure, pruned: Structure) -> list[GroupChange]:
    """Groups of the same name; which units went is not known."""
    return [
        GroupChange(name, g.kind, g.layer, g.units, pruned.groups[name].units, (), None)
        for name, g in dense.groups.items()
        if name in pruned.groups and pruned.groups[name].units < g.units
    ]


def _parameters(dense: nn.Module, pruned: nn.Module) -> list[Parameter]:
    before, after = parameters_of(dense), parameters_of(pruned)
    names = dict.fromkeys([*after, *before])
    return [
        Parameter(name, _shape(before.get(name)), _shape(after.get(name)))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _shape(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)


def _views(dense: fx.GraphModule, pruned: fx.GraphModule) -> list[View]:
    found = []
    for d, p in align(dense, pruned):
        before, after = _sizes(d), _sizes(p)
        if before != after:
            found.append(View(d.name, operator_name(d), module_path(d), before, after))
    return found


def _sizes(node: fx.Node) -> str:
    """The arguments that are no tensors; sizes that depend on the input are a star."""

    def shown(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "·" if isinstance(value.meta.get("val"), Tensor | list | tuple) else "*"
        return value

    args = [a for a in map_aggregate(node.args, shown) if a != "·" and not _only_tensors(a)]
    return ", ".join(_plain(a) for a in args)


def _only_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(v == "·" for v in value)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_plain(v) for v in value)}]"
    return str(value)


def _attributes(dense: nn.Module, pruned: nn.Module) -> list[Attribute]:
    """Integers that modules hold, and those of configurations that modules have of their own."""
    before = dict(dense.named_modules())
    found = []
    for path, module in pruned.named_modules():
        if path not in before:
            continue
        old, new = _held(before[path]), _held(module)
        found += [
            Attribute(path, name, old[name], value) for name, value in new.items() if name in old and old[name] != value
        ]
    return found


def _held(module: nn.Module) -> dict[str, int]:
    held = {name: n for name, n in integers_of(module).items() if not name.startswith("_")}
    config = vars(module).get("config")
    if config is not None:
        held |= {f"config.{name}": n for name, n in integers_of(config).items() if not name.startswith("_")}
    return held


def _layers(dense: Opened, pruned: Opened, groups: Sequence[GroupChange], skipped: Sequence[str]) -> list[LayerChange]:
    before, after = parameters_of(dense.model), parameters_of(pruned.model)
    changes = {g.group: g for g in groups}
    found = []
    for layer, path in enumerate(dense.structure.layers):
        units: dict[str, tuple[int, int]] = {}
        for site in dense.structure.sites:
            if site.layer != layer:
                continue
            names = [dense.structure.group(g) for g in site.groups]
            was = math.prod(g.units for g in names)
            share = math.prod(changes[g.name].kept / changes[g.name].units for g in names if g.name in changes)
            old = units.get(site.kind, (0, 0))
            units[site.kind] = (old[0] + was, old[1] + round(was * share))
            if len(names) == 2:
                kv = changes.get(names[0].name)
                units["kv groups"] = (names[0].units, kv.kept if kv else names[0].units)
        if path in skipped:
            units = {kind: (was, 0) for kind, (was, _) in units.items()}
        found.append(LayerChange(layer, path, (_count(before, path), _count(after, path)), units))
    return found


def _count(shapes: Mapping[str, Sequence[int]], path: str) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(path + "."))


# ---- in words ----


def _headline(found: Difference) -> str:
    before, after = found.parameters_before, found.parameters_after
    number = sum(p.after is None for p in found.parameters)
    gone = f"{number} gone, " if number else ""
    reshaped = [p for p in found.parameters if p.before is not None and p.after is not None]
    return (
        f"parameters {before:,} -> {after:,}: {1 - after / before:.2%} removed; {len(found.groups)} groups cut, "
        f"{len(reshaped)} parameters reshaped, {gone}{len(found.biases)} biases added"
    )


def _tables(found: Difference) -> list[tuple[str, list[str], list[list[str]]]]:
    kinds = list(dict.fromkeys(kind for layer in found.layers for kind in layer.units))
    layers = [
        [
            str(each.layer),
            *(_change(each.units.get(kind)) for kind in kinds),
            _change(each.parameters),
            f"{1 - each.parameters[1] / each.parameters[0]:.1%}" if each.parameters[0] else "",
        ]
        for each in found.layers
    ]
    groups = [[g.group, _change((g.units, g.kept)), f"{g.share:.1%}", _removed(g)] for g in found.groups]
    parameters = [[p.name, _or_none(p.before), _or_none(p.after)] for p in found.parameters]
    views = [[v.node, v.operator, v.module, v.before, v.after] for v in found.views]
    attributes = [[a.module, a.attribute, str(a.before), str(a.after)] for a in found.attributes]
    return [
        ("Layers", ["layer", *kinds, "parameters", "removed"], layers),
        ("Groups", ["group", "units", "removed", "indices"], groups),
        ("Parameters", ["parameter", "before", "after"], parameters),
        ("Sizes in the graph", ["node", "operator", "module", "before", "after"], views),
        ("Attributes", ["module", "attribute", "before", "after"], attributes),
    ]


def _change(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return ""
    return f"{counts[0]:,}" if counts[0] == counts[1] else f"{counts[0]:,} -> {counts[1]:,}"


def _or_none(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " × ".join(map(str, shape))


def _removed(change: GroupChange) -> str:
    """The indices that went, not too many of them; rows of a dependent choice after each other."""
    rows = []
    for row in change.removed:
        shown = ", ".join(map(str, row[:_MOST_UNITS]))
        rows.append(shown if len(row) <= _MOST_UNITS else f"{shown}, ... {row[-1]}")
    return " / ".join(rows)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
