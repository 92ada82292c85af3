"""Rules of operators that make tensors. Their axes are cut as those of parameters are."""

from __future__ import annotations

from typing import Any

from torch import fx

from slimgraph.rules.registry import Context, Dims, Resizing, rule


def _resize_first(node: fx.Node, to: Resizing) -> None:
    _resize_list(node, to, 0)


def _resize_second(node: fx.Node, to: Resizing) -> None:
    _resize_list(node, to, 1)


def _resize_list(node: fx.Node, to: Resizing, index: int) -> None:
    asked = node.args[index]
    assert isinstance(asked, (list, tuple))
    dims = to.dims(node)
    node.update_arg(index, [to.size_of(d) if isinstance(n, int) else n for n, d in zip(asked, dims, strict=True)])


def _fresh(cx: Context) -> Dims:
    return tuple(cx.fresh(i, cx.node.name) for i in range(len(cx.shape)))


@rule("aten.full", "aten.zeros", "aten.ones", "aten.empty", golden="-> (a b)", resize=_resize_first)
def filled(cx: Context, *_: Any, **__: Any) -> Dims:
    """All positions are alike: a smaller tensor is simply made smaller."""
    return _fresh(cx)


@rule("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty", golden="-> (a b)", resize=_resize_second)
def filled_like(cx: Context, *_: Any, **__: Any) -> Dims:
    return _fresh(cx)


@rule("aten.arange", "aten.linspace", "aten.eye", "aten.scalar_tensor", golden="-> (a)")
def numbered(cx: Context, *_: Any, **__: Any) -> Dims:
    """Positions differ: the kept ones are selected after the tensor is made."""
    return cx.create(_fresh(cx))
