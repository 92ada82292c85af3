"""Run the axis rules over a traced graph: terms for every dimension of every tensor.

Nothing here knows an architecture. What comes out is the raw material that `slimgraph.groups` reads groups and sites
from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.axes import DATA, Axes, Term, size
from slimgraph.errors import GraphError
from slimgraph.rules import Choice, Context, Contraction, Dims, NotCoveredError, find_rule, operator_name

__all__ = ["Analysis", "Refusal", "analyse"]


# Operators that move integers about without changing them, and those whose rules read integers as positions.
_MOVES = frozenset(
    (
        "reshape",
        "view",
        "_unsafe_view",
        "flatten",
        "unsqueeze",
        "squeeze",
        "expand",
        "transpose",
        "permute",
        "t",
        "slice",
    )
)
_COPIES = frozenset(("to", "_to_copy", "clone", "contiguous", "detach", "repeat_interleave", "sym_size"))
_LOOKS_UP = frozenset(("index", "gather", "index_select", "scatter", "scatter_add", "one_hot", "embedding"))


@dataclass(frozen=True)
class Refusal:
    """An operator without a rule met axes that could otherwise have been cut, and froze them.

    `why` says what its rule does not cover, where it has one.
    """

    node: str
    operator: str
    frozen: tuple[str, ...]
    why: str = ""


@dataclass
class Analysis:
    """Terms of a graph.

    Attributes:
        graph_module: the analysed graph; its nodes are the keys below.
        axes: the algebra with all atoms.
        dims: node -> terms of its output, or a list of them for several outputs; None for what is not a tensor.
        sources: name of a parameter, buffer or tensor made by the graph -> its terms.
        contractions: nodes that sum over an axis shared by two inputs, in graph order.
        statistics: (node, axis) where a mean, variance or sum is taken over an axis.
        heads: axes over which activations are multiplied separately.
        created: nodes that make a tensor whose positions differ.
        moving: nodes whose value depends on the model's input.
        choices: softmaxes and rankings over an axis.
        ranges: (node, output) whose integers are positions of an axis -> that axis.
        refusals: operators without a rule, where that froze something.
    """

    graph_module: fx.GraphModule
    axes: Axes
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    sources: dict[str, Dims] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    statistics: list[tuple[fx.Node, Term]] = field(default_factory=list)
    heads: list[Term] = field(default_factory=list)
    created: dict[fx.Node, Dims] = field(default_factory=dict)
    moving: set[fx.Node] = field(default_factory=set)
    choices: list[Choice] = field(default_factory=list)
    ranges: dict[tuple[fx.Node, int], Term] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def terms(self, node: fx.Node) -> Any:
        """The node's terms in normal form: what was known when it was analysed plus all that was learnt since."""
        return _normal(self.axes, self.dims[node])


def analyse(graph_module: fx.GraphModule) -> Analysis:
    """Find the terms of every tensor in a traced graph.

    Args:
        graph_module: as made by `slimgraph.trace.trace`; not changed.

    Raises:
        GraphError: a rule contradicts the shapes in the graph.
    """
    analysis = Analysis(graph_module, Axes())
    for node in graph_module.graph.nodes:
        analysis.axes.cause = node.name
        if any(a in analysis.moving for a in node.all_input_nodes) or node.op == "placeholder":
            analysis.moving.add(node)
        match node.op:
            case "placeholder":
                analysis.dims[node] = _fresh(analysis, node, "data", DATA)
            case "get_attr":
                analysis.dims[node] = _source(analysis, node)
            case "call_function":
                analysis.dims[node] = _call(analysis, node)
            case "output":
                for made in node.all_input_nodes:
                    for term in analysis.dims[made] or ():
                        analysis.axes.freeze(term, "the model's output")
            case _:
                raise GraphError(f"{node.name}: found a {node.op} node; expected a graph made by torch.export")
    return analysis


def _fresh(analysis: Analysis, node: fx.Node, label: str, frozen: str | None) -> Dims:
    value = node.meta["val"]
    return tuple(analysis.axes.atom(_hint(n), label, frozen) for n in value.shape)


def _source(analysis: Analysis, node: fx.Node) -> Dims:
    name = str(node.target)
    if name not in analysis.sources:
        shape = node.meta["val"].shape
        analysis.sources[name] = tuple(analysis.axes.atom(int(n), f"{name}[{i}]") for i, n in enumerate(shape))
    return analysis.sources[name]


