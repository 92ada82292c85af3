"""Masked equivalence: what a pruned model must compute.

For any plan, the pruned model equals the dense model in which the removed positions are zeroed wherever they are summed
away: at the input of every contraction over a cut axis. Where a mean or variance is taken over a cut axis, it is taken
over the kept positions. This module runs the dense graph that way; nothing is sliced, so that it checks the slicing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.axes import Term, size
from slimgraph.errors import GraphError
from slimgraph.plan import Resolved
from slimgraph.rules import Resizing, find_rule
from slimgraph.trace import call, tensor_at

__all__ = ["masked_logits"]


def masked_logits(resolved: Resolved, ids: Tensor) -> Tensor:
    """Logits of the dense graph with the removed positions masked.

    Args:
        resolved: the plan, and the structure of the dense graph.
        ids: (batch, tokens) int64.

    Returns:
        (batch, tokens, vocabulary), in the graph's dtype.
    """
    return _MaskedRun(resolved).run(ids)


class _MaskedRun:
    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self.analysis = resolved.structure.analysis
        self.masked: dict[fx.Node, dict[fx.Node, list[tuple[int, Tensor]]]] = {}
        for c in self.analysis.contractions:
            positions = resolved.positions(c.term)
            if positions is not None:
                self.masked.setdefault(c.node, {}).setdefault(c.left, []).append((c.left_dim, positions))
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
        masks = self.masked.get(node, {})

        def look(source: fx.Node) -> Any:
            value = values[source]
            for dim, positions in masks.get(source, ()):
                kept = torch.zeros(value.shape[dim], dtype=value.dtype, device=value.device)
                kept[positions.to(value.device)] = 1
                value = value * kept.view(-1, *[1] * (value.ndim - dim - 1))
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
