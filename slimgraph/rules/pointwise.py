"""Rules of operators that work element by element, and of those that only copy, cast or forward."""

from __future__ import annotations

from typing import Any

from slimgraph.rules.registry import Context, Dims, rule


def _tensors(values: Any) -> list[Dims]:
    # A tensor argument is a tuple of terms; a list may hold tensors; anything else is a scalar.
    if isinstance(values, tuple):
        return [values]
    if isinstance(values, list):
        return [t for v in values for t in _tensors(v)]
    return []


@rule("pointwise", golden="(* a), (* a) -> (* a)")
def pointwise(cx: Context, *args: Any, **kwargs: Any) -> Dims:
    """Every operator that PyTorch tags as pointwise."""
    return cx.broadcast(*_tensors([*args, *kwargs.values()]))


@rule(
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.detach_",
    "aten.alias",
    "aten.lift_fresh_copy",
    "aten.lift_fresh",
    "aten.dropout",
    "aten.feature_dropout",
    "aten.zeros_like",
    "aten.ones_like",
    "aten.full_like",
    "aten.empty_like",
    "aten.rand_like",
    "aten.randn_like",
    "aten.conj",
    "aten.resolve_conj",
    "aten.resolve_neg",
    "aten.real",
    "aten.imag",
    golden="(* a) -> (* a)",
)
def same(cx: Context, x: Dims, *_: Any, **__: Any) -> Dims:
    """The output has the input's axes."""
    return x


@rule("aten.native_dropout", golden="(* a) -> (* a), (* a)")
def same_twice(cx: Context, x: Dims, *_: Any, **__: Any) -> list[Dims]:
    """The output and the mask have the input's axes."""
    return [x, x]


@rule(
    "aten.copy",
    "aten.masked_fill",
    "aten.where",
    "aten.addcmul",
    "aten.addcdiv",
    "aten.lerp",
    "aten.polar",
    "aten.complex",
    golden="(* a), (* a) -> (* a)",
)
def also_pointwise(cx: Context, *args: Any, **kwargs: Any) -> Dims:
    """Elementwise, though not tagged so in every version."""
    return cx.broadcast(*_tensors([*args, *kwargs.values()]))
