"""Rules of operators that read or write by position."""

from __future__ import annotations

from typing import Any

from slimgraph.axes import Term, size
from slimgraph.rules.registry import Context, Dims, rule


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
    cx.freeze(x[dim], "positions are selected by an index")
    return (*x[:dim], *(index or (cx.frozen(dim, "selected"),)), *x[dim + 1 :])


@rule("aten.gather", golden="(* a), (* n) -> (* n), a fixed")
def gather(cx: Context, x: Dims, dim: int, index: Dims, **_: Any) -> Dims:
    dim %= len(x)
    cx.freeze(x[dim], "positions are gathered by an index")
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
    for i in at:
        cx.freeze(x[i], "positions are read by an index")
    together = cx.broadcast(*(ids for ids in indices if ids is not None))
    rest: list[Term] = [t for i, t in enumerate(x) if i not in at]
    # NumPy's rule: indexed axes that lie side by side are replaced in place, others move to the front.
    place = at[0] if at == list(range(at[0], at[0] + len(at))) else 0
    return (*rest[:place], *together, *rest[place:])


@rule("aten.topk", "aten.sort", golden="(* a) -> (* k), (* k), a fixed")
def ranked(cx: Context, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    dim = _ranking_dim(cx, args, kwargs) % len(x)
    cx.freeze(x[dim], "positions are ranked")
    out = (*x[:dim], cx.frozen(dim, "ranks"), *x[dim + 1 :])
    return [out, out]


def _ranking_dim(cx: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    default = -1
    position = 1 if "topk" in str(cx.node.target) else 0
    return int(kwargs.get("dim", args[position] if len(args) > position else default))


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
