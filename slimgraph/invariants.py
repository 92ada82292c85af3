"""What must hold of a pruned graph, whatever made it: checks on graphs in memory.

*Masked equivalence* of a model that was refitted is tested with the refits undone: with the dense weights in the
projections that were refitted, it must compute what the dense model computes with the removed units zeroed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from slimgraph.errors import GraphError, NumericsError
from slimgraph.execute import Observer, run
from slimgraph.groups import Structure, infer
from slimgraph.masked import masked_logits
from slimgraph.module import tolerance
from slimgraph.plan import Plan, Resolved, resolve
from slimgraph.state import State
from slimgraph.surgery import refresh_shapes
from slimgraph.trace import probe, tensor_at

__all__ = [
    "check_graph",
    "check_masked",
    "check_pass",
    "differing_parameters",
    "is_refitted",
    "refitted_parameters",
    "unrefitted_logits",
]


def refitted_parameters(structure: Structure, plan: Plan) -> dict[str, str]:
    """Weight of every site that a plan cuts -> the bias that a refit gives it, by the name it has or gets."""
    cut = {name for name, c in plan.cuts.items() if c.kept < c.units}
    return {site.parameter: site.refit_bias for site in structure.sites if cut.intersection(site.groups)}


def is_refitted(name: str, structure: Structure, plan: Plan) -> bool:
    """Whether a parameter is one that recovery may change."""
    projections = refitted_parameters(structure, plan)
    return name in projections or name in projections.values()


def unrefitted_logits(pruned: fx.GraphModule, resolved: Resolved, ids: Tensor) -> Tensor:
    """Logits of a pruned graph with its refits undone: (batch, tokens, vocabulary).

    Args:
        pruned: the pruned graph, refitted or not.
        resolved: the plan, on the structure of the dense graph with its weights.
        ids: (batch, tokens) int64.
    """
    dense = resolved.structure.analysis.graph_module
    undone = refitted_parameters(resolved.structure, resolved.plan)
    known = {str(n.target) for n in dense.graph.find_nodes(op="get_attr")}
    biases = set(undone.values())

    def fetch(name: str) -> Tensor:
        if name in known and (name in undone or name in biases):
            return resolved.select(name, tensor_at(dense, name))
        if name in biases:  # added by the refit
            return torch.zeros_like(tensor_at(pruned, name))
        return tensor_at(pruned, name)

    (output,) = pruned.graph.find_nodes(op="output")
    found: list[Tensor] = []
    last = output.args[0].name
    run(pruned, [ids], weights=fetch, observers=[Observer(last, (last,), found.append)])
    return found[0]


def check_masked(pruned: fx.GraphModule, structure: Structure, plan: Plan, *, ids: Tensor | None = None) -> float:
    """Check masked equivalence of a pruned graph, refits apart.

    Args:
        pruned: the pruned graph.
        structure: of the dense graph, with its weights.
        plan: which units stayed.
        ids: (batch, tokens) int64 to run both on; a few fixed tokens by default.

    Returns:
        The largest difference of logits, over the largest logit.

    Raises:
        GraphError: they are not the same to the precision of the dtype.
    """
    resolved = resolve(structure, plan)
    tokens = probe(structure.analysis.graph_module) if ids is None else ids
    expected = masked_logits(resolved, tokens)
    found = unrefitted_logits(pruned, resolved, tokens)
    if found.shape != expected.shape:
        raise GraphError(
            f"the pruned graph gives logits of shape {tuple(found.shape)}, expected those of the masked dense "
            f"graph, {tuple(expected.shape)}"
        )
    scale = expected.double().abs().max().clamp(min=1e-30)
    difference = float(((found.double() - expected.double()).abs().max() / scale).nan_to_num(torch.inf))
    if not difference <= tolerance(pruned):
        raise GraphError(
            f"the pruned graph is not the masked dense one, refits apart: logits differ by {difference:.2g} of the "
            f"largest one, expected at most {tolerance(pruned):.2g}; {_changed(pruned, resolved)}"
        )
    return difference


def check_pass(graph_module: fx.GraphModule, state: State, dense: Structure) -> None:
    """Check every invariant of a graph after a pass.

    Args:
        graph_module: the graph as the pass left it.
        state: says what was cut.
        dense: of the graph before the first pass.

    Raises:
        GraphError: the graph is not well formed, or not the masked dense one, refits apart.
        NumericsError: a parameter holds NaN or infinity.
    """
    check_graph(graph_module)
    if not any(p.is_meta for p in graph_module.parameters()):
        check_masked(graph_module, dense, state.plan)


def check_graph(graph_module: fx.GraphModule, *, has_values: bool = True) -> None:
    """Check that a graph is well formed, its shapes consistent, its axes analysable and its parameters finite.

    Args:
        graph_module: the graph; the shapes in its metadata are worked out again.
        has_values: whether its parameters hold the model's values, and not something that stands for them.

    Raises:
        GraphError: names the node.
        NumericsError: names the parameter.
    """
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise GraphError(f"the graph is not well formed: {error}") from error
    refresh_shapes(graph_module)
    infer(graph_module)
    for name, parameter in graph_module.named_parameters() if has_values else ():
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            raise NumericsError(f"parameter {name} holds NaN or infinity")


def _changed(pruned: fx.GraphModule, resolved: Resolved) -> str:
    """The first parameter that is not the dense one's slice."""
    differing = differing_parameters(dict(pruned.named_parameters()), resolved)
    if not differing:
        return (
            "all weights are slices of the dense ones, so that the graph itself differs (slimgraph bisect finds where)"
        )
    return f"{differing[0]} is not the slice of the dense weight that the plan says ({len(differing)} are not)"


def differing_parameters(parameters: Mapping[str, Tensor], resolved: Resolved) -> list[str]:
    """Parameters that are not the dense ones' slices, those that recovery may change left out."""
    dense = resolved.structure.analysis.graph_module
    names: Collection[str] = {str(n.target) for n in dense.graph.find_nodes(op="get_attr")}
    found = []
    for name, tensor in parameters.items():
        if name not in names or is_refitted(name, resolved.structure, resolved.plan):
            continue
        expected = resolved.select(name, tensor_at(dense, name))
        if expected.shape != tensor.shape or not torch.equal(expected.to(tensor), tensor):
            found.append(name)
    return found
