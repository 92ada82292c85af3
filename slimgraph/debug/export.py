"""What was inferred, in the formats of other tools: GraphML, DOT, and node data for Model Explorer."""

from __future__ import annotations

import io
import json
from typing import Any

import networkx as nx
from torch import Tensor, fx

from slimgraph.debug.findings import Bisection
from slimgraph.groups import Structure

__all__ = ["node_data", "to_dot", "to_graphml"]

_COLOURS = {"residual": "#9aa0a6", "heads": "#4c78a8", "channels": "#e45756", "experts": "#72b7b2", "inner": "#bab0ac"}
_GRADIENT = [{"stop": 0, "bgColor": "#fff5eb"}, {"stop": 0.5, "bgColor": "#fd8d3c"}, {"stop": 1, "bgColor": "#7f2704"}]


def to_graphml(structure: Structure) -> str:
    """Groups and tensors as GraphML, with all attributes of `Structure.to_networkx`; for Gephi, yEd, Cytoscape."""
    buffer = io.BytesIO()
    nx.write_graphml(structure.to_networkx(), buffer)
    return buffer.getvalue().decode("utf-8")


def to_dot(structure: Structure) -> str:
    """Groups and tensors in Graphviz's language: groups are ellipses coloured by kind, sites' edges are bold."""
    graph = structure.to_networkx()
    lines = ["graph slimgraph {", '  graph [rankdir="LR"];', '  node [fontname="sans-serif"];']
    for name, data in graph.nodes(data=True):
        if data["type"] == "tensor":
            lines.append(f'  {_quoted(name)} [shape="box"];')
            continue
        style = "dashed" if data["frozen"] else "filled"
        label = f"{name}\\n{data['units']} {data['kind']}"
        colour = _COLOURS.get(data["kind"], "#ffffff")
        lines.append(
            f"  {_quoted(name)} [label={_quoted(label)}, style={_quoted(style)}, color={_quoted(colour)}, "
            f"fillcolor={_quoted(colour)}, tooltip={_quoted(data['frozen'] or 'can be cut')}];"
        )
    for one, other, data in graph.edges(data=True):
        width = 3 if data["site"] else 1
        lines.append(f'  {_quoted(one)} -- {_quoted(other)} [label="{data["dim"]}", penwidth="{width}"];')
    return "\n".join([*lines, "}"]) + "\n"


def node_data(found: Structure | Bisection) -> dict[str, Any]:
    """A node-data overlay for Model Explorer, which draws exported PyTorch programs.

    Its keys are names of graph nodes, those that Model Explorer gives the nodes of `torch.export`. The format is that
    of `model_explorer.node_data_builder.ModelNodeData`.

    Args:
        found: a structure, for the number of units that can be cut where a node's value holds some; or a bisection, for
            the relative error at every node.

    Returns:
        JSON-able: what goes into the file that Model Explorer loads.
    """
    values = _errors(found) if isinstance(found, Bisection) else _units(found)
    name = "relative error" if isinstance(found, Bisection) else "units that can be cut"
    results = {node: {"value": value} for node, value in values.items()}
    return {"graph": {"results": results, "name": name, "gradient": _GRADIENT}}


def _errors(found: Bisection) -> dict[str, float]:
    """Infinity, where values cannot be compared, is left out: JSON has none."""
    return {n.name: n.error for n in found.nodes if n.error < float("inf")}


def _units(structure: Structure) -> dict[str, int]:
    """Node -> units of the largest group, other than the residual stream, that its value holds."""
    units: dict[str, int] = {}
    analysis = structure.analysis
    for node in analysis.graph_module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        held = [structure.groups[g] for g in _groups_of(structure, node)]
        sizes = [g.units for g in held if g.frozen is None and g.kind in ("heads", "channels")]
        if sizes:
            units[node.name] = max(sizes)
    return units


def _groups_of(structure: Structure, node: fx.Node) -> list[str]:
    terms = structure.analysis.dims.get(node)
    if not isinstance(terms, tuple):
        return []
    atoms = [a for t in terms for a in structure.analysis.axes.atoms(t)]
    return [structure.atom_groups[a] for a in atoms if a in structure.atom_groups]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\\\\n", "\\n")
