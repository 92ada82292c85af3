"""Restoring one layer at a time: what the loss would be if a layer of the pruned model were the dense one.

All variants go through the model side by side, layer by layer, so that every layer's weights are fetched once: the
variant that restores layer j leaves the pruned run at the input of layer j, and from the next layer on runs pruned
again. Nothing before a layer is run twice.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, MutableMapping

from torch import Tensor, fx

from slimgraph.debug.opened import Opened
from slimgraph.debug.weave import Strands
from slimgraph.errors import GraphError
from slimgraph.execute import Observer

__all__ = ["restorations"]

_Known = MutableMapping[fx.Node, fx.Node]


def restorations(
    dense: Opened, pruned: Opened, look: Callable[[int], Callable[[Tensor, Tensor, Tensor], None]]
) -> tuple[Strands, list[Observer]]:
    """A graph that runs the pruned model once for every layer, with that layer restored.

    Args:
        dense: the model before.
        pruned: the model after, with equally many layers.
        look: layer -> what is called with token ids, dense logits and the logits with that layer restored.

    Raises:
        GraphError: a layer reads values of other layers besides the residual stream, so that it cannot be exchanged.
    """
    strands = Strands({"dense": dense.weights, "pruned": pruned.weights}, pruned.device)
    ours, theirs = _Segments(dense, strands, "dense"), _Segments(pruned, strands, "pruned")
    reference: _Known = ChainMap({}, ours.context)
    base: _Known = ChainMap({}, theirs.context)
    ours.emit(ours.cuts[0], reference)
    theirs.emit(theirs.cuts[0], base)
    variants: list[_Known] = []
    for layer in range(ours.layers):
        restored: _Known = ChainMap({ours.cuts[layer]: base[theirs.cuts[layer]]}, ours.context)
        ours.emit(ours.cuts[layer + 1], restored)
        ours.emit(ours.cuts[layer + 1], reference)
        for known in variants:
            theirs.emit(theirs.cuts[layer + 1], known)
        if layer + 1 < theirs.layers:
            theirs.emit(theirs.cuts[layer + 1], base)
        variants.append(ChainMap({theirs.cuts[layer + 1]: restored[ours.cuts[layer + 1]]}, theirs.context))
    wanted = ours.emit(ours.logits, reference).name
    observers = []
    for layer, known in enumerate(variants):
        name = theirs.emit(theirs.logits, known).name
        observers.append(Observer(name, (strands.ids.name, wanted, name), look(layer)))
    return strands, observers


class _Segments:
    """The nodes of a graph between one layer's input and the next one's."""

    def __init__(self, opened: Opened, strands: Strands, strand: str) -> None:
        self.strands, self.strand = strands, strand
        nodes = {n.name: n for n in opened.graph.graph.nodes}
        boundaries = opened.structure.boundaries()
        if not boundaries:
            raise GraphError(f"{opened.name} has no layers that repeat, so that none can be restored")
        self.cuts = [nodes[before] for before, _ in boundaries] + [nodes[boundaries[-1][1]]]
        self.layers = len(boundaries)
        (output,) = opened.graph.graph.find_nodes(op="output")
        self.logits: fx.Node = output.args[0]
        self.order = {n: i for i, n in enumerate(opened.graph.graph.nodes)}
        self.after_input = _descendants(self.cuts[0])
        # What does not depend on the residual stream, such as masks and positions, is the same for all variants.
        self.context: dict[fx.Node, fx.Node] = {}

    def emit(self, node: fx.Node, known: _Known) -> fx.Node:
        """Copy a node and what it needs beyond what is known; later values of the residual stream start from it."""
        if node in known:
            return known[node]
        for needed in self._missing(node, known):
            copied = self.strands.copy(needed, known, self.strand)
            if needed in self.after_input or needed is self.cuts[0]:
                known[needed] = copied
            else:
                self.context[needed] = copied
        return known[node]

    def _missing(self, node: fx.Node, known: _Known) -> Iterator[fx.Node]:
        """Nodes to copy, in graph order."""
        start = max((c for c in self.cuts if c in known), key=self.order.__getitem__, default=None)
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            each = stack.pop()
            if each in found or each in known:
                continue
            if start is not None and each in self.after_input and self.order[each] <= self.order[start]:
                raise GraphError(
                    f"{node.name} depends on {each.name}, a value of an earlier layer, besides the residual stream; "
                    "no layer of this model can be exchanged alone: ask for the comparison without restoring layers"
                )
            found.add(each)
            stack.extend(each.all_input_nodes)
        return iter(sorted(found, key=self.order.__getitem__))


def _descendants(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        each = stack.pop()
        if each not in found:
            found.add(each)
            stack.extend(each.users)
    return found
