"""Rules of operators that reduce or normalise over axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from slimgraph.axes import ONE, Term
from slimgraph.rules.registry import Context, Dims, Resizing, rule


def _reduced(x: Dims, dims: Any, keepdim: bool) -> tuple[list[int], Dims]:
    rank = len(x)
    listed = [dims] if isinstance(dims, int) else list(dims or range(rank))
    which = sorted({d % rank for d in listed}) if rank else []
    out: list[Term] = []
    for i, term in enumerate(x):
        if i not in which:
            out.append(term)
        elif keepdim:
            out.append(ONE)
    return which, tuple(out)


@rule(
    "aten.mean",
    "aten.var",
    "aten.std",
    "aten.linalg_vector_norm",
    "aten.norm",
    "aten.sum",
    golden="(* a) -> (*), a statistic over a",
)
def statistic(cx: Context, x: Dims, *args: Any, **kwargs: Any) -> Dims | list[Dims]:
    """A statistic over an axis may lose positions, but is then taken over those that are kept."""
    keepdim = len(cx.shape) == len(x)
    dims = kwargs.get("dim") or next((a for a in args if isinstance(a, list)), None)
    which, out = _reduced(x, dims, keepdim)
    for i in which:
        cx.statistic(x[i])
    return out


@rule("aten.var_mean", "aten.std_mean", golden="(* a) -> (*), (*), statistics over a")
def two_statistics(cx: Context, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    out = statistic(cx, x, *args, **kwargs)
    assert isinstance(out, tuple)
    return [out, out]


@rule(
    "aten.amax",
    "aten.amin",
    "aten.any",
    "aten.all",
    "aten.argmax",
    "aten.argmin",
    "aten.prod",
    "aten.logsumexp",
    golden="(* a) -> (*), a fixed",
)
def reduce_fixed(cx: Context, x: Dims, dims: Any = None, keepdim: bool = False, **_: Any) -> Dims:
    which, out = _reduced(x, dims, keepdim)
    for i in which:
        cx.freeze(x[i], "reduced by something other than a sum or a mean")
    return out


@rule("aten.max.dim", "aten.min.dim", golden="(* a) -> (*), (*), a fixed")
def extreme(cx: Context, x: Dims, dim: int, keepdim: bool = False) -> list[Dims]:
    cx.freeze(x[dim], "the largest or smallest is picked")
    out = _reduced(x, dim, keepdim)[1]
    return [out, out]


@rule(
    "aten.softmax",
    "aten._softmax",
    "aten.log_softmax",
    "aten._log_softmax",
    "aten._safe_softmax",
    golden="(* a) -> (* a), a choice among a",
)
def softmax(cx: Context, x: Dims, dim: int, *_: Any, **__: Any) -> Dims:
    """Over fewer positions a softmax is what it would be with the others at minus infinity."""
    cx.choose(x, dim)
    return x


@rule("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.flip", golden="(* a) -> (* a), a fixed")
def ordered(cx: Context, x: Dims, dims: Any, *_: Any, **__: Any) -> Dims:
    for dim in [dims] if isinstance(dims, int) else dims:
        cx.freeze(x[dim], "positions depend on each other")
    return x


@rule("aten.roll", golden="(* a) -> (* a), a fixed")
def roll(cx: Context, x: Dims, shifts: Any, dims: Any = ()) -> Dims:
    """Without dimensions the tensor is rolled as one flat run."""
    listed = [dims] if isinstance(dims, int) else list(dims)
    for dim in listed or range(len(x)):
        cx.freeze(x[dim], "positions move round")
    return x


def _resize_normalized_shape(node: fx.Node, to: Resizing) -> None:
    shape = node.args[1]
    assert isinstance(shape, Sequence)
    dims = to.dims(node.args[0])[-len(shape) :]
    node.update_arg(1, [to.size_of(d) for d in dims])


def _normalise(cx: Context, x: Dims, shape: list[int], *affine: Dims | None) -> None:
    last = x[len(x) - len(shape) :]
    for parameter in affine:
        if isinstance(parameter, tuple):
            cx.broadcast(last, parameter)
    for term in last:
        cx.statistic(term)


@rule("aten.layer_norm", golden="(* a), (a)?, (a)? -> (* a), a statistic over a", resize=_resize_normalized_shape)
def layer_norm(cx: Context, x: Dims, shape: list[int], weight: Any = None, bias: Any = None, *_: Any) -> Dims:
    _normalise(cx, x, shape, weight, bias)
    return x


@rule("aten.native_layer_norm", golden="(* a), (a)?, (a)? -> (* a), (*), (*)", resize=_resize_normalized_shape)
def native_layer_norm(cx: Context, x: Dims, shape: list[int], weight: Any, bias: Any, *_: Any) -> list[Dims]:
    _normalise(cx, x, shape, weight, bias)
    reduced = (*x[: len(x) - len(shape)], *(ONE for _ in shape))
    return [x, reduced, reduced]


@rule("aten.rms_norm", golden="(* a), (a)? -> (* a), a statistic over a", resize=_resize_normalized_shape)
def rms_norm(cx: Context, x: Dims, shape: list[int], weight: Any = None, *_: Any) -> Dims:
    _normalise(cx, x, shape, weight)
    return x
