"""The dependency graph of a layer, drawn: boxes for projections, bars for dimensions, a colour for each group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup
from torch import fx

from slimgraph.axes import size
from slimgraph.groups import Group, Structure

__all__ = ["Key", "LayerGraph", "draw_layer"]

_WIDTH, _GAP, _BAR, _ROW, _HEAD, _MARGIN = 158, 50, 14, 30, 26, 12
_COLOURS = 8  # that the style sheet knows, besides that of the residual stream


@dataclass(frozen=True)
class Key:
    """A colour of the drawing: the group's name and class, its units before and after, and what is known of it."""

    group: str
    colour: str
    units: int
    kept: int
    kind: str
    frozen: str


@dataclass(frozen=True)
class LayerGraph:
    """A drawing.

    Attributes:
        title: of the layer.
        svg: the drawing itself.
        keys: what its colours mean.
    """

    title: str
    svg: Markup
    keys: tuple[Key, ...]


@dataclass
class _Box:
    """The parameters that one graph node reads, and where the box is drawn."""

    node: fx.Node
    parameters: list[str]
    column: int = 0
    x: int = 0
    y: int = 0
    height: int = 0


def draw_layer(structure: Structure, layer: int, title: str, kept: Mapping[str, int]) -> LayerGraph:
    """Draw a layer.

    Args:
        structure: of the dense model.
        layer: its index.
        title: for the drawing.
        kept: group -> units that stay, of the groups that are cut.
    """
    drawing = _Drawing(structure, structure.layers[layer], kept)
    return LayerGraph(title, drawing.svg(title), tuple(drawing.keys.values()))


