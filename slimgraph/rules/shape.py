"""Rules of operators that move, split, merge and repeat axes without computing."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from slimgraph.axes import DATA, ONE, Product, Term, size
from slimgraph.rules.registry import Context, Dims, NotCoveredError, Resizing, rule


def _resize_shape(node: fx.Node, to: Resizing) -> None:
    """New sizes in the shape argument of a view or expand."""
    position = next(i for i, a in enumerate(node.args) if isinstance(a, (list, tuple)))
    asked = node.args[position]
    assert isinstance(asked, (list, tuple))
    dims = to.dims(node)
    sizes: list[Any] = list(asked)
    for i, (n, term) in enumerate(zip(asked, dims, strict=True)):
        if to.size_of(term) == size(term) or n == -1:
            continue
        sizes[i] = to.size_of(term) if isinstance(n, int) else _resized(node, n, term, to)
    node.update_arg(position, sizes)


def _resized(node: fx.Node, given: fx.Node, term: Term, to: Resizing) -> fx.Node:
    """A size that is computed from the batch or the length and holds a cut factor: divide by the old, times the new."""
    factors = term.factors if isinstance(term, Product) else (term,)
    cut = [f for f in factors if to.size_of(f) != size(f)]
    with node.graph.inserting_before(node):
        rest = node.graph.call_function(operator.floordiv, (given, math.prod(size(f) for f in cut)))
        return node.graph.call_function(operator.mul, (rest, math.prod(to.size_of(f) for f in cut)))


@rule(
    "aten.view.default",
    "aten.reshape",
    "aten._unsafe_view",
    golden="(a b) -> (c d), same positions",
    resize=_resize_shape,
)
def reshape(cx: Context, x: Dims, shape: Any) -> Dims:
    return cx.axes.reshape(x, cx.shape)


@rule("aten.view_as", "aten.reshape_as", golden="(a b), (ab) -> (ab)")
def reshape_as(cx: Context, x: Dims, other: Dims) -> Dims:
    """The shape is the other tensor's, before a cut and after."""
    out = cx.axes.reshape(x, cx.shape)
    for a, b in zip(out, other, strict=True):
        if size(a) > 1:
            cx.unify(a, b)
    return out


@rule("aten.flatten", golden="(a b) -> (ab)")
def flatten(cx: Context, x: Dims, *_: Any) -> Dims:
    return cx.axes.reshape(x, cx.shape)


def _resize_unflatten(node: fx.Node, to: Resizing) -> None:
    dim, sizes = node.args[1], node.args[2]
    assert isinstance(dim, int)
    assert isinstance(sizes, (list, tuple))
    dim %= len(to.dims(node.args[0]))
    new = to.dims(node)[dim : dim + len(sizes)]
    node.update_arg(2, [n if n == -1 else to.size_of(t) for n, t in zip(sizes, new, strict=True)])


@rule("aten.unflatten.int", golden="(ab) -> (a b)", resize=_resize_unflatten)
def unflatten(cx: Context, x: Dims, dim: int, sizes: Any) -> Dims:
    return cx.axes.reshape(x, cx.shape)


@rule("aten.transpose.int", "aten.swapaxes", "aten.swapdims", golden="(a b) -> (b a)")
def transpose(cx: Context, x: Dims, first: int, second: int) -> Dims:
    out = list(x)
    out[first], out[second] = out[second], out[first]
    return tuple(out)


@rule("aten.t", "aten.numpy_T", golden="(a b c) -> (c b a)")
def reverse(cx: Context, x: Dims) -> Dims:
    return tuple(reversed(x))


@rule("aten.mT", "aten.matrix_H", golden="(* a b) -> (* b a)")
def matrix_transpose(cx: Context, x: Dims) -> Dims:
    return (*x[:-2], *reversed(x[-2:]))


@rule("aten.permute", golden="(a b c) -> (c a b)")
def permute(cx: Context, x: Dims, order: Sequence[int]) -> Dims:
    return tuple(x[i] for i in order)


@rule("aten.movedim.int", golden="(a b c) -> (b c a)")
def movedim(cx: Context, x: Dims, source: int, target: int) -> Dims:
    rest = [t for i, t in enumerate(x) if i != source % len(x)]
    rest.insert(target % len(x), x[source])
    return tuple(rest)


@rule("aten.unsqueeze", golden="(a) -> (1 a)")
def unsqueeze(cx: Context, x: Dims, dim: int) -> Dims:
    place = dim % (len(x) + 1)
    return (*x[:place], ONE, *x[place:])