def _call(analysis: Analysis, node: fx.Node) -> Any:
    values = node.meta.get("val")
    outputs = [v for v in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(v, Tensor)]
    if not outputs:
        return None
    context = Context(
        axes=analysis.axes,
        node=node,
        shapes=[tuple(_hint(n) for n in v.shape) for v in outputs],
        symbolic=[tuple(not isinstance(n, int) for n in v.shape) for v in outputs],
        moving=analysis.moving,
        contractions=analysis.contractions,
        statistics=analysis.statistics,
        heads=analysis.heads,
        created=analysis.created,
        choices=analysis.choices,
        ranges=analysis.ranges,
    )
    _pass_ranges_on(context)
    found = find_rule(node)
    if found is None:
        return _refuse(analysis, context, several=isinstance(values, (tuple, list)))
    arguments = [_argument(analysis, a) for a in node.args]
    options = {k: _argument(analysis, v) for k, v in node.kwargs.items()}
    try:
        dims = found.apply(context, *arguments, **options)
    except NotCoveredError as error:
        return _refuse(analysis, context, several=isinstance(values, (tuple, list)), why=str(error))
    except (ValueError, TypeError, IndexError) as error:
        raise GraphError(
            f"{node.name}: the axis rule of {operator_name(node)} ({found.golden}) does not fit: {error}"
        ) from error
    dims = _check(analysis, context, dims)
    if node in analysis.created:
        analysis.sources[node.name] = analysis.created[node]
    return dims


def _argument(analysis: Analysis, value: Any) -> Any:
    """A node becomes its terms or, when it is a number, its value; everything else stays."""
    if isinstance(value, fx.Node):
        dims = analysis.dims.get(value)
        if dims is not None:
            return dims
        number = value.meta.get("val")
        return _hint(number) if isinstance(number, (int, torch.SymInt)) else number
    if isinstance(value, (list, tuple)):
        return [_argument(analysis, v) for v in value]
    return value


def _refuse(analysis: Analysis, context: Context, *, several: bool, why: str = "") -> Any:
    node, name = context.node, operator_name(context.node)
    reason = f"{name} at {node.name} has no axis rule" + (f" for this: {why}" if why else "")
    stopped = []
    for source in node.all_input_nodes:
        for dims in _all_dims(analysis.dims.get(source)):
            for term in dims:
                if not analysis.axes.is_frozen(term):
                    stopped.append(analysis.axes.show(term))
                    analysis.axes.freeze(term, reason)
    if stopped:
        analysis.refusals.append(Refusal(node.name, name, tuple(stopped), why))
    made = [tuple(context.frozen(i, reason, o) for i in range(len(s))) for o, s in enumerate(context.shapes)]
    return made if several else made[0]


def _all_dims(dims: Any) -> list[Dims]:
    if dims is None:
        return []
    return [dims] if isinstance(dims, tuple) else list(dims)


def _pass_ranges_on(context: Context) -> None:
    """Integers that are positions of an axis stay so when moved; computing with them fixes the axis."""
    node = context.node
    name = operator_name(node)
    what = name if name == "getitem" else name.split(".")[1]
    for source in node.all_input_nodes:
        output = node.args[1] if name == "getitem" else 0
        over = context.ranges.get((source, output)) if isinstance(output, int) else None
        if over is None:
            continue
        if what == "getitem" or what in _MOVES | _COPIES:
            context.range_over(over)
        elif what not in _LOOKS_UP:
            context.freeze(over, "its positions are computed with")


def _check(analysis: Analysis, context: Context, dims: Any) -> Any:
    """Terms must have the sizes that the graph says; a size that depends on the data is taken from the graph."""
    if isinstance(dims, list):
        return [_check_one(analysis, context, d, i) for i, d in enumerate(dims[: len(context.shapes)])]
    return _check_one(analysis, context, dims, 0)


def _check_one(analysis: Analysis, context: Context, dims: Dims, output: int) -> Dims:
    shape, symbolic = context.shapes[output], context.symbolic[output]
    wrong = len(dims) != len(shape) or any(
        size(t) != n and not free for t, n, free in zip(dims, shape, symbolic, strict=False)
    )
    if wrong:
        node = context.node
        raise GraphError(
            f"{node.name}: the axis rule of {operator_name(node)} says {[analysis.axes.show(t) for t in dims]}, the "
            f"graph says {shape}; the rule is wrong, or the graph was changed without updating its shapes"
        )
    return tuple(
        t if size(t) == n else context.fresh(i, "data", output)
        for i, (t, n) in enumerate(zip(dims, shape, strict=True))
    )


def _normal(axes: Axes, dims: Any) -> Any:
    if isinstance(dims, tuple):
        return tuple(axes.find(t) for t in dims)
    if isinstance(dims, list):
        return [_normal(axes, d) for d in dims]
    return dims


def _hint(n: Any) -> int:
    if isinstance(n, int):
        return n
    hint = n.node.hint if n.node.has_hint() else None
    # A size that depends on the data has no example value; any number that fits no other axis will do.
    return int(hint) if hint is not None else 65537
