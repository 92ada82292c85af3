"""What is inferred from a graph, as data: groups, sites and layers.

A *group* is an atom with every place it occurs at: positions that are cut together or not at all. A *site* is a
projection that sums a group away; after units are removed there, its weight is refitted. A *layer* is one of the
modules that the residual stream runs through one after the other. `slimgraph.groups.infer` makes all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from slimgraph.analysis import Analysis, Refusal
from slimgraph.axes import Atom
from slimgraph.errors import GraphError, PlanError
from slimgraph.trace import module_path

__all__ = ["Group", "Occurrence", "Origin", "Site", "Structure"]


_ADD = torch.ops.aten.add.Tensor
_UNCHANGED = {  # rows of features stay what they are; a traced model drops nothing out
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.dropout.default,
    torch.ops.aten.view.default,
}


@dataclass(frozen=True)
class Occurrence:
    """A place where a group occurs.

    Attributes:
        source: parameter, buffer, or graph node that makes a tensor.
        dim: dimension of that tensor.
        place: path into the dimension's term, outermost first; () when the group is the whole dimension.
    """

    source: str
    dim: int
    place: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Positions that are cut together.

    Attributes:
        name: a site's or another parameter's dimension, like `decoder.0.out.weight[1]`, with the place in its term.
        units: number of positions.
        kind: "residual" (the stream that all layers read and write), "heads", "channels", "experts" (positions that a
            router picks from), or "inner" (positions inside heads, and whatever else no site removes whole).
        layer: index of the layer, None for a group of several layers or of none.
        frozen: why it must not be cut, or None.
        occurrences: every place where it occurs.
        statistics: nodes that take a mean or variance over it, or choose among its positions; cutting changes what they
            compute.
        at_least: number of units that must stay.
    """

    name: str
    units: int
    kind: str
    layer: int | None
    frozen: str | None
    occurrences: tuple[Occurrence, ...]
    statistics: tuple[str, ...] = ()
    at_least: int = 1


@dataclass(frozen=True)
class Origin:
    """A projection whose output holds units of a site: its parameter, the dimension that is cut, and its node.

    `reads` is the node whose value it multiplies, `in_dim` the parameter's contracted dimension.
    """

    parameter: str
    dim: int
    in_dim: int
    node: str
    reads: str


@dataclass(frozen=True)
class Site:
    """A projection that sums units away.

    Attributes:
        name: its parameter and the dimension that is summed, like `decoder.0.out.weight[1]`.
        kind: "heads" or "channels".
        layer: index of the layer, or None.
        node: the contracting graph node.
        reads: the node whose value it multiplies: the site's input.
        parameter: the weight; `in_dim` is its contracted dimension, `out_dim` the other one.
        bias: the bias parameter, or None.
        channels: size of the contracted axis.
        structure: the axis as a term, for people.
        groups: names of the groups whose units are removed here, outermost first. Two for grouped-query attention: kv
            groups, and heads within a kv group.
        origins: the projections that produce the units.
        writes_residual: whether the output goes to the residual stream.
        stacked: whether the weight holds the projections of many experts, picked by an index.
    """

    name: str
    kind: str
    layer: int | None
    node: str
    reads: str
    parameter: str
    in_dim: int
    out_dim: int
    bias: str | None
    channels: int
    structure: str
    groups: tuple[str, ...]
    origins: tuple[Origin, ...]
    writes_residual: bool
    stacked: bool = False


