"""Checks that can stand anywhere in a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from slimgraph.invariants import check_graph
from slimgraph.passes.base import Pass, register
from slimgraph.state import State

__all__ = ["Verify"]


@register
@dataclass(frozen=True)
class Verify(Pass):
    """Every invariant of a graph: well formed, consistent shapes, accepted by the analysis, finite numbers."""

    gives: ClassVar[str | None] = ""

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Check; raises on the first thing that does not hold."""
        with state.watch("verify"):
            # Streamed weights are checked as they are written; what the graph holds then only stands for them.
            check_graph(graph_module, has_values=state.sink is None)
