"""Two graphs woven into one, so that one run compares them node by node and frees values as it goes.

A woven graph has one input, the token ids, and several *strands*: copies of the nodes of either graph, placed so that
aligned nodes stand side by side. `slimgraph.execute.run` runs it like any other graph; parameters carry the strand's
name before their own.

Three strands tell where a pruned model goes wrong. *Dense* and *free* are the two graphs as they are. *Forced* is the
pruned graph once more, in which every value that pruning is meant to change (a sum over cut units), and every site's
output, is replaced by the dense one as soon as it was compared: what differs in it elsewhere, pruning does not explain.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.axes import Term, size
from slimgraph.debug.opened import Opened
from slimgraph.errors import PlanError
from slimgraph.execute import Weights
from slimgraph.plan import Resolved
from slimgraph.rules import operator_name
from slimgraph.trace import module_path

__all__ = ["Strands", "Thread", "align", "weave"]

_CONSTANT = "constant"


def align(dense: fx.GraphModule, pruned: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of nodes that do the same in two graphs, in order: the same operator in the same module."""
    ours, theirs = _calls(dense), _calls(pruned)
    mine, other = [_key(n) for n in ours], [_key(n) for n in theirs]
    if mine == other:
        return list(zip(ours, theirs, strict=True))
    blocks = difflib.SequenceMatcher(None, mine, other, autojunk=False).get_matching_blocks()
    return [(ours[b.a + i], theirs[b.b + i]) for b in blocks for i in range(b.size)]


@dataclass(frozen=True)
class Thread:
    """An aligned pair of nodes in a woven graph.

    Attributes:
        node, pruned: the nodes in their own graphs.
        dense, free, forced: names of their copies in the woven graph.
        lossy: whether the plan is meant to change the value: units that were cut are summed or chosen from there.
        masked: for a lossy projection, the copy that drops the cut units and refits nothing; None elsewhere.
        kept: dimension -> (n,) int64, positions of the dense value that stay; None where they differ from row to row,
            so that the two values cannot be laid over each other.
    """

    node: fx.Node
    pruned: fx.Node
    dense: str
    free: str
    forced: str
    lossy: bool
    masked: str | None
    kept: dict[int, Tensor] | None


@dataclass
class Strands:
    """A graph under construction that holds copies of others.

    Attributes:
        sources: strand -> what fetches its parameters.
        device: where it will run.
        graph: the graph; `ids` is its input.
        constants: tensors that the weaving itself needs, by name.
    """

    sources: Mapping[str, Weights]
    device: torch.device
    graph: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = self.graph.placeholder("input_ids")

    def copy(self, node: fx.Node, known: Any, strand: str) -> fx.Node:
        """A copy of a node of some strand, reading what `known` maps its inputs to."""
        if node.op == "placeholder":
            return self.ids
        if node.op == "get_attr":
            return self.graph.create_node("get_attr", f"{strand}.{node.target}")
        return self.graph.node_copy(node, known.__getitem__)

    def constant(self, tensor: Tensor) -> fx.Node:
        """A node that holds this tensor."""
        name = str(len(self.constants))
        self.constants[name] = tensor.to(self.device)
        return self.graph.create_node("get_attr", f"{_CONSTANT}.{name}")

    def fetch(self, name: str) -> Tensor:
        """The parameter, buffer or constant behind a node of this graph."""
        strand, _, own = name.partition(".")
        return self.constants[own] if strand == _CONSTANT else self.sources[strand](own)

    def module(self) -> fx.GraphModule:
        """The graph, for running with `fetch`; it has no output, and nothing in the places of its parameters."""
        names = {str(n.target) for n in self.graph.find_nodes(op="get_attr")}
        return fx.GraphModule(dict.fromkeys(names, torch.empty(0)), self.graph)


def weave(dense: Opened, pruned: Opened, resolved: Resolved | None) -> tuple[Strands, list[Thread]]:
    """Both graphs in one, aligned.

    Args:
        dense: the model before.
        pruned: the model after.
        resolved: the plan, on the dense model's structure. Without it nothing is taken to be meant.

    Returns:
        The graph and its aligned pairs, in order.
    """
    made = _Weaving(dense, pruned, resolved)
    return made.strands, made.threads()


