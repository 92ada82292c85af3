"""Whole layers that are skipped: the graph without them, and what stands in their places in the module.

A skipped layer hands on what it is given. In the module it keeps its place and its number, so that neither the
configuration nor the names of other layers' parameters change.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimgraph.errors import ModelError, PlanError
from slimgraph.structure import Structure
from slimgraph.trace import evaluating, module_path, tensor_at, uncached

__all__ = ["SkippedLayer", "outputs_of", "skip_layers", "skippable", "without_layers"]


class SkippedLayer(nn.Module):
    """Stands where a layer was, and returns its first argument.

    Args:
        layer: what stood here. Its plain attributes are kept, for models that read them to say what a layer is given.
        outputs: length of the tuple that it returned, of which all but the first are None now; 0 for a tensor.
    """

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        known = vars(self)
        for name, value in vars(layer).items():
            if name not in known and isinstance(value, bool | int | float | str | None):
                setattr(self, name, value)
        self.outputs = outputs
        self._reads = next(iter(inspect.signature(layer.forward).parameters))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument of the layer, in the form that the layer returned it."""
        value = args[0] if args else kwargs[self._reads]
        return (value, *[None] * (self.outputs - 1)) if self.outputs else value


def skip_layers(structure: Structure, layers: Sequence[str]) -> fx.GraphModule:
    """The graph without some of its layers, whose input on the residual stream takes the place of their output.

    Args:
        structure: of the graph, which is not changed; parameters are shared with it.
        layers: module paths, as in `Structure.layers`.

    Raises:
        PlanError: a path is no layer, or one that cannot be skipped: the first of its kind, or one that has more to do
            with the rest of the model than to read the residual stream and to write it.
        GraphError: the graph does not show what goes into a layer and what comes out.
    """
    places = _places(structure, layers)
    _check_stream(structure, places)
    old = structure.analysis.graph_module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(old.graph, copies))
    by_name = {node.name: copied for node, copied in copies.items()}
    boundaries = structure.boundaries()
    for i in reversed(places):  # the last first: what goes into a layer may come out of one that is skipped as well
        before, after = boundaries[i]
        by_name[after].replace_all_uses_with(by_name[before])
    # No operator of a traced graph does anything but compute; one that could draw random numbers counts as impure.
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    _check_gone(structure, places, graph)
    tensors = {str(n.target): tensor_at(old, str(n.target)) for n in graph.find_nodes(op="get_attr")}
    result = fx.GraphModule(tensors, graph, type(old).__name__)
    result.graph.lint()
    return result.eval()


def skippable(structure: Structure, layers: Sequence[str]) -> dict[str, fx.GraphModule]:
    """Those of some layers that can be skipped, each with the graph without it; see `skip_layers`."""
    found = {}
    for path in layers:
        with contextlib.suppress(PlanError):
            found[path] = skip_layers(structure, [path])
    return found


def without_layers(model: nn.Module, outputs: Mapping[str, int]) -> nn.Module:
    """A copy of a model that skips layers; it shares all tensors with the model.

    Args:
        model: not changed.
        outputs: module path of each layer that is skipped -> what it returns, see `outputs_of`.
    """
    shared: dict[int, object] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    result = copy.deepcopy(model, shared)
    for path, n in outputs.items():
        result.set_submodule(path, SkippedLayer(result.get_submodule(path), n))
    return result


def outputs_of(model: nn.Module, layers: Sequence[str], ids: Tensor) -> dict[str, int]:
    """For each of some layers the length of the tuple that it returns; 0 where it returns a tensor.

    Args:
        model: a causal language model.
        layers: module paths.
        ids: (batch, tokens) int64 to run it on.

    Raises:
        ModelError: a layer returns something else, or is not called.
    """
    found: dict[str, Any] = {}

    def watch(path: str) -> Any:
        return lambda _module, _args, output: found.setdefault(path, output)

    hooks = [model.get_submodule(path).register_forward_hook(watch(path)) for path in layers]
    try:
        with evaluating(model), torch.no_grad():
            uncached(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: _length(path, found.get(path)) for path in layers}


