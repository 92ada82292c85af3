"""Checks that can stand anywhere in a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from slimgraph.errors import GraphError, NumericsError
from slimgraph.passes.base import Pass, register
from slimgraph.state import State, structure_of
from slimgraph.surgery import refresh_shapes

__all__ = ["Verify"]


@register
@dataclass(frozen=True)
class Verify(Pass):
    """Every invariant of a graph: well formed, consistent shapes, accepted by the analysis, finite numbers."""

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Check; raises on the first thing that does not hold."""
        with state.watch("verify"):
            _check(graph_module, has_values=state.sink is None)


def _check(graph_module: fx.GraphModule, *, has_values: bool) -> None:
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise GraphError(f"the graph is not well formed: {error}") from error
    refresh_shapes(graph_module)
    structure_of(graph_module)
    # Streamed weights are checked as they are written; what the graph holds then only stands for them.
    for name, parameter in graph_module.named_parameters() if has_values else ():
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise NumericsError(f"parameter {name} holds NaN or infinity")