class _Weaving:
    def __init__(self, dense: Opened, pruned: Opened, resolved: Resolved | None) -> None:
        self.dense, self.pruned, self.resolved = dense, pruned, resolved
        self.strands = Strands({"dense": dense.weights, "pruned": pruned.weights}, pruned.device)
        self.mine: dict[fx.Node, fx.Node] = {}
        self.free: dict[fx.Node, fx.Node] = {}
        self.forced: dict[fx.Node, fx.Node] = {}
        self.positions: dict[Term, Tensor | None] = {}
        self.sites = {s.node for s in dense.structure.sites}
        self.lossy = set() if resolved is None else _lossy(resolved)

    def threads(self) -> list[Thread]:
        ours, theirs = iter(self.dense.graph.graph.nodes), iter(self.pruned.graph.graph.nodes)
        return [self._pair(d, p, ours, theirs) for d, p in align(self.dense.graph, self.pruned.graph)]

    def _pair(self, d: fx.Node, p: fx.Node, ours: Any, theirs: Any) -> Thread:
        for node in ours:
            self.mine[node] = self.strands.copy(node, self.mine, "dense")
            if node is d:
                break
        for node in theirs:
            self._both(node)
            if node is p:
                break
        compared = self.forced[p].name
        kept = self._kept(d)
        lossy = d in self.lossy
        if (lossy or d.name in self.sites) and self.resolved is not None and kept is not None:
            self.forced[p] = self._selected(self.mine[d], kept)
        masked = self._masked(d) if lossy else None
        return Thread(d, p, self.mine[d].name, self.free[p].name, compared, lossy, masked, kept)

    def _both(self, node: fx.Node) -> None:
        """The forced strand is the free one as long as nothing was forced."""
        self.free[node] = self.strands.copy(node, self.free, "pruned")
        same = all(self.free[a] is self.forced[a] for a in node.all_input_nodes)
        self.forced[node] = self.free[node] if same else self.strands.copy(node, self.forced, "pruned")

    def _kept(self, node: fx.Node) -> dict[int, Tensor] | None:
        terms = self.dense.structure.analysis.dims.get(node)
        if self.resolved is None or not isinstance(terms, tuple):
            return {}
        try:
            found = {dim: self._positions(term) for dim, term in enumerate(terms)}
        except PlanError:  # heads apart from the kv groups on which it depends which of them stay
            return None
        return {dim: positions for dim, positions in found.items() if positions is not None}

    def _positions(self, term: Term) -> Tensor | None:
        assert self.resolved is not None
        normal = self.dense.structure.analysis.axes.find(term)
        if normal not in self.positions:
            self.positions[normal] = self.resolved.positions(normal)
        return self.positions[normal]

    def _selected(self, value: fx.Node, kept: dict[int, Tensor]) -> fx.Node:
        for dim, positions in kept.items():
            chosen = (value, dim, self.strands.constant(positions))
            value = self.strands.graph.call_function(torch.ops.aten.index_select.default, chosen)
        return value

    def _masked(self, node: fx.Node) -> str | None:
        """The dense projection with the cut units zeroed at its input."""
        found = [c for c in self.dense.structure.analysis.contractions if c.node is node]
        if node.name not in self.sites or len(found) != 1:
            return None
        left, dim = found[0].left, found[0].left_dim
        positions = self._positions(found[0].term)
        value = left.meta["val"]
        if positions is None or not isinstance(value, Tensor):
            return None
        mask = torch.zeros(int(value.shape[dim]))
        mask[positions] = 1
        held = self.strands.constant(mask.view(-1, *[1] * (value.ndim - dim - 1)).to(value.dtype))
        zeroed = self.strands.graph.call_function(torch.ops.aten.mul.Tensor, (self.mine[left], held))
        return self.strands.graph.node_copy(node, {**self.mine, left: zeroed}.__getitem__).name


def _lossy(resolved: Resolved) -> set[fx.Node]:
    """Nodes whose value the plan changes beyond leaving positions out."""
    analysis = resolved.structure.analysis

    def is_cut(term: Term) -> bool:
        return resolved.size_of(term) != size(analysis.axes.find(term))

    found = {c.node for c in analysis.contractions if is_cut(c.term)}
    found |= {node for node, term in analysis.statistics if is_cut(term)}
    return found | {c.node for c in analysis.choices if is_cut(c.term)}


def _calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op == "call_function"]


def _key(node: fx.Node) -> tuple[str, str]:
    return operator_name(node), module_path(node)