def _length(path: str, output: object) -> int:
    if isinstance(output, Tensor):
        return 0
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return len(output)
    raise ModelError(
        f"layer {path} returns {'nothing' if output is None else type(output).__name__}; expected a tensor or a tuple "
        "that begins with one, so that nothing can stand in its place: skip another layer. The pruned graph is sound"
    )


def _places(structure: Structure, layers: Sequence[str]) -> list[int]:
    """Indices of the layers, ascending."""
    known = {path: i for i, path in enumerate(structure.layers)}
    for path in layers:
        if path not in known:
            raise PlanError(
                f"no layer is called {path!r}; expected one of {', '.join(structure.layers[:3])} ... as `slimgraph "
                "inspect` lists them"
            )
    first = _first_of_kind(structure)
    for path in layers:
        if known[path] in first:
            raise PlanError(
                f"layer {path} is the first one that reads {first[known[path]]}; expected one that comes later, as "
                "caches and masks of all layers of a kind are told by the first one: skip a later one"
            )
    return sorted({known[path] for path in layers})


def _first_of_kind(structure: Structure) -> dict[int, str]:
    """The first layer of each kind -> what layers of its kind read beside the residual stream, like masks and angles.

    Caches tell by the first layer how many tokens came before, and masks of one kind of attention by its first layer.
    """
    inside = _layer_of_nodes(structure)
    reads: dict[int, set[str]] = {i: set() for i in range(len(structure.layers))}
    for node, layer in inside.items():
        outer = [a for a in node.all_input_nodes if a.op == "call_function" and a not in inside]
        reads[layer] |= {a.name for a in outer if isinstance(a.meta.get("val"), Tensor)}
    for i, (before, _) in enumerate(structure.boundaries()):
        reads[i].discard(before)
    first: dict[frozenset[str], int] = {}
    for i, names in reads.items():
        first.setdefault(frozenset(names), i)
    return {i: ", ".join(sorted(names)) or "the residual stream alone" for names, i in first.items()}


def _layer_of_nodes(structure: Structure) -> dict[fx.Node, int]:
    """Every node that a layer computes -> its layer."""
    found = {}
    for node in structure.analysis.graph_module.graph.nodes:
        path = f"{module_path(node)}."
        for i, layer in enumerate(structure.layers):
            if node.op == "call_function" and path.startswith(f"{layer}."):
                found[node] = i
    return found


def _check_stream(structure: Structure, places: Sequence[int]) -> None:
    """What goes into a skipped layer must go nowhere else: a sum with it outside would then count it twice."""
    inside = _layer_of_nodes(structure)
    by_name = {n.name: n for n in structure.analysis.graph_module.graph.nodes}
    boundaries = structure.boundaries()
    for i in places:
        before = by_name[boundaries[i][0]]
        other = next((u for u in before.users if inside.get(u) != i), None)
        if other is not None:
            raise PlanError(
                f"layer {structure.layers[i]} cannot be skipped: {other.name} outside of it reads its input as "
                "well; expected a layer that adds to the residual stream itself. Skip another one"
            )


def _check_gone(structure: Structure, places: Sequence[int], graph: fx.Graph) -> None:
    """Nothing of a skipped layer may be left: what another layer shares with it would be there all the same."""
    for i in places:
        inside = f"{structure.layers[i]}."
        for node in sorted(graph.nodes, key=lambda n: n.op == "get_attr"):  # what it computes reads its weights, too
            computed = node.op == "call_function" and f"{module_path(node)}.".startswith(inside)
            if computed or (node.op == "get_attr" and str(node.target).startswith(inside)):
                what = f"{node.name}, which is computed there" if computed else f"its {node.target}"
                raise PlanError(
                    f"layer {structure.layers[i]} cannot be skipped: {next(iter(node.users)).name} reads {what}; "
                    "expected a layer whose only output is the residual stream. Skip another one"
                )
