"""Masked equivalence: what a pruned model must compute.

For any plan, the pruned model equals the dense model in which the removed positions are zeroed wherever they are summed
away: at the input of every contraction over a cut axis. Where a mean, variance or plain sum is taken over a cut axis,
it is taken over the kept positions; where a softmax or a ranking chooses among the positions of a cut axis, the removed
ones come in as minus infinity. This module runs the dense graph that way; nothing is sliced, so that it checks the
slicing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from slimgraph.axes import Term, size
from slimgraph.errors import GraphError
from slimgraph.plan import Resolved
from slimgraph.rules import Resizing, find_rule
from slimgraph.surgery import refresh_shapes
from slimgraph.trace import call, tensor_at

__all__ = ["in_double", "masked_logits"]


def masked_logits(resolved: Resolved, ids: Tensor) -> Tensor:
    """Logits of the dense graph with the removed positions masked.

    Args:
        resolved: the plan, and the structure of the dense graph.
        ids: (batch, tokens) int64.

    Returns:
        (batch, tokens, vocabulary), in the graph's dtype.
    """
    return _MaskedRun(resolved).run(ids)


def in_double(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a traced graph that computes in float64 throughout, so that exactness can be told from rounding.

    Models cast to float32 in places even when their weights are float64; here these casts are to float64 as well.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    tensors = {str(n.target): tensor_at(graph_module, str(n.target)) for n in graph.find_nodes(op="get_attr")}
    wide = fx.GraphModule({k: _widened(t) for k, t in tensors.items()}, graph, type(graph_module).__name__)

    def widened(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    for node in wide.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, widened), map_aggregate(node.kwargs, widened)
    refresh_shapes(wide)
    wide.recompile()
    return wide


class _MaskedRun:
    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self.analysis = resolved.structure.analysis
        self.masked: dict[fx.Node, dict[fx.Node, list[tuple[int, Tensor]]]] = {}
        for c in self.analysis.contractions:
            positions = resolved.positions(c.term)
            if positions is not None:
                self.masked.setdefault(c.node, {}).setdefault(c.left, []).append((c.left_dim, positions))
        self.barred: dict[fx.Node, dict[fx.Node, list[tuple[int, Tensor]]]] = {}
        for choice in self.analysis.choices:
            positions = resolved.positions(choice.term)
            if positions is not None:
                self.barred.setdefault(choice.node, {}).setdefault(choice.source, []).append((choice.dim, positions))
        self.statistics = {n for n, term in self.analysis.statistics if resolved.positions(term) is not None}

    def run(self, ids: Tensor) -> Tensor:
        graph_module = self.analysis.graph_module
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in graph_module.graph.nodes:
                if node.op == "placeholder":
                    values[node] = ids
                elif node.op == "get_attr":
                    values[node] = tensor_at(graph_module, str(node.target))
                elif node.op == "output":
                    logits = values[node.args[0]]
                    assert isinstance(logits, Tensor)
                    return logits
                elif node in self.statistics:
                    values[node] = self._over_kept(node, values)
                else:
                    values[node] = self._call(node, values)
        raise GraphError("the graph has no output")

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        masks, bars = self.masked.get(node, {}), self.barred.get(node, {})

        def look(source: fx.Node) -> Any:
            value = values[source]
            for dim, positions in masks.get(source, ()):
                value = _fill(value, dim, positions, 0.0)
            for dim, positions in bars.get(source, ()):
                value = _fill(value, dim, positions, -torch.inf)
            return value

        return call(node, look)

    def _over_kept(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Run a statistic on the kept positions, and put what comes out back in its places."""
        inner = fx.Graph()
        stand_in = {a: inner.placeholder(a.name) for a in node.all_input_nodes}
        copied = inner.node_copy(node, stand_in.__getitem__)
        found = find_rule(node)
        if found is not None and found.resize is not None:
            originals = {copy: a for a, copy in stand_in.items()} | {copied: node}
            found.resize(
                copied, Resizing(lambda n: self.analysis.terms(originals[n]), self.resolved.size_of, self.analysis.axes)
            )
        kept = {stand_in[a]: self._slice(values[a], self.analysis.terms(a)) for a in node.all_input_nodes}
        out = call(copied, kept.__getitem__)
        dims = self.analysis.terms(node)
        if isinstance(dims, list):
            return [self._spread(o, d) for o, d in zip(out, dims, strict=False)]
        return self._spread(out, dims)

    def _slice(self, value: Any, dims: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for dim, positions in self._cut_dims(dims):
            value = value.index_select(dim, positions.to(value.device))
        return value

    def _spread(self, value: Tensor, dims: tuple[Term, ...]) -> Tensor:
        for dim, positions in self._cut_dims(dims):
            shape = list(value.shape)
            shape[dim] = size(dims[dim])
            value = value.new_zeros(shape).index_copy(dim, positions.to(value.device), value)
        return value

    def _cut_dims(self, dims: tuple[Term, ...]) -> list[tuple[int, Tensor]]:
        found = [(i, self.resolved.positions(t)) for i, t in enumerate(dims)]
        return [(i, p) for i, p in found if p is not None]


def _widened(tensor: Tensor) -> Tensor:
    wide = tensor.double() if tensor.is_floating_point() else tensor
    return torch.nn.Parameter(wide, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else wide


def _fill(value: Tensor, dim: int, kept: Tensor, filler: float) -> Tensor:
    removed = torch.ones(value.shape[dim], dtype=torch.bool, device=value.device)
    removed[kept.to(value.device)] = False
    return value.masked_fill(removed.view(-1, *[1] * (value.ndim - dim - 1)), filler)
