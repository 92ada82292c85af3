"""Rules of operators that read or write by position."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from slimgraph.axes import Atom, Term, size
from slimgraph.rules.registry import Context, Dims, Resizing, rule


@rule("aten.embedding", golden="(v a), (*) -> (* a), v fixed")
def embedding(cx: Context, weight: Dims, ids: Dims, *_: Any, **__: Any) -> Dims:
    cx.freeze(weight[0], "rows are looked up by token or position")
    return (*ids, weight[1])


@rule("aten.select", golden="(a *) -> (*), a fixed")
def select(cx: Context, x: Dims, dim: int, index: Any) -> Dims:
    dim %= len(x)
    cx.freeze(x[dim], "one position is read by itself")
    return (*x[:dim], *x[dim + 1 :])


@rule("aten.unbind", golden="(a *) -> (*), (*), ..., a fixed")
def unbind(cx: Context, x: Dims, dim: int = 0) -> list[Dims]:
    rest = select(cx, x, dim, None)
    return [rest] * len(cx.shapes)


@rule("aten.index_select", golden="(a *), (n) -> (n *), a fixed")
def index_select(cx: Context, x: Dims, dim: int, index: Dims) -> Dims:
    dim %= len(x)
    cx.looked_up(x[dim], cx.node.args[2], "positions are selected by an index")
    return (*x[:dim], *(index or (cx.frozen(dim, "selected"),)), *x[dim + 1 :])


@rule("aten.gather", golden="(* a), (* n) -> (* n), a fixed")
def gather(cx: Context, x: Dims, dim: int, index: Dims, **_: Any) -> Dims:
    dim %= len(x)
    cx.looked_up(x[dim], cx.node.args[2], "positions are gathered by an index")
    for i, (a, b) in enumerate(zip(x, index, strict=True)):
        if i == dim:
            continue
        if size(a) == size(b):
            cx.unify(a, b)
        else:
            cx.freeze(a, "gathered in part")
            cx.freeze(b, "gathered in part")
    return index


@rule("aten.index", golden="(a b *), (n) -> (n b *), a fixed")
def index(cx: Context, x: Dims, indices: list[Dims | None]) -> Dims:
    """Advanced indexing; the indexed axes are fixed, the others go through."""
    at = [i for i, ids in enumerate(indices) if ids is not None]
    given = cx.node.args[1]
    assert isinstance(given, (list, tuple))
    if len(at) == 1 and (position := _from_the_end(cx.constant(given[at[0]]))) is not None:
        # One position counted from the end: those from there on stay, whatever is cut before them.
        n = size(x[at[0]])
        cx.axes.cut(x[at[0]], (n - position, *[1] * position))
    else:
        for i in at:
            cx.looked_up(x[i], given[i], "positions are read by an index")
    together = cx.broadcast(*(ids for ids in indices if ids is not None))
    rest: list[Term] = [t for i, t in enumerate(x) if i not in at]
    # NumPy's rule: indexed axes that lie side by side are replaced in place, others move to the front.
    place = at[0] if at == list(range(at[0], at[0] + len(at))) else 0
    return (*rest[:place], *together, *rest[place:])


def _from_the_end(value: Tensor | None) -> int | None:
    return -int(value) if value is not None and value.numel() == 1 and int(value) < 0 else None


@rule("aten.topk", golden="(* a) -> (* k), (* k), a choice among a; the second holds positions of a")
def topk(cx: Context, x: Dims, k: int, dim: int = -1, largest: bool = True, *_: Any, **__: Any) -> list[Dims]:
    dim %= len(x)
    # What is cut counts as minus infinity, which would be among the smallest.
    if largest and isinstance(cx.axes.find(x[dim]), Atom):
        cx.choose(x, dim, at_least=k)
        cx.range_over(x[dim], output=1)
    else:
        cx.freeze(x[dim], "the best positions are picked")
    out = (*x[:dim], cx.frozen(dim, "ranks"), *x[dim + 1 :])
    return [out, out]


@rule("aten.sort", golden="(* a) -> (* a), (* a), a fixed")
def sort(cx: Context, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    dim = int(kwargs.get("dim", args[0] if args else -1)) % len(x)
    cx.freeze(x[dim], "positions are ranked")
    out = (*x[:dim], cx.frozen(dim, "ranks"), *x[dim + 1 :])
    return [out, out]


@rule("aten.scatter", "aten.scatter_add", golden="(* a), (* n), (* n)? -> (* a), a fixed unless n are positions of a")
def scatter(cx: Context, x: Dims, dim: int, index: Dims, *rest: Any, **_: Any) -> Dims:
    dim %= len(x)
    cx.looked_up(x[dim], cx.node.args[2], "positions are written by an index")
    written = [t for t in (index, *rest) if isinstance(t, tuple)]
    for i, term in enumerate(x):
        parts = [t[i] for t in written]
        whole = [term, *parts] if i != dim else parts
        if all(size(t) == size(whole[0]) for t in whole):
            for t in whole[1:]:
                cx.unify(whole[0], t)
        else:
            for t in whole:
                cx.freeze(t, "written in part")
    return x


def _resize_classes(node: fx.Node, to: Resizing) -> None:
    if len(node.args) > 1:
        node.update_arg(1, to.size_of(to.dims(node)[-1]))


@rule("aten.one_hot", golden="(*) -> (* a), a fixed unless (*) holds positions of a", resize=_resize_classes)
def one_hot(cx: Context, ids: Dims, classes: int = -1) -> Dims:
    made = cx.fresh(len(ids), "classes")
    cx.looked_up(made, cx.node.args[0], "positions are marked by an index")
    return (*ids, cx.axes.find(made))


@rule("aten.argsort", golden="(* a) -> (* a), a fixed")
def argsort(cx: Context, x: Dims, *args: Any, **kwargs: Any) -> Dims:
    for term in x:
        cx.freeze(term, "positions are ranked")
    return x


@rule("aten.tril", "aten.triu", golden="(* a b) -> (* a b), a and b fixed")
def triangle(cx: Context, x: Dims, *_: Any) -> Dims:
    for term in x[-2:]:
        cx.freeze(term, "the positions of a triangle")
    return x
