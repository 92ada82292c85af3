"""Rules of operators that multiply and sum: projections, matrix products, attention, convolution."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from slimgraph.axes import ONE, Term, size
from slimgraph.rules.registry import Context, Contraction, Dims, NotCoveredError, Resizing, rule


@rule("aten.linear", golden="(* i), (o i), (o)? -> (* o)")
def linear(cx: Context, x: Dims, weight: Dims, bias: Dims | None = None) -> Dims:
    cx.contract(x, weight, (-1, 1))
    if bias is not None:
        cx.unify(bias[0], weight[0])
    return (*x[:-1], weight[0])


@rule("aten.addmm", golden="(o), (n i), (i o) -> (n o)")
def addmm(cx: Context, bias: Dims, x: Dims, weight: Dims, **_: Any) -> Dims:
    cx.contract(x, weight, (1, 0), (1, 2))
    return cx.broadcast((x[0], weight[1]), bias)


@rule("aten.matmul", "aten.mm", "aten.bmm", golden="(b* n i), (b* i m) -> (b* n m)")
def matmul(cx: Context, left: Dims, right: Dims) -> Dims:
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    cx.contract(left, right, (-1, -2 if len(right) > 1 else 0))
    batch = cx.broadcast(left[:-2], right[:-2])
    cx.batch_of_activations(batch, 0, 1)
    return (*batch, *rows, *columns)


@rule("aten.baddbmm", golden="(b n m), (b n i), (b i m) -> (b n m)")
def baddbmm(cx: Context, added: Dims, left: Dims, right: Dims, **_: Any) -> Dims:
    cx.contract(left, right, (2, 1), (1, 2))
    batch = cx.broadcast(left[:1], right[:1])
    cx.batch_of_activations(batch, 1, 2)
    return cx.broadcast((*batch, left[1], right[2]), added)


def _keep_default_scale(node: fx.Node, to: Resizing) -> None:
    # Without an explicit scale the operator takes 1/√(query width), of the width it sees: the original one must stay.
    width = to.dims(node.args[0])[-1]
    if node.kwargs.get("scale") is None and to.size_of(width) != size(width):
        node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(size(width))}


@rule(
    "aten.scaled_dot_product_attention",
    golden="(b* h s e), (b* h t e), (b* h t v), (b* h s t)? -> (b* h s v)",
    resize=_keep_default_scale,
)
def attention(
    cx: Context,
    query: Dims,
    key: Dims,
    value: Dims,
    mask: Dims | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    enable_gqa: bool = False,
    **_: Any,
) -> Dims:
    if enable_gqa:
        key, value = _spread_heads(cx, query, key), _spread_heads(cx, query, value)
    cx.contract(query, key, (-1, -1))
    cx.unify(key[-2], value[-2])
    cx.freeze(key[-2], "positions that are attended to")
    batch = cx.broadcast(query[:-2], key[:-2], value[:-2])
    cx.batch_of_activations(batch, 0, 1)
    if mask is not None:
        cx.broadcast((*batch, query[-2], key[-2]), mask)
    return (*batch, query[-2], value[-1])


def _spread_heads(cx: Context, query: Dims, shared: Dims) -> Dims:
    """Grouped queries: each key head serves several consecutive query heads."""
    repeats = size(query[-3]) // size(shared[-3])
    heads = cx.axes.product((shared[-3], cx.axes.atom(repeats, "repeats")))
    return (*shared[:-3], heads, *shared[-2:])


@rule("aten.einsum", golden="einsum(pattern): a letter is an axis")
def einsum(cx: Context, pattern: str, tensors: list[Dims], **options: Any) -> Dims:
    inputs, _arrow, output = pattern.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not output or "." in pattern or any(len(n) != len(t) for n, t in zip(names, tensors, strict=True)):
        raise NotCoveredError(f"pattern {pattern!r} does not spell out every axis")
    axes: dict[str, Term] = {}
    for letters, dims in zip(names, tensors, strict=True):
        for letter, term in zip(letters, dims, strict=True):
            if letter in axes and size(axes[letter]) > 1 and size(term) > 1:
                cx.unify(axes[letter], term)
            elif axes.get(letter, ONE) == ONE:
                axes[letter] = term
    if len(tensors) == 2:
        left, right = names
        cx.heads.extend(axes[c] for c in left if c in right and c in output and _both_move(cx))
        for letter in left:
            if letter in right and letter not in output:
                a, b = _listed(cx, 0), _listed(cx, 1)
                cx.contractions.append(
                    Contraction(cx.node, a, b, axes[letter], left.index(letter), right.index(letter))
                )
    return tuple(axes[c] for c in output)


def _listed(cx: Context, index: int) -> fx.Node:
    tensors = cx.node.args[1]
    assert isinstance(tensors, (list, tuple))
    node = tensors[index]
    assert isinstance(node, fx.Node)
    return node


def _both_move(cx: Context) -> bool:
    return {_listed(cx, 0), _listed(cx, 1)} <= cx.moving


def _resize_groups(node: fx.Node, to: Resizing) -> None:
    channels = to.dims(node.args[0])[1]
    groups = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    if groups == 1 or to.size_of(channels) == size(channels):
        return
    node.args, node.kwargs = node.args[:6], {**node.kwargs, "groups": to.size_of(channels)}


@rule(
    "aten.conv1d",
    golden="(b c s), (c 1 k), (c)? -> (b c s') by channel; (b i s), (o i k), (o)? -> (b o s')",
    resize=_resize_groups,
)
def conv1d(
    cx: Context,
    x: Dims,
    weight: Dims,
    bias: Dims | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Dims:
    cx.freeze(weight[2], "positions of a convolution kernel")
    cx.freeze(x[2], "positions that a convolution slides over")
    if groups == 1:
        cx.contract(x, weight, (1, 1))
    elif size(weight[1]) == 1 and size(x[1]) == size(weight[0]):
        cx.unify(x[1], weight[0])
    else:
        for term in (x[1], weight[0], weight[1]):
            cx.freeze(term, f"a convolution in {groups} groups")
    if bias is not None:
        cx.unify(bias[0], weight[0])
    return (x[0], weight[0], cx.frozen(2, "positions that a convolution slides over"))