@dataclass
class Structure:
    """Everything inferred from one graph.

    Attributes:
        groups: by name, in graph order.
        sites: in graph order.
        layers: module path of each layer, by index.
        refusals: operators without a rule that froze something.
        tied: parameter -> number of nodes that read it, where there are several.
        analysis: the terms behind it all.
        atom_groups: atom -> name of its group.
    """

    groups: dict[str, Group]
    sites: list[Site]
    layers: list[str]
    refusals: list[Refusal]
    analysis: Analysis
    tied: dict[str, int] = field(default_factory=dict)
    atom_groups: dict[Atom, str] = field(default_factory=dict, repr=False)

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            PlanError: there is none.
        """
        if name not in self.groups:
            raise PlanError(
                f"no group is called {name!r}; `slimgraph inspect` lists the {len(self.groups)} groups there are"
            )
        return self.groups[name]

    def atom(self, name: str) -> Atom:
        """The atom behind a group."""
        return next(a for a, n in self.atom_groups.items() if n == name)

    def prunable_sites(self) -> list[Site]:
        """Sites that automatic pruning works on: they write to the residual stream and alone remove their units."""
        alone: dict[str, int] = {}
        for site in self.sites:
            for g in site.groups:
                alone[g] = alone.get(g, 0) + 1
        return [
            s
            for s in self.sites
            if s.writes_residual
            and not s.stacked
            and s.layer is not None
            and all(alone[g] == 1 and not self.groups[g].statistics for g in s.groups)
        ]

    def boundaries(self) -> list[tuple[str, str]]:
        """For each layer the graph nodes that are its input and its output on the residual stream.

        Raises:
            GraphError: a layer reads or writes no value of the residual stream.
        """
        inside: dict[int, list[fx.Node]] = {i: [] for i in range(len(self.layers))}
        layer_of = {path: i for i, path in enumerate(self.layers)}
        for node in self.analysis.graph_module.graph.nodes:
            for i in (layer_of[p] for p in _prefixes(module_path(node)) if p in layer_of):
                inside[i].append(node)
        return [self._boundary(i, nodes) for i, nodes in inside.items()]

    def joined(self, site: Site) -> str | None:
        """The node whose value a site's output is added to, where that value is there before the site is reached.

        None where something else than a sum comes first, like the norm that some models put behind a layer's parts.
        """
        graph = self.analysis.graph_module.graph
        order = {n: i for i, n in enumerate(graph.nodes)}
        node = next(n for n in graph.nodes if n.name == site.node)
        while len(node.users) == 1:
            (user,) = node.users
            if user.target in _UNCHANGED and user.args[0] is node and _width(user) == _width(node):
                node = user
                continue
            others = [a for a in user.args if a is not node]
            if user.target is not _ADD or user.kwargs or len(others) != 1 or not isinstance(others[0], fx.Node):
                return None
            return others[0].name if order[others[0]] < order[node] and self._is_residual(others[0]) else None
        return None

    def _boundary(self, layer: int, nodes: list[fx.Node]) -> tuple[str, str]:
        mine = set(nodes)
        before = next((a for n in nodes for a in n.all_input_nodes if a not in mine and self._is_residual(a)), None)
        leaving = [n for n in nodes if self._is_residual(n) and any(u not in mine for u in n.users)]
        if before is None or not leaving:
            raise GraphError(
                f"layer {self.layers[layer]}: found no value of the residual stream that goes "
                f"{'in' if before is None else 'out'}; expected both, to compare or skip layers. Use uniform_allocation"
            )
        return before.name, leaving[-1].name

    def _is_residual(self, node: fx.Node) -> bool:
        if node not in self.analysis.moving or not isinstance(self.analysis.dims.get(node), tuple):
            return False
        dims = self.analysis.terms(node)
        last = dims[-1] if dims else None
        return (
            isinstance(last, Atom)
            and self.groups.get(self.atom_groups.get(last, ""), None) is not None
            and self.groups[self.atom_groups[last]].kind == "residual"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description: groups, sites, layers, refusals."""
        return {
            "layers": self.layers,
            "groups": [asdict(g) for g in self.groups.values()],
            "sites": [asdict(s) for s in self.sites],
            "refusals": [asdict(r) for r in self.refusals],
            "tied": self.tied,
        }

    def to_networkx(self) -> nx.Graph[str]:
        """Groups and tensors as a bipartite graph; an edge is an occurrence, a site's edge is marked."""
        graph: nx.Graph[str] = nx.Graph()
        for group in self.groups.values():
            graph.add_node(
                group.name,
                type="group",
                units=group.units,
                kind=group.kind,
                layer=_none(group.layer),
                frozen=group.frozen or "",
            )
            for o in group.occurrences:
                graph.add_node(o.source, type="tensor")
                graph.add_edge(group.name, o.source, dim=o.dim, site=False)
        for site in self.sites:
            for name in site.groups:
                graph.edges[name, site.parameter]["site"] = True
        return graph


def _prefixes(path: str) -> Iterator[str]:
    steps = path.split(".")
    for i in range(1, len(steps) + 1):
        yield ".".join(steps[:i])


def _width(node: fx.Node) -> Any:
    """Size of a value's last dimension."""
    return node.meta["val"].shape[-1:]


def _none(value: int | None) -> int:
    return -1 if value is None else value
