"""What is inferred from a graph, as data: groups, sites and layers.

A *group* is an atom with every place it occurs at: positions that are cut together or not at all. A *site* is a
projection that sums a group away; after units are removed there, its weight is refitted. A *layer* is one of the
modules that the residual stream runs through one after the other. `slimgraph.groups.infer` makes all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
        statistics: nodes that take a mean, variance or sum over it, or choose among its positions; cutting changes what
            they compute.
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
        refit_bias: name of the bias that a refit gives the site: the same, or a free one.
        channels: size of the contracted axis.
        structure: the axis as a term, for people.
        groups: names of the groups whose units are removed here, outermost first. Two for grouped-query attention: kv
            groups, and heads within a kv group.
        origins: the projections that produce the units.
        writes_residual: whether the output goes to the residual stream.
        stacked: whether the weight holds the projections of many experts, picked by an index.
        rows: whether channels come last in the input and in the output, as in `rows @ weight`.
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
    refit_bias: str
    channels: int
    structure: str
    groups: tuple[str, ...]
    origins: tuple[Origin, ...]
    writes_residual: bool
    stacked: bool = False
    rows: bool = True


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
        return [site for site in self.sites if self.left_alone(site) is None]

    def require_sites(self, kinds: str = "both") -> list[Site]:
        """The prunable sites of a kind: "heads", "channels" or "both".

        Raises:
            PlanError: there is none.
        """
        sites = [site for site in self.prunable_sites() if kinds in ("both", site.kind)]
        if not sites:
            raise PlanError("no site can be pruned in this graph; `slimgraph inspect` shows what is frozen and why")
        return sites

    def left_alone(self, site: Site) -> str | None:
        """Why automatic pruning does not cut at a site; None where it does."""
        if any(self.groups[g].statistics for g in site.groups):
            return "a mean, variance or sum is taken over its units"
        if site.stacked:
            return "its weight stacks the projections of many experts"
        if not site.writes_residual:
            return "it does not write to the residual stream"
        if site.layer is None:
            return "it is part of no layer"
        if not site.rows:
            return "channels do not come last in what it reads or puts out"
        if any(self._summed[g] > 1 for g in site.groups):
            return "its units are summed at other places as well"
        if any(name in self.tied for name in (site.parameter, site.bias)):
            return "its weight or bias is read at other places as well, and a refit would change it there"
        return None

    @cached_property
    def _summed(self) -> Counter[str]:
        """Name of a group -> number of nodes that sum over its units."""
        axes, contractions = self.analysis.axes, self.analysis.contractions
        places = {(c.node, atom) for c in contractions for atom in axes.atoms(axes.find(c.term))}
        return Counter(self.atom_groups[atom] for _, atom in places if atom in self.atom_groups)

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

        None where something else than a sum comes first, like the norm that some models put behind a layer's parts; and
        where the sum is itself only a summand, as where attention and feed-forward part read the same value.
        """
        graph = self.analysis.graph_module.graph
        order = {n: i for i, n in enumerate(graph.nodes)}
        node = next(n for n in graph.nodes if n.name == site.node)
        sum_of_both = _only_sum(node)
        if sum_of_both is None or _only_sum(sum_of_both) is not None:
            return None
        others = [a for a in sum_of_both.args if isinstance(a, fx.Node) and order[a] < order[node]]
        return others[0].name if len(others) == 1 and self._is_residual(others[0]) else None

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


def _only_sum(node: fx.Node) -> fx.Node | None:
    """The sum of two that a value goes into as it is, where it goes nowhere else."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is _ADD and not user.kwargs:
            return user
        if user.target not in _UNCHANGED or user.args[0] is not node or _width(user) != _width(node):
            return None
        node = user
    return None


def _width(node: fx.Node) -> Any:
    """Size of a value's last dimension."""
    return node.meta["val"].shape[-1:]


def _none(value: int | None) -> int:
    return -1 if value is None else value