class _Drawing:
    def __init__(self, structure: Structure, path: str, kept: Mapping[str, int]) -> None:
        self.structure, self.path, self.kept = structure, path + ".", kept
        self.keys: dict[str, Key] = {}
        self.bars: dict[tuple[str, int], list[tuple[tuple[int, ...], Group]]] = {}
        for group in structure.groups.values():
            for o in group.occurrences:
                self.bars.setdefault((o.source, o.dim), []).append((o.place, group))
        self.sites = {s.parameter: s for s in structure.sites}
        self.boxes = self._boxes()
        self.edges = self._edges()
        self._place()

    def svg(self, title: str) -> Markup:
        right = max((b.x for b in self.boxes), default=0) + _WIDTH + _MARGIN
        bottom = max((b.y + b.height for b in self.boxes), default=0) + _MARGIN
        parts = [
            Markup('<svg class="layer" role="group" aria-label="{}" viewBox="0 0 {} {}" style="--w:{}px">').format(
                title, right, bottom, right
            ),
            *(self._edge(a, b) for a, b in self.edges),
            *(self._box(b) for b in self.boxes),
            Markup("</svg>"),
        ]
        return Markup("\n").join(parts)

    # -- what is drawn --

    def _boxes(self) -> list[_Box]:
        found: dict[fx.Node, _Box] = {}
        for node in self.structure.analysis.graph_module.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            if not name.startswith(self.path) or not any(key[0] == name for key in self.bars):
                continue
            reader = _reader(node)
            found.setdefault(reader, _Box(reader, [])).parameters.append(name)
        return list(found.values())

    def _edges(self) -> list[tuple[_Box, _Box]]:
        """From a box to those that its value reaches without passing another."""
        at = {b.node: b for b in self.boxes}
        found = []
        for box in self.boxes:
            seen: set[fx.Node] = set()
            stack = list(box.node.users)
            while stack:
                node = stack.pop()
                if node in seen:
                    continue
                seen.add(node)
                if node in at:
                    found.append((box, at[node]))
                elif self._is_inside(node):
                    stack.extend(node.users)
        return found

    def _is_inside(self, node: fx.Node) -> bool:
        stack = node.meta.get("nn_module_stack") or {}
        return any(isinstance(e, tuple) and f"{e[0]}.".endswith(self.path) for e in stack.values())

    def _place(self) -> None:
        order = {b.node: i for i, b in enumerate(self.boxes)}
        for box in sorted(self.boxes, key=lambda b: order[b.node]):
            box.column = max((a.column + 1 for a, b in self.edges if b is box), default=0)
        columns: dict[int, list[_Box]] = {}
        for box in self.boxes:
            box.height = _HEAD + _ROW * sum((p, d) in self.bars for p in box.parameters for d in range(4)) + 6
            columns.setdefault(box.column, []).append(box)
        tallest = max((sum(b.height + 16 for b in each) for each in columns.values()), default=0)
        for column, boxes in columns.items():
            y = _MARGIN + (tallest - sum(b.height + 16 for b in boxes)) // 2
            for box in boxes:
                box.x, box.y = _MARGIN + column * (_WIDTH + _GAP), y
                y += box.height + 16

    # -- how --

    def _edge(self, a: _Box, b: _Box) -> Markup:
        x1, y1, x2, y2 = a.x + _WIDTH, a.y + a.height // 2, b.x, b.y + b.height // 2
        bend = max(24, (x2 - x1) // 2)
        curve = f"M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
        return Markup('<path class="edge {}" d="{}"/>').format(self._flow(a, b), curve)

    def _flow(self, a: _Box, b: _Box) -> str:
        """The colour of what goes from one box to another: the site's units, or the residual stream."""
        site = next((self.sites[p] for p in b.parameters if p in self.sites), None)
        if site is None or not any(o.parameter in a.parameters for o in site.origins):
            return "residual"
        return self._key(self.structure.group(site.groups[0])).colour

    def _box(self, box: _Box) -> Markup:
        site = any(p in self.sites for p in box.parameters)
        name = box.parameters[0].removeprefix(self.path).rpartition(".")[0]
        parts = [
            Markup('<g class="box{}" transform="translate({} {})">').format(" site" if site else "", box.x, box.y),
            Markup('<rect class="frame" width="{}" height="{}" rx="8"/>').format(_WIDTH, box.height),
            Markup('<text class="name" x="9" y="17">{}</text>').format(_short(name, 17 if site else 21)),
        ]
        if site:
            parts.append(Markup('<text class="badge" x="{}" y="17">site</text>').format(_WIDTH - 9))
        y = _HEAD
        for parameter in box.parameters:
            for dim in range(4):
                if (parameter, dim) in self.bars:
                    parts += self._bar(parameter, dim, y)
                    y += _ROW
        return Markup("").join([*parts, Markup("</g>")])

    def _bar(self, parameter: str, dim: int, y: int) -> list[Markup]:
        pieces = sorted(self.bars[parameter, dim], key=lambda each: each[0])
        leaf = parameter.rpartition(".")[2]
        sizes = " × ".join(str(g.units) for _, g in pieces[:4]) + (" …" if len(pieces) > 4 else "")
        parts = [Markup('<text class="dim" x="9" y="{}">{}[{}]  {}</text>').format(y + 9, leaf, dim, sizes)]
        width = (_WIDTH - 18) / len(pieces)
        for i, (_, group) in enumerate(pieces):
            parts.append(
                Markup(
                    '<g class="piece {}{}" tabindex="0" role="img" data-tip="{}" aria-label="{}">'
                    '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"/>{}</g>'
                ).format(
                    self._key(group).colour,
                    " frozen" if group.frozen else "",
                    self._tip(parameter, dim, group),
                    self._tip(parameter, dim, group),
                    9 + i * width,
                    y + 12,
                    width - 1.5,
                    _BAR,
                    self._hatch(9 + i * width, y + 12, width - 1.5) if group.frozen else "",
                )
            )
        return parts

    @staticmethod
    def _hatch(x: float, y: float, width: float) -> Markup:
        return Markup('<rect class="hatch" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(x, y, width, _BAR)

    def _key(self, group: Group) -> Key:
        if group.name not in self.keys:
            used = sum(k.colour != "residual" for k in self.keys.values())
            colour = "residual" if group.kind == "residual" else f"c{used % _COLOURS}"
            kept = self.kept.get(group.name, group.units)
            self.keys[group.name] = Key(group.name, colour, group.units, kept, group.kind, group.frozen or "")
        return self.keys[group.name]

    def _tip(self, parameter: str, dim: int, group: Group) -> str:
        shape = " × ".join(str(size(term)) for term in self.structure.analysis.sources[parameter])
        key = self._key(group)
        cut = f"{key.units:,} units" if key.kept == key.units else f"{key.units:,} units, {key.kept:,} stay"
        state = (
            f"frozen: {group.frozen}" if group.frozen else "can be cut" if group.kind != "residual" else "left alone"
        )
        places = len({(o.source, o.dim) for o in group.occurrences})
        return f"{parameter}[{dim}] of {shape}\n{group.kind}: {cut}; {state}\ntied to {places - 1} other dimensions"


def _reader(node: fx.Node) -> fx.Node:
    """The node that first computes with a parameter; casts and transposes are passed."""
    user = next(iter(node.users))
    while len(user.all_input_nodes) == 1 and len(user.users) == 1 and user.all_input_nodes[0].op != "placeholder":
        user = next(iter(user.users))
    return user


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"…{name[-most + 1 :]}"
