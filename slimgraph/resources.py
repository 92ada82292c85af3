"""What one unit of a site takes of a resource: multiply-accumulates, cache, or measured time.

The three are linear in a width, or nearly so. All sites that are alike are therefore cut to half together, the graph is
measured before and after, and the difference is shared out among the units that went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.benchmark import Timer

from slimgraph.cost import OnShapes
from slimgraph.errors import GraphError
from slimgraph.groups import Structure
from slimgraph.plan import Cut, Plan, resolve
from slimgraph.surgery import prune_graph
from slimgraph.units import Units, parameter_count

__all__ = ["Measure", "cached_numbers", "per_unit", "seconds"]

Measure = Callable[[fx.GraphModule], float]
"""How much of a resource a graph takes."""

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_SAME_NUMBERS = {  # repeat heads for the queries of a group, or only say otherwise how numbers lie
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.repeat_interleave.self_int,
    torch.ops.aten.reshape.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.view.default,
}
_LEAST_SECONDS = 0.3  # of measuring one graph


def per_unit(structure: Structure, units: Sequence[Units], measure: Measure) -> dict[str, float]:
    """What one unit of each block of a site takes.

    Args:
        structure: of the dense model; not changed.
        units: of the sites.
        measure: called with the dense graph and with graphs where sites are cut.

    Returns:
        Site name -> amount, in what `measure` returns.
    """
    graph_module = structure.analysis.graph_module
    sizes = {name: p.numel() for name, p in graph_module.named_parameters()}
    before = measure(graph_module)
    alike: dict[object, list[Units]] = {}
    for u in units:
        parameters = parameter_count(structure, {u.group: _half(u)}, sizes)
        alike.setdefault((u.site.kind, u.block_size, u.block_count, parameters), []).append(u)
    found: dict[str, float] = {}
    for same in alike.values():
        entries: dict[str, Cut] = {}
        for u in same:
            kept = torch.arange(len(u.blocks)).view(u.block_count, u.block_size)[:, : _half(u)]
            entries |= u.cut(kept.flatten())
        gone = sum(u.block_size - _half(u) for u in same)
        saved = before - measure(prune_graph(resolve(structure, Plan(entries)))) if gone else 0.0
        found |= {u.site.name: saved / max(1, gone) for u in same}
    return found


def cached_numbers(graph_module: fx.GraphModule, tokens: int) -> int:
    """Keys and values of a prompt that attention reads, before heads are repeated: what a cache holds of it.

    A cache that forgets, as that of a sliding window, holds fewer once the prompt is longer than its window.

    Args:
        graph_module: as made by `slimgraph.trace.trace`; not changed.
        tokens: length of the prompt.

    Raises:
        GraphError: the graph has no attention that can be told.
        ModelError: the graph needs values to run, not only shapes.
    """
    chains = [_back(a) for n in graph_module.graph.nodes if n.target is _ATTENTION for a in n.args[1:3]]
    if not chains:
        raise GraphError(
            f"the graph of {type(graph_module).__name__} has no scaled_dot_product_attention, so what a cache holds "
            "cannot be told; expected a model that is traced with sdpa attention: take another budget"
        )
    numbers = {n.name: 0 for chain in chains for n in chain}
    OnShapes(graph_module, lambda node, value: numbers.update({node.name: value.numel()}), numbers).count(tokens)
    # Of equally small ones the earliest: layers that share a cache meet there.
    held = {min(reversed(chain), key=lambda n: numbers[n.name]).name for chain in chains}
    return sum(numbers[name] for name in held)


def seconds(graph_module: fx.GraphModule, ids: Tensor) -> float:
    """Median seconds of one forward pass, where the graph's weights are, by `torch.utils.benchmark`.

    Args:
        graph_module: not changed.
        ids: (samples, tokens) int64, on the same device.
    """
    with torch.no_grad():
        timer = Timer("graph(ids)", globals={"graph": graph_module, "ids": ids}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=_LEAST_SECONDS).median)


def _half(units: Units) -> int:
    return max(1, units.block_size // 2)


def _back(node: Any) -> list[fx.Node]:
    """A value and those it is made of by repeating and reshaping alone, latest first."""
    return list(_steps_back(node))


def _steps_back(node: Any) -> Iterator[fx.Node]:
    yield node
    while node.target in _SAME_NUMBERS:
        node = node.args[0]
        yield node
