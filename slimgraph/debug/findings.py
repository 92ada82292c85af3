"""What a bisection found, as data and in words; `slimgraph.debug.bisect` finds it."""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass
from typing import Any

from slimgraph.debug.report import table
from slimgraph.jsontext import finite

__all__ = ["Bisection", "Layer", "Node", "Projection"]


@dataclass(frozen=True)
class Node:
    """An aligned pair of graph nodes.

    Attributes:
        name: of the dense graph's node; `pruned` is the other's.
        operator, module: what it does, and the module that ran it.
        layer: index of the layer, or None.
        error: ‖pruned - dense‖ / ‖dense‖ over all tokens, both models on their own, at the positions that stay.
        cosine: between the two values, likewise.
        own: the error that arises here alone; None where no plan is known.
        lossy: whether pruning is meant to change the value.
        note: what else is wrong, such as shapes that do not fit.
    """

    name: str
    pruned: str
    operator: str
    module: str
    layer: int | None
    error: float
    cosine: float
    own: float | None
    lossy: bool
    note: str = ""


@dataclass(frozen=True)
class Projection:
    """A site.

    Attributes:
        site: its name; `kind` and `layer` as in the structure.
        node: of the dense graph.
        error, cosine: accumulated, as for a node.
        own: the error of this site alone, its input being the dense model's.
        bare: what that error would be with the cut units left out and nothing refitted; None where nothing was cut.
        suspect: why the site is worth a look, or None.
    """

    site: str
    kind: str
    layer: int | None
    node: str
    error: float
    cosine: float
    own: float | None
    bare: float | None
    suspect: str | None


@dataclass(frozen=True)
class Layer:
    """A layer: its output on the residual stream, and what restoring it alone would do.

    Attributes:
        layer, path: which.
        error, cosine: of its output, accumulated.
        kl, cross_entropy: of the pruned model with this layer dense, in nats per token; None where not measured.
        gain: by how much restoring it lowers the KL divergence.
    """

    layer: int
    path: str
    error: float
    cosine: float
    kl: float | None
    cross_entropy: float | None
    gain: float | None


@dataclass(frozen=True, repr=False)
class Bisection:
    """What the comparison of two models found; prints as text.

    Attributes:
        dense, pruned: which models.
        tokens, seq_len: how much text, in windows of what length.
        threshold: of the accumulated error; `tolerance` is that of unexplained differences.
        kl: KL(dense ‖ pruned) in nats per predicted token.
        dense_loss, pruned_loss: cross-entropy in nats per predicted token.
        nodes: aligned nodes that depend on the text, in order.
        sites, layers: in order.
        unaligned: number of nodes of either graph without a counterpart.
        planned: whether a plan said what pruning is meant to change.
    """

    dense: str
    pruned: str
    tokens: int
    seq_len: int
    threshold: float
    tolerance: float
    kl: float
    dense_loss: float
    pruned_loss: float
    nodes: tuple[Node, ...]
    sites: tuple[Projection, ...]
    layers: tuple[Layer, ...]
    unaligned: int = 0
    planned: bool = True

    @property
    def first_past_threshold(self) -> Node | None:
        """The first node whose accumulated error is above the threshold."""
        return next((n for n in self.nodes if not n.error <= self.threshold), None)

    @property
    def faults(self) -> list[Node]:
        """Nodes that differ although pruning is not meant to change them, in order; the first one is the cause."""
        return [n for n in self.nodes if n.own is not None and not n.lossy and not n.own <= self.tolerance]

    @property
    def suspects(self) -> list[Projection]:
        """Sites that lose more than pruning explains."""
        return [s for s in self.sites if s.suspect]

    @property
    def costliest(self) -> Layer | None:
        """The layer that costs most: by what restoring it gains, else by how much the error grows over it."""
        if not self.layers:
            return None
        if any(each.gain is not None for each in self.layers):
            return max(self.layers, key=lambda each: -math.inf if each.gain is None else each.gain)
        before = (0.0, *(each.error for each in self.layers))
        return max(self.layers, key=lambda each: each.error - before[each.layer])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN and infinity become null."""
        found: dict[str, Any] = finite(
            {
                **asdict(self),
                "first_past_threshold": _name(self.first_past_threshold),
                "faults": [n.name for n in self.faults],
                "suspects": [s.site for s in self.suspects],
                "costliest_layer": None if self.costliest is None else self.costliest.layer,
            }
        )
        return found

    def __repr__(self) -> str:
        return _text(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(_text(self))}</pre>"


def _name(node: Node | None) -> str | None:
    return None if node is None else node.name


# ---- in words ----


def _text(found: Bisection) -> str:
    lines = [
        f"{found.pruned} against {found.dense}: {found.tokens:,} tokens in windows of {found.seq_len}",
        f"loss         {found.dense_loss:.4f} dense, {found.pruned_loss:.4f} pruned, KL {found.kl:.4f}, in nats",
        f"past {found.threshold:<8g}{_where(found.first_past_threshold)}",
    ]
    if found.costliest is not None:
        lines.append(f"costs most   {_cost(found.costliest)}")
    lines += ["", _layer_table(found), "", *_fault_lines(found)]
    return "\n".join(lines)


def _where(node: Node | None) -> str:
    if node is None:
        return "no node"
    return f"first at {node.name} ({node.operator} in {node.module or 'the model'}), error {node.error:.3g}"


def _cost(layer: Layer) -> str:
    if layer.gain is None:
        return f"{layer.path}, after which the error is {layer.error:.3g}"
    return f"{layer.path}: restoring it alone lowers KL by {layer.gain:.4f} to {layer.kl:.4f}"


def _layer_table(found: Bisection) -> str:
    header = ["layer", "error", "cosine"]
    kinds = list(dict.fromkeys(s.kind for s in found.sites))
    header += [f"{kind}: own" for kind in kinds] + ["KL restored", "gain"]
    rows = []
    for b in found.layers:
        own = [_worst(s.own for s in found.sites if s.layer == b.layer and s.kind == kind) for kind in kinds]
        restored = ["" if b.kl is None else f"{b.kl:.4f}", "" if b.gain is None else f"{b.gain:+.4f}"]
        rows.append([str(b.layer), f"{b.error:.3g}", f"{b.cosine:.4f}", *own, *restored])
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _worst(errors: Any) -> str:
    known = [e for e in errors if e is not None]
    return f"{max(known):.3g}" if known else ""


def _fault_lines(found: Bisection) -> list[str]:
    lines = []
    if not found.planned and any(n.own is None for n in found.nodes):
        lines.append("unexplained  not known: the pruned model says no plan")
    elif not found.faults:
        lines.append("unexplained  nothing: where pruning is not meant to change a value, both models agree")
    else:
        first = found.faults[0]
        lines.append(
            f"unexplained  {first.name} ({first.operator} in {first.module or 'the model'}) differs by {first.own:.3g} "
            f"although its inputs agree{f': {first.note}' if first.note else ''}"
        )
        modules = list(dict.fromkeys(n.module for n in found.faults[1:] if n.module != first.module))
        if modules:
            many = len(found.faults) - 1
            lines.append(f"             then {many} more node{'s' if many > 1 else ''}, in {', '.join(modules[:4])}")
    lines += [f"suspect      {s.site}: {s.suspect}" for s in found.suspects]
    return lines