def _resize_squeeze(node: fx.Node, to: Resizing) -> None:
    """Say which dimensions go: another one may have a single position left after the cut."""
    x = to.dims(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    asked = range(len(x)) if dims is None else [d % len(x) for d in ([dims] if isinstance(dims, int) else dims)]  # type: ignore[operator, union-attr]
    node.target = torch.ops.aten.squeeze.dims
    node.args, node.kwargs = (node.args[0], [d for d in asked if size(x[d]) == 1]), {}


@rule("aten.squeeze", golden="(1 a) -> (a)", resize=_resize_squeeze)
def squeeze(cx: Context, x: Dims, dims: Any = None) -> Dims:
    asked = range(len(x)) if dims is None else [d % len(x) for d in ([dims] if isinstance(dims, int) else dims)]
    return tuple(t for i, t in enumerate(x) if not (i in asked and size(t) == 1))


@rule("aten.expand", "aten.broadcast_to", golden="(1 a) -> (r a)", resize=_resize_shape)
def expand(cx: Context, x: Dims, *_: Any, **__: Any) -> Dims:
    padded = (*(ONE for _ in range(len(cx.shape) - len(x))), *x)
    return tuple(cx.fresh(i, cx.node.name) if size(t) == 1 and cx.shape[i] != 1 else t for i, t in enumerate(padded))


@rule("aten.expand_as", golden="(1 a), (r a) -> (r a)")
def expand_as(cx: Context, x: Dims, other: Dims) -> Dims:
    return cx.broadcast(x, other)


@rule("aten.broadcast_tensors", "aten.meshgrid", golden="(a), (b) -> (a b), (a b)")
def broadcast_tensors(cx: Context, tensors: list[Dims], **options: Any) -> list[Dims]:
    if "meshgrid" in str(cx.node.target):
        grid = [t[0] if t else ONE for t in tensors]
        if options.get("indexing") == "xy":
            grid[:2] = reversed(grid[:2])
        return [tuple(grid)] * len(tensors)
    return [cx.broadcast(*tensors)] * len(tensors)


def _resize_repeats(node: fx.Node, to: Resizing) -> None:
    before, after = to.dims(node.args[0]), to.dims(node)
    asked = node.args[1]
    assert isinstance(asked, (list, tuple))
    asked = (*[1] * (len(before) - len(asked)), *asked)  # a tile may name the last dimensions only
    padded = (*(ONE for _ in range(len(asked) - len(before))), *before)
    new = [
        to.size_of(b) // max(to.size_of(a), 1) if isinstance(n, int) else n
        for n, a, b in zip(asked, padded, after, strict=True)
    ]
    node.update_arg(1, new)


@rule("aten.repeat", "aten.tile", golden="(a) -> (r×a)", resize=_resize_repeats)
def repeat(cx: Context, x: Dims, repeats: Sequence[int]) -> Dims:
    padded = (*(ONE for _ in range(len(cx.shape) - len(x))), *x)
    return tuple(_copies(cx, i, t, outer=True) for i, t in enumerate(padded))


def _copies(cx: Context, dim: int, term: Term, *, outer: bool) -> Term:
    n, have = cx.shape[dim], size(term)
    if n == have:
        return term
    if have == 1:
        return cx.fresh(dim, cx.node.name)
    times = cx.axes.atom(n // have, cx.node.name, DATA if cx.symbolic[0][dim] else None)
    return cx.axes.product((times, term) if outer else (term, times))


def _resize_interleave(node: fx.Node, to: Resizing) -> None:
    dim = _interleave_dim(node)
    before, after = to.dims(node.args[0])[dim], to.dims(node)[dim]
    if isinstance(node.args[1], int):
        node.update_arg(1, to.size_of(after) // to.size_of(before))
    if isinstance(node.kwargs.get("output_size"), int):
        node.kwargs = {**node.kwargs, "output_size": to.size_of(after)}


def _interleave_dim(node: fx.Node) -> int:
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(dim, int):
        raise NotCoveredError("it goes over all dimensions at once")
    return dim


@rule("aten.repeat_interleave.self_int", golden="(a) -> (a×r)", resize=_resize_interleave)
def repeat_interleave(cx: Context, x: Dims, repeats: int, *_: Any, **__: Any) -> Dims:
    dim = _interleave_dim(cx.node) % len(x)
    return (*x[:dim], _copies(cx, dim, x[dim], outer=False), *x[dim + 1 :])


# -- joining and cutting ----------------------------------------------------------------------------------------------


@rule("aten.cat", "aten.concat", golden="(a *), (b *) -> (a|b *)")
def cat(cx: Context, tensors: list[Dims], dim: int = 0) -> Dims:
    tensors = [t for t in tensors if len(t) > 1 or len(cx.shape) == 1]
    dim %= len(cx.shape)
    result: list[Term] = []
    for i in range(len(cx.shape)):
        if i == dim:
            result.append(cx.axes.concat([t[i] for t in tensors]))
            continue
        for other in tensors[1:]:
            if size(tensors[0][i]) > 1:
                cx.unify(tensors[0][i], other[i])
        result.append(tensors[0][i])
    return tuple(result)


@rule("aten.stack", golden="(a), (a) -> (2 a)")
def stack(cx: Context, tensors: list[Dims], dim: int = 0) -> Dims:
    place = dim % len(cx.shape)
    one = cx.broadcast(*tensors)
    return (*one[:place], cx.frozen(place, f"tensors stacked at {cx.node.name}"), *one[place:])


def _bounds(n: int, start: Any, end: Any) -> tuple[int, int]:
    first = 0 if start is None else start
    last = n if end is None else end
    first = max(0, first + n if first < 0 else first)
    last = max(0, last + n if last < 0 else last)
    return min(first, n), max(min(last, n), min(first, n))


def _resize_slice(node: fx.Node, to: Resizing) -> None:
    x = to.dims(node.args[0])
    dim, start, end, step = _slice_arguments(node)
    term = x[dim % len(x)]
    if step != 1 or to.size_of(term) == size(term) or not all(isinstance(v, (int, type(None))) for v in (start, end)):
        return
    first, last = _bounds(size(term), start, end)
    before, middle, _ = to.axes.cut(term, (first, last - first, size(term) - last))
    new = to.size_of(before)
    node.args = (node.args[0], dim, new, new + to.size_of(middle))


def _slice_arguments(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    return _arguments_from(node, 1)


def _arguments_from(node: fx.Node, place: int) -> tuple[Any, Any, Any, Any]:
    """Dimension, start, end and step, which stand from that argument on or are named."""
    given = [*node.args[place:], *([None] * 4)]
    names = ("dim", "start", "end", "step")
    dim, start, end, step = (node.kwargs.get(k, given[i]) for i, k in enumerate(names))
    return dim or 0, start, end, step or 1


@rule("aten.slice.Tensor", golden="(a|b|c) -> (b); every k-th: (a×k) -> (a), k fixed", resize=_resize_slice)
def slice_(cx: Context, x: Dims, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Dims:
    dim %= len(x)
    term = x[dim]
    out = cx.shape[dim]
    if out == size(term):
        return x
    if cx.axes.is_frozen(term):
        piece = cx.frozen(dim, cx.reason(term))
    elif step == 1:
        first, last = _bounds(size(term), start, end)
        piece = cx.axes.cut(term, (first, last - first, size(term) - last))[1]
    else:
        piece = _every(cx, term, start or 0, out, step, dim)
    return (*x[:dim], piece, *x[dim + 1 :])


def _resize_slice_scatter(node: fx.Node, to: Resizing) -> None:
    dim, start, end, step = _arguments_from(node, 2)
    term = to.dims(node.args[0])[dim]
    if step != 1 or to.size_of(term) == size(term) or not all(isinstance(v, (int, type(None))) for v in (start, end)):
        return
    first, last = _bounds(size(term), start, end)
    before, middle, _ = to.axes.cut(term, (first, last - first, size(term) - last))
    new = to.size_of(before)
    node.args = (*node.args[:2], dim, new, new + to.size_of(middle))


@rule("aten.slice_scatter", golden="(a|b|c), (b) -> (a|b|c)", resize=_resize_slice_scatter)
def slice_scatter(cx: Context, x: Dims, piece: Dims, *_: Any, **__: Any) -> Dims:
    """A slice is overwritten: the piece has the axes of the slice."""
    dim, start, end, step = _arguments_from(cx.node, 2)
    dim %= len(x)
    for i, (a, b) in enumerate(zip(x, piece, strict=True)):
        if i != dim or size(a) == size(b):
            cx.unify(a, b)
        elif step == 1 and isinstance(start, (int, type(None))) and isinstance(end, (int, type(None))):
            first, last = _bounds(size(a), start, end)
            middle = cx.axes.cut(a, (first, last - first, size(a) - last))[1]
            if size(middle) > 1:
                cx.unify(middle, b)
        else:
            cx.freeze(a, "overwritten in part")
            cx.freeze(b, "overwrites a part")
    return x


@rule("aten.select_scatter", golden="(a *), (*) -> (a *), a fixed")
def select_scatter(cx: Context, x: Dims, piece: Dims, dim: int, *_: Any) -> Dims:
    dim %= len(x)
    cx.freeze(x[dim], "one position is overwritten by itself")
    for a, b in zip((*x[:dim], *x[dim + 1 :]), piece, strict=True):
        cx.unify(a, b)
    return x


def _every(cx: Context, term: Term, start: int, out: int, step: int, dim: int) -> Term:
    split = cx.axes.factor(term, step) if out * step == size(term) and 0 <= start < step else None
    if split is None:
        cx.freeze(term, f"every {step}th position is read")
        return cx.frozen(dim, "read with a step")
    cx.freeze(split[1], f"every {step}th position is read")
    return split[0]


def _resize_narrow(node: fx.Node, to: Resizing) -> None:
    dim, start, length = node.args[1:4]
    x = to.dims(node.args[0])
    assert isinstance(dim, int)
    if not (isinstance(start, int) and isinstance(length, int)):
        return
    term = x[dim % len(x)]
    if to.size_of(term) == size(term):
        return
    start %= size(term)
    before, middle, _ = to.axes.cut(term, (start, length, size(term) - start - length))
    node.args = (node.args[0], dim, to.size_of(before), to.size_of(middle))


@rule("aten.narrow.default", golden="(a|b|c) -> (b)", resize=_resize_narrow)
def narrow(cx: Context, x: Dims, dim: int, start: int, length: int) -> Dims:
    first = start % size(x[dim]) if isinstance(start, int) else start
    narrowed: Dims = slice_(cx, x, dim, first, first + length)
    return narrowed


def _resize_split(node: fx.Node, to: Resizing) -> None:
    """Pieces may differ after cutting, so that every split becomes one with sizes."""
    x = to.dims(node.args[0])
    pieces = to.dims(node)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    if to.size_of(x[dim]) == size(x[dim]):
        return
    node.target = torch.ops.aten.split_with_sizes.default
    node.args = (node.args[0], [to.size_of(p[dim]) for p in pieces], dim)
    node.kwargs = {}


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", golden="(a|b|c) -> (a), (b), (c)", resize=_resize_split)
def split(cx: Context, x: Dims, how: Any, dim: int = 0) -> list[Dims]:
    dim %= len(x)
    sizes = [shape[dim] for shape in cx.shapes]
    if cx.axes.is_frozen(x[dim]):
        pieces = [cx.frozen(dim, cx.reason(x[dim]), i) for i in range(len(sizes))]
    else:
        pieces = cx.axes.cut(x[dim], sizes)
    return [(*x[:dim], p, *x[dim + 1 :]) for p in pieces]


@rule("getitem", golden="(x, y)[0] -> x")
def getitem(cx: Context, values: Any, index: int) -> Dims:
    return tuple(values[index])


@rule("aten.constant_pad_nd", "aten.pad", golden="(* a) -> (* a'), padded axes fixed")
def pad(cx: Context, x: Dims, padding: Sequence[int], *_: Any, **__: Any) -> Dims:
    out = list(x)
    for i in range(len(padding) // 2):
        dim = len(x) - 1 - i
        if padding[2 * i] or padding[2 * i + 1]:
            cx.freeze(x[dim], "padded")
            out[dim] = cx.frozen(dim, "padded")
    return tuple(out)


@rule("aten.view_as_complex", golden="(* a 2) -> (* a)")
def view_as_complex(cx: Context, x: Dims) -> Dims:
    cx.freeze(x[-1], "real and imaginary part")
    return x[:-1]


@rule("aten.view_as_real", golden="(* a) -> (* a 2)")
def view_as_real(cx: Context, x: Dims) -> Dims:
    return (*x, cx.frozen(len(x), "real and imaginary part"))


@rule("aten.diff", golden="(* a) -> (* a'), a fixed")
def diff(cx: Context, x: Dims, *_: Any, **__: Any) -> Dims:
    for term in x:
        cx.freeze(term, "differences between positions")
    return tuple(cx.frozen(i, "differences between positions") for i in range(len(x)))
