"""A resolved plan applied to the traced graph: parameters sliced, sizes in the graph rewritten.

The input graph module is not changed. Tensors that lose nothing are shared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from slimgraph.errors import GraphError
from slimgraph.plan import Resolved
from slimgraph.rules import Resizing, find_rule, operator_name
from slimgraph.structure import Site
from slimgraph.trace import call, tensor_at

__all__ = ["Refit", "assign", "prune_graph", "refresh_shapes"]


@dataclass(frozen=True)
class Refit:
    """A site's new output projection.

    Attributes:
        weight: (out_features, kept channels), whatever the parameter's own orientation is.
        bias: (out_features,), or None when the site has none and gains none.
    """

    weight: Tensor
    bias: Tensor | None


def prune_graph(
    resolved: Resolved,
    refits: Mapping[str, Refit] | None = None,
    *,
    stand_in: Callable[[Sequence[int]], Tensor] | None = None,
) -> fx.GraphModule:
    """The pruned graph.

    Args:
        resolved: the plan and the structure of the graph to prune.
        refits: site name -> new projection; sites that are not named keep their sliced weights.
        stand_in: makes a tensor of a shape, to stand for each parameter that is cut: where the parameters have no
            values that matter, and slicing them would need memory.

    Returns:
        A new graph module; shapes in its metadata are those after the cut.

    Raises:
        GraphError: an operator's size arguments cannot be rewritten, or shapes do not come out as the terms say.
    """
    structure = resolved.structure
    old = structure.analysis.graph_module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(old.graph, copies)
    graph.output(output)
    originals = {copy: node for node, copy in copies.items()}
    tensors = {
        str(n.target): _selected(resolved, str(n.target), tensor_at(old, str(n.target)), stand_in)
        for n in old.graph.find_nodes(op="get_attr")
    }
    wrapped = {k: _like(tensor_at(old, k), t) for k, t in tensors.items()}
    result = fx.GraphModule(wrapped, graph, type(old).__name__)
    resizing = Resizing(
        lambda n: structure.analysis.terms(originals.get(n, n)), resolved.size_of, structure.analysis.axes
    )
    for node, copy in copies.items():
        if node.op == "call_function":
            _resize(copy, resizing)
        if node in structure.analysis.created:
            _select_created(result, copy, resolved.selections.get(node.name, {}))
    for site in structure.sites:
        if refits and site.name in refits:
            _refit(result, next(c for n, c in copies.items() if n.name == site.node), site, refits[site.name])
    refresh_shapes(result)
    _check_shapes(resolved, copies)
    result.graph.lint()
    result.recompile()
    return result.eval()


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor under a dotted name, as a parameter if it is one, else as a buffer; modules on the way are made."""
    path, _, leaf = name.rpartition(".")
    for step in path.split(".") if path else ():
        if not hasattr(module, step):
            module.add_module(step, nn.Module())
        module = getattr(module, step)
    if isinstance(tensor, nn.Parameter):
        setattr(module, leaf, tensor)  # also in place of a plain attribute, as of a `bias` that is None
    else:
        module.register_buffer(leaf, tensor)


def refresh_shapes(graph_module: fx.GraphModule) -> None:
    """Recompute the shapes in the graph's metadata, in place, on fake tensors.

    Raises:
        GraphError: an operator refuses its inputs; the message names the node.
    """
    (ids,) = graph_module.graph.find_nodes(op="placeholder")
    fake_ids = ids.meta["val"]
    mode: FakeTensorMode = fake_ids.fake_mode
    mode.allow_non_fake_inputs = True
    values: dict[fx.Node, Any] = {ids: fake_ids}
    # Some operators only take symbolic sizes through their Python implementations, as during tracing.
    with mode, enable_python_dispatcher(), torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                tensor = tensor_at(graph_module, str(node.target))
                values[node] = mode.from_tensor(tensor, static_shapes=True)
            elif node.op == "call_function":
                try:
                    values[node] = call(node, values.__getitem__)
                except Exception as error:
                    raise GraphError(
                        f"{node.name}: {operator_name(node)} does not fit its inputs any more: "
                        f"{str(error).splitlines()[0]}"
                    ) from error
            if node in values:
                node.meta["val"] = values[node]


def _selected(
    resolved: Resolved, name: str, tensor: Tensor, stand_in: Callable[[Sequence[int]], Tensor] | None
) -> Tensor:
    if stand_in is None or not isinstance(tensor, nn.Parameter) or name not in resolved.selections:
        return resolved.select(name, tensor)
    return stand_in(resolved.shape(name))


def _like(old: Tensor, new: Tensor) -> Tensor:
    if not isinstance(old, nn.Parameter) or new is old:
        return new
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _resize(node: fx.Node, resizing: Resizing) -> None:
    found = find_rule(node)
    if found is not None and found.resize is not None and isinstance(node.meta.get("val"), (Tensor, list, tuple)):
        found.resize(node, resizing)


def _select_created(module: fx.GraphModule, node: fx.Node, selections: dict[int, Tensor]) -> None:
    """Read the kept positions out of a tensor that the graph makes itself."""
    made = node
    for dim, positions in selections.items():
        name = f"{node.name}_kept_{dim}"
        module.register_buffer(name, positions)
        with module.graph.inserting_after(made):
            index = module.graph.get_attr(name)
        with module.graph.inserting_after(index):
            chosen = module.graph.call_function(torch.ops.aten.index_select.default, (made, dim, index))
        made.replace_all_uses_with(chosen, delete_user_cb=_all_but(chosen))
        made = chosen


def _refit(module: fx.GraphModule, node: fx.Node, site: Site, refit: Refit) -> None:
    old = tensor_at(module, site.parameter)
    weight = refit.weight if site.in_dim == 1 else refit.weight.T
    if weight.shape != old.shape:
        raise GraphError(f"{site.parameter}: a refit of shape {tuple(weight.shape)}, expected {tuple(old.shape)}")
    assign(module, site.parameter, nn.Parameter(weight.to(old.dtype).contiguous(), requires_grad=old.requires_grad))
    if refit.bias is None:
        return
    assign(module, site.refit_bias, nn.Parameter(refit.bias.to(old.dtype), requires_grad=old.requires_grad))
    if site.bias is not None:
        return
    with module.graph.inserting_before(node):
        added = module.graph.get_attr(site.refit_bias)
    if operator_name(node) == "aten.linear.default":
        node.args = (*node.args[:2], added)
        return
    with module.graph.inserting_after(node):
        biased = module.graph.call_function(torch.ops.aten.add.Tensor, (node, added))
    node.replace_all_uses_with(biased, delete_user_cb=_all_but(biased))


def _all_but(node: fx.Node) -> Callable[[fx.Node], bool]:
    return lambda user: user is not node


def _check_shapes(resolved: Resolved, copies: dict[fx.Node, fx.Node]) -> None:
    """Every static size in the graph must be what the terms say."""
    analysis = resolved.structure.analysis
    for node, copy in copies.items():
        value = copy.meta.get("val")
        if not isinstance(value, Tensor) or node in analysis.created:
            continue
        for dim, (n, term) in enumerate(zip(value.shape, analysis.terms(node), strict=True)):
            if isinstance(n, int) and n != resolved.size_of(term):
                raise GraphError(
                    f"{node.name}: dimension {dim} has size {n} after the cut, expected {resolved.size_of(term)} "
                    f"({analysis.axes.show(term)})"
                )
