"""Every axis rule against the real operator: what it says about axes, and that cutting along them is exact."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from labelled import Bench, aten, free_groups, random_plan, signature, verify
from torch import Tensor, fx

from slimgraph.errors import GraphError
from slimgraph.groups import Structure, infer
from slimgraph.plan import Cut, Plan, resolve
from slimgraph.rules import (
    Rule,
    contraction,
    creation,
    find_rule,
    indexing,
    pointwise,
    reduction,
    registry,
    rule,
    rules,
    shape,
)
from slimgraph.surgery import prune_graph

KEEP_SETS = 3


@dataclass(frozen=True)
class Case:
    """A use of an operator.

    `build` makes a graph and returns the operator's node; `says` is what the rule must find, see `labelled.signature`.
    """

    rule: str
    build: Callable[[Bench], fx.Node]
    says: str


def on(target: Any, shape: tuple[int, ...], *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """The operator on a single tensor x, with further arguments that are no tensors."""
    return lambda b: b(target, b.source("x", *shape, dtype=dtype), *args, **kwargs)


def on_two(target: Any, first: tuple[int, ...], second: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    return lambda b: b(target, b.source("x", *first), b.source("y", *second), *args, **kwargs)


def on_list(target: Any, shapes: list[tuple[int, ...]], *args: Any, **kwargs: Any) -> Any:
    return lambda b: b(target, [b.source(n, *s) for n, s in zip("xyz", shapes, strict=False)], *args, **kwargs)


def made(target: Any, *args: Any, **kwargs: Any) -> Any:
    """A tensor that the graph makes, added to a parameter so that there is something to cut it for."""

    def build(b: Bench) -> fx.Node:
        node = b(target, *args, **kwargs)
        b(aten.add.Tensor, node, b.source("x", *node.meta["val"].shape))
        return node

    return build


def made_like(target: Any, *args: Any) -> Any:
    """The same for operators that take dtype and device from a tensor."""

    def build(b: Bench) -> fx.Node:
        node = b(target, b.source("like", 2), *args)
        b(aten.add.Tensor, node, b.source("x", *node.meta["val"].shape))
        return node

    return build


def attention(*, mask: tuple[int, ...] | None = None, kv: int = 4, **kwargs: Any) -> Any:
    def build(b: Bench) -> fx.Node:
        q, k, v = b.source("q", 2, 4, 3, 6), b.source("k", 2, kv, 5, 6), b.source("v", 2, kv, 5, 7)
        return b(
            aten.scaled_dot_product_attention.default, q, k, v, *([b.source("m", *mask)] if mask else []), **kwargs
        )

    return build


def projected_attention(b: Bench) -> fx.Node:
    """Queries, keys and values of width 12 viewed as heads."""

    def heads(name: str, n: int) -> fx.Node:
        x = b(aten.view.default, b.source(name, 2, 3, n * 4), [2, 3, n, 4])
        return b(aten.transpose.int, x, 1, 2)

    return b(aten.scaled_dot_product_attention.default, heads("q", 6), heads("k", 6), heads("v", 6))


def self_attention(b: Bench, *, kv: int = 3, rank: int = 4) -> fx.Node:
    """Attention over the tokens of the input, with keys and values spread over the query heads when there are fewer."""
    x = b(aten.embedding.default, b.source("e", 7, 5), b.ids)

    def heads(name: str, n: int, width: int) -> fx.Node:
        projected = b(aten.linear.default, x, b.source(name, n * width, 5))
        split = b(aten.transpose.int, b(aten.view.default, projected, [2, 3, n, width]), 1, 2)
        if n == 3:
            return split
        spread = b(aten.expand.default, b(aten.unsqueeze.default, split, 2), [2, n, 3 // n, 3, width])
        return b(aten.reshape.default, spread, [2, 3, 3, width])

    q, k, v = heads("q", 3, 4), heads("k", kv, 4), heads("v", kv, 6)
    return b(aten.scaled_dot_product_attention.default, q, k, v)


def picked_of(b: Bench, how: str) -> fx.Node:
    """A router picks 2 of 5; a table of 5 is read or written at the places that it picked."""
    x = b.source("x", 5) if how == "index_select" else b.source("x", 3, 5)
    at = b(operator.getitem, b(aten.topk.default, x, 2), 1)
    match how:
        case "index":
            return b(aten.index.Tensor, b.source("w", 5, 4), [at])
        case "index_select":
            return b(aten.index_select.default, b.source("w", 5, 4), 0, at)
        case "gather":
            return b(aten.gather.default, b.source("w", 3, 5), 1, at)
        case "scatter" | "scatter_add":
            write = aten.scatter.src if how == "scatter" else aten.scatter_add.default
            return b(write, b.source("w", 3, 5), 1, at, b.source("v", 3, 2))
    marked = b(aten.one_hot.default, at, 5)
    b(aten.mul.Tensor, marked, b.source("w", 5))
    return marked


def computed_index(b: Bench) -> fx.Node:
    """The same, but the places are computed with before they are used."""
    at = b(operator.getitem, b(aten.topk.default, b.source("x", 3, 5), 2), 1)
    return b(aten.index.Tensor, b.source("w", 5, 4), [b(aten.add.Scalar, b(aten.neg.default, at), 4)])


def item(b: Bench) -> fx.Node:
    return b(operator.getitem, b(aten.split_with_sizes.default, b.source("x", 2, 7), [3, 4], 1), 1)


def fused(b: Bench) -> fx.Node:
    """A row of 3 heads × (query | key | value), as GPT-NeoX keeps it."""
    return b(aten.split_with_sizes.default, b(aten.view.default, b.source("x", 2, 36), [2, 3, 12]), [4, 4, 4], -1)


CASES = [
    # contraction
    Case("aten.linear", on_two(aten.linear.default, (2, 3, 4), (5, 4)), "x(a b c) y(d c) -> (a b d)"),
    Case(
        "aten.linear",
        lambda b: b(aten.linear.default, b.source("x", 3, 4), b.source("w", 5, 4), b.source("c", 5)),
        "x(a b) w(c b) c(c) -> (a c)",
    ),
    Case(
        "aten.addmm",
        lambda b: b(aten.addmm.default, b.source("c", 5), b.source("x", 3, 4), b.source("w", 4, 5)),
        "c(a) x(b c) w(c a) -> (b a)",
    ),
    Case("aten.matmul", on_two(aten.matmul.default, (2, 1, 3, 4), (6, 4, 5)), "x(a 1 b c) y(d c e) -> (a d b e)"),
    Case("aten.matmul", on_two(aten.matmul.default, (3, 4), (4,)), "x(a b) y(b) -> (a)"),
    Case("aten.matmul", on_two(aten.matmul.default, (4,), (2, 4, 3)), "x(a) y(b a c) -> (b c)"),
    Case("aten.matmul", on_two(aten.matmul.default, (4,), (4,)), "x(a) y(a) -> ()"),
    Case("aten.mm", on_two(aten.mm.default, (3, 4), (4, 5)), "x(a b) y(b c) -> (a c)"),
    Case("aten.bmm", on_two(aten.bmm.default, (2, 3, 4), (2, 4, 5)), "x(a b c) y(a c d) -> (a b d)"),
    Case(
        "aten.baddbmm",
        lambda b: b(aten.baddbmm.default, b.source("c", 2, 1, 5), b.source("x", 2, 3, 4), b.source("y", 2, 4, 5)),
        "c(a 1 b) x(a c d) y(a d b) -> (a c b)",
    ),
    Case("aten.scaled_dot_product_attention", attention(), "q(a b c d) k(a b 5! d) v(a b 5! e) -> (a b c e)"),
    Case(
        "aten.scaled_dot_product_attention",
        attention(mask=(2, 1, 3, 5)),
        "q(a b c d) k(a b 5! d) v(a b 5! e) m(a 1 c 5!) -> (a b c e)",
    ),
    Case("aten.scaled_dot_product_attention", attention(scale=0.3), "q(a b c d) k(a b 5! d) v(a b 5! e) -> (a b c e)"),
    Case(
        "aten.scaled_dot_product_attention",
        attention(kv=2, enable_gqa=True),
        "q(a b×c d e) k(a b 5! e) v(a b 5! f) -> (a b×c d f)",
    ),
    Case("aten.scaled_dot_product_attention", projected_attention, "q(a b c×d) k(a 3! c×d) v(a 3! c×e) -> (a c b e)"),
    Case("aten.scaled_dot_product_attention", self_attention, "e(7! a) q(b×c a) k(b×c a) v(b×d a) -> (2! b 3! d)"),
    Case(
        "aten.scaled_dot_product_attention",
        lambda b: self_attention(b, kv=1),
        "e(7! a) q(b×c a) k(c a) v(d a) -> (2! b 3! d)",
    ),
    Case(
        "aten.einsum",
        lambda b: b(aten.einsum.default, "bij,bkj->bik", [b.source("x", 2, 3, 4), b.source("y", 2, 5, 4)]),
        "x(a b c) y(a d c) -> (a b d)",
    ),
    Case("aten.einsum", lambda b: b(aten.einsum.default, "ij->ji", [b.source("x", 3, 4)]), "x(a b) -> (b a)"),
    Case(
        "aten.einsum",
        lambda b: b(aten.einsum.default, "i,j->ij", [b.source("x", 3), b.source("y", 4)]),
        "x(a) y(b) -> (a b)",
    ),
    Case(
        "aten.conv1d",
        lambda b: b(
            aten.conv1d.default, b.source("x", 2, 4, 9), b.source("w", 4, 1, 3), b.source("c", 4), [1], [2], [1], 4
        ),
        "x(a b 9!) w(b 1 3!) c(b) -> (a b 11!)",
    ),
    Case("aten.conv1d", on_two(aten.conv1d.default, (2, 4, 9), (5, 4, 3)), "x(a b 9!) y(c b 3!) -> (a c 7!)"),
    Case(
        "aten.conv1d",
        on_two(aten.conv1d.default, (2, 4, 9), (6, 2, 3), None, [1], [0], [1], 2),
        "x(a 4! 9!) y(6! 2! 3!) -> (a 6! 7!)",
    ),
    # creation
    Case("aten.full", made(aten.full.default, [3, 4], 2.5), "x(a b) -> (a b)"),
    Case("aten.zeros", made(aten.zeros.default, [3, 4]), "x(a b) -> (a b)"),
    Case("aten.ones", made(aten.ones.default, [3, 4]), "x(a b) -> (a b)"),
    Case("aten.empty", made(aten.empty.memory_format, [3, 4]), "x(a b) -> (a b)"),
    Case("aten.new_zeros", made_like(aten.new_zeros.default, [3, 4]), "like(a) x(b c) -> (b c)"),
    Case("aten.new_ones", made_like(aten.new_ones.default, [3, 4]), "like(a) x(b c) -> (b c)"),
    Case("aten.new_full", made_like(aten.new_full.default, [3, 4], 2.5), "like(a) x(b c) -> (b c)"),
    Case("aten.new_empty", made_like(aten.new_empty.default, [3, 4]), "like(a) x(b c) -> (b c)"),
    Case("aten.arange", made(aten.arange.default, 5), "x(a) -> (a)"),
    Case("aten.arange", made(aten.arange.start_step, 2, 12, 2), "x(a) -> (a)"),
    Case("aten.linspace", made(aten.linspace.default, 0.0, 1.0, 5), "x(a) -> (a)"),
    Case("aten.eye", made(aten.eye.default, 4), "x(a b) -> (a b)"),
    Case("aten.scalar_tensor", made(aten.scalar_tensor.default, 3.0), "x() -> ()"),
    # indexing
    Case(
        "aten.embedding",
        lambda b: b(aten.embedding.default, b.source("w", 7, 4), b.source("ids", 2, 3, below=7)),
        "w(7! a) ids(b c) -> (b c a)",
    ),
    Case("aten.select", on(aten.select.int, (3, 4, 5), -2, 1), "x(a 4! b) -> (a b)"),
    Case("aten.unbind", on(aten.unbind.int, (3, 4, 5), 1), "x(a 4! b) -> (a b), (a b), (a b), (a b)"),
    Case(
        "aten.index_select",
        lambda b: b(aten.index_select.default, b.source("x", 5, 4), 0, b.source("ids", 3, below=5)),
        "x(5! a) ids(b) -> (b a)",
    ),
    Case(
        "aten.gather",
        lambda b: b(aten.gather.default, b.source("x", 3, 5), 1, b.source("ids", 3, 2, below=5)),
        "x(a 5!) ids(a b) -> (a b)",
    ),
    Case(
        "aten.gather",
        lambda b: b(aten.gather.default, b.source("x", 3, 5), 1, b.source("ids", 2, 2, below=5)),
        "x(3! 5!) ids(2! a) -> (2! a)",
    ),
    Case(
        "aten.index",
        lambda b: b(aten.index.Tensor, b.source("x", 5, 4), [b.source("ids", 3, below=5)]),
        "x(5! a) ids(b) -> (b a)",
    ),
    Case(
        "aten.index",
        lambda b: b(aten.index.Tensor, b.source("x", 2, 5, 4), [None, b.source("ids", 3, 2, below=5)]),
        "x(a 5! b) ids(c d) -> (a c d b)",
    ),
    Case(
        "aten.index",
        lambda b: b(
            aten.index.Tensor,
            b.source("x", 5, 2, 4, 3),
            [b.source("i", 3, below=5), None, b.source("j", 3, below=4)],
        ),
        "x(5! a 4! b) i(c) j(c) -> (c a b)",
    ),
    Case(
        "aten.index",
        lambda b: b(
            aten.index.Tensor,
            b.source("x", 2, 5, 4, 3),
            [None, b.source("i", 2, 1, below=5), b.source("j", 3, below=4)],
        ),
        "x(a 5! 4! b) i(c 1) j(d) -> (a c d b)",
    ),
    Case("aten.topk", on(aten.topk.default, (3, 5), 2), "x(a ^b) -> (a 2!), (a 2!)"),
    Case("aten.topk", on(aten.topk.default, (5, 3), 2, 0), "x(^a b) -> (2! b), (2! b)"),
    Case("aten.topk", on(aten.topk.default, (3, 2, 4), 2, 1), "x(a ^b c) -> (a 2! c), (a 2! c)"),
    Case(
        "aten.topk",
        lambda b: b(aten.topk.default, b(aten.view.default, b.source("x", 2, 3), [6]), 2),
        "x(2! 3!) -> (2!), (2!)",
    ),
    Case("aten.index", lambda b: picked_of(b, "index"), "x(a ^b) w(^b c) -> (a 2! c)"),
    Case("aten.index_select", lambda b: picked_of(b, "index_select"), "x(^a) w(^a b) -> (2! b)"),
    Case("aten.gather", lambda b: picked_of(b, "gather"), "x(a ^b) w(a ^b) -> (a 2!)"),
    Case("aten.scatter", lambda b: picked_of(b, "scatter"), "x(a ^b) w(a ^b) v(a 2!) -> (a ^b)"),
    Case("aten.scatter_add", lambda b: picked_of(b, "scatter_add"), "x(a ^b) w(a ^b) v(a 2!) -> (a ^b)"),
    Case("aten.one_hot", lambda b: picked_of(b, "one_hot"), "x(a ^b) w(^b) -> (a 2! ^b)"),
    Case("aten.index", lambda b: computed_index(b), "x(a 5!) w(5! b) -> (a 2! b)"),
    Case("aten.sort", on(aten.sort.default, (3, 5)), "x(a 5!) -> (a 5!), (a 5!)"),
    Case("aten.sort", on(aten.sort.default, (3, 5), 0, True), "x(3! a) -> (3! a), (3! a)"),
    Case("aten.sort", on(aten.sort.stable, (3, 5), stable=True, dim=0), "x(3! a) -> (3! a), (3! a)"),
    Case("aten.argsort", on(aten.argsort.default, (3, 5), 0), "x(3! 5!) -> (3! 5!)"),
    Case("aten.tril", on(aten.tril.default, (2, 3, 4)), "x(a 3! 4!) -> (a 3! 4!)"),
    Case("aten.triu", on(aten.triu.default, (2, 3, 4), 1), "x(a 3! 4!) -> (a 3! 4!)"),
    # pointwise
    Case("pointwise", on_two(aten.add.Tensor, (2, 3, 1), (3, 4)), "x(a b 1) y(b c) -> (a b c)"),
    Case("pointwise", on_two(aten.mul.Tensor, (3, 4), (3, 4)), "x(a b) y(a b) -> (a b)"),
    Case("pointwise", on(aten.silu.default, (3, 4)), "x(a b) -> (a b)"),
    Case("pointwise", on(aten.pow.Tensor_Scalar, (3, 4), 2), "x(a b) -> (a b)"),
    Case("pointwise", on(aten.clamp.default, (3, 4), -0.5, 0.5), "x(a b) -> (a b)"),
    Case("aten.to", on(aten.to.dtype, (3, 4), torch.float32), "x(a b) -> (a b)"),
    Case("aten._to_copy", on(aten._to_copy.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.type_as", on_two(aten.type_as.default, (3, 4), (5,)), "x(a b) y(c) -> (a b)"),
    Case("aten.clone", on(aten.clone.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.contiguous", on(aten.contiguous.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.detach", on(aten.detach.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.detach_", on(aten.detach_.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.alias", on(aten.alias.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.lift_fresh_copy", on(aten.lift_fresh_copy.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.lift_fresh", on(aten.lift_fresh.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.dropout", on(aten.dropout.default, (3, 4), 0.1, False), "x(a b) -> (a b)"),
    Case("aten.native_dropout", on(aten.native_dropout.default, (3, 4), 0.1, False), "x(a b) -> (a b), (a b)"),
    Case("aten.feature_dropout", on(aten.feature_dropout.default, (3, 4), 0.1, False), "x(a b) -> (a b)"),
    Case("aten.zeros_like", on(aten.zeros_like.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.ones_like", on(aten.ones_like.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.full_like", on(aten.full_like.default, (3, 4), 2.5), "x(a b) -> (a b)"),
    Case("aten.empty_like", on(aten.empty_like.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.rand_like", on(aten.rand_like.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.randn_like", on(aten.randn_like.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.conj", on(aten.conj.default, (3, 4), dtype=torch.complex128), "x(a b) -> (a b)"),
    Case("aten.resolve_conj", on(aten.resolve_conj.default, (3, 4), dtype=torch.complex128), "x(a b) -> (a b)"),
    Case("aten.resolve_neg", on(aten.resolve_neg.default, (3, 4)), "x(a b) -> (a b)"),
    Case("aten.real", on(aten.real.default, (3, 4), dtype=torch.complex128), "x(a b) -> (a b)"),
    Case("aten.imag", on(aten.imag.default, (3, 4), dtype=torch.complex128), "x(a b) -> (a b)"),
    Case("aten.copy", on_two(aten.copy.default, (3, 4), (4,)), "x(a b) y(b) -> (a b)"),
    Case(
        "aten.masked_fill",
        lambda b: b(aten.masked_fill.Scalar, b.source("x", 3, 4), b.source("m", 3, 1, dtype=torch.bool), -1.0),
        "x(a b) m(a 1) -> (a b)",
    ),
    Case(
        "aten.where",
        lambda b: b(aten.where.self, b.source("m", 3, 1, dtype=torch.bool), b.source("x", 3, 4), b.source("y", 4)),
        "m(a 1) x(a b) y(b) -> (a b)",
    ),
    Case(
        "aten.addcmul",
        lambda b: b(aten.addcmul.default, b.source("x", 3, 4), b.source("y", 4), b.source("z", 3, 1)),
        "x(a b) y(b) z(a 1) -> (a b)",
    ),
    Case(
        "aten.addcdiv",
        lambda b: b(aten.addcdiv.default, b.source("x", 3, 4), b.source("y", 4), b.source("z", 3, 1)),
        "x(a b) y(b) z(a 1) -> (a b)",
    ),
    Case("aten.lerp", on_two(aten.lerp.Scalar, (3, 4), (3, 4), 0.25), "x(a b) y(a b) -> (a b)"),
    Case("aten.polar", on_two(aten.polar.default, (3, 4), (3, 4)), "x(a b) y(a b) -> (a b)"),
    Case("aten.complex", on_two(aten.complex.default, (3, 4), (4,)), "x(a b) y(b) -> (a b)"),
    # reduction
    Case("aten.mean", on(aten.mean.dim, (3, 4, 5), [-1], True), "x(a b ~c) -> (a b 1)"),
    Case("aten.mean", on(aten.mean.default, (3, 4)), "x(~a ~b) -> ()"),
    Case("aten.var", on(aten.var.correction, (3, 4), [0], correction=0), "x(~a b) -> (b)"),
    Case("aten.var", on(aten.var.default, (3, 4), False), "x(~a ~b) -> ()"),
    Case("aten.std", on(aten.std.dim, (3, 4), [1], True, True), "x(a ~b) -> (a 1)"),
    Case("aten.linalg_vector_norm", on(aten.linalg_vector_norm.default, (3, 4), 2, [-1], True), "x(a ~b) -> (a 1)"),
    Case("aten.norm", on(aten.norm.ScalarOpt_dim, (3, 4), 2, [0]), "x(~a b) -> (b)"),
    Case("aten.norm", on(aten.norm.Scalar, (3, 4), 2), "x(~a ~b) -> ()"),
    Case(
        "aten.var_mean",
        on(aten.var_mean.correction, (3, 4), [1], correction=0, keepdim=True),
        "x(a ~b) -> (a 1), (a 1)",
    ),
    Case("aten.std_mean", on(aten.std_mean.correction, (3, 4), [1], correction=0), "x(a ~b) -> (a), (a)"),
    Case("aten.sum", on(aten.sum.dim_IntList, (3, 4, 5), [0, -1]), "x(~a b ~c) -> (b)"),
    Case("aten.sum", on(aten.sum.dim_IntList, (3, 4, 5), [1], True), "x(a ~b c) -> (a 1 c)"),
    Case("aten.sum", on(aten.sum.default, (3, 4)), "x(~a ~b) -> ()"),
    Case("aten.amax", on(aten.amax.default, (3, 4), [1]), "x(a 4!) -> (a)"),
    Case("aten.amin", on(aten.amin.default, (3, 4), [0], True), "x(3! a) -> (1 a)"),
    Case("aten.max.dim", on(aten.max.dim, (3, 4), 1), "x(a 4!) -> (a), (a)"),
    Case("aten.min.dim", on(aten.min.dim, (3, 4), 0, True), "x(3! a) -> (1 a), (1 a)"),
    Case("aten.any", on(aten.any.dim, (3, 4), 1, dtype=torch.bool), "x(a 4!) -> (a)"),
    Case("aten.all", on(aten.all.default, (3, 4), dtype=torch.bool), "x(3! 4!) -> ()"),
    Case("aten.argmax", on(aten.argmax.default, (3, 4), 1), "x(a 4!) -> (a)"),
    Case("aten.argmin", on(aten.argmin.default, (3, 4), 0, True), "x(3! a) -> (1 a)"),
    Case("aten.prod", on(aten.prod.dim_int, (3, 4), 1), "x(a 4!) -> (a)"),
    Case("aten.logsumexp", on(aten.logsumexp.default, (3, 4), [1], True), "x(a 4!) -> (a 1)"),
    Case("aten.softmax", on(aten.softmax.int, (3, 4), -1), "x(a ^b) -> (a ^b)"),
    Case("aten._softmax", on(aten._softmax.default, (3, 4), 0, False), "x(^a b) -> (^a b)"),
    Case("aten.log_softmax", on(aten.log_softmax.int, (3, 4), -1), "x(a ^b) -> (a ^b)"),
    Case("aten._log_softmax", on(aten._log_softmax.default, (3, 4), 1, False), "x(a ^b) -> (a ^b)"),
    Case("aten._safe_softmax", on(aten._safe_softmax.default, (3, 4), 1), "x(a ^b) -> (a ^b)"),
    Case("aten.cumsum", on(aten.cumsum.default, (3, 4), 1), "x(a 4!) -> (a 4!)"),
    Case("aten.cumprod", on(aten.cumprod.default, (3, 4), 0), "x(3! a) -> (3! a)"),
    Case("aten.logcumsumexp", on(aten.logcumsumexp.default, (3, 4), -1), "x(a 4!) -> (a 4!)"),
    Case("aten.flip", on(aten.flip.default, (3, 4, 5), [0, -1]), "x(3! a 5!) -> (3! a 5!)"),
    Case("aten.roll", on(aten.roll.default, (3, 4, 5), [2], [1]), "x(a 4! b) -> (a 4! b)"),
    Case("aten.roll", on(aten.roll.default, (3, 4), [1]), "x(3! 4!) -> (3! 4!)"),
    Case(
        "aten.layer_norm",
        lambda b: b(aten.layer_norm.default, b.source("x", 3, 4), [4], b.source("w", 4), b.source("c", 4)),
        "x(a ~b) w(~b) c(~b) -> (a ~b)",
    ),
    Case("aten.layer_norm", on(aten.layer_norm.default, (3, 4, 5), [4, 5]), "x(a ~b ~c) -> (a ~b ~c)"),
    Case(
        "aten.native_layer_norm",
        lambda b: b(aten.native_layer_norm.default, b.source("x", 3, 4), [4], b.source("w", 4), b.source("c", 4), 1e-5),
        "x(a ~b) w(~b) c(~b) -> (a ~b), (a 1), (a 1)",
    ),
    Case(
        "aten.rms_norm",
        lambda b: b(aten.rms_norm.default, b.source("x", 3, 4), [4], b.source("w", 4), 1e-6),
        "x(a ~b) w(~b) -> (a ~b)",
    ),
    # shape
    Case("aten.view.default", on(aten.view.default, (3, 12), [3, 2, 6]), "x(a b×c) -> (a b c)"),
    Case("aten.view.default", on(aten.view.default, (3, 2, 6), [-1, 12]), "x(a b c) -> (a b×c)"),
    Case("aten.view.default", on(aten.view.default, (4, 6), [6, 4]), "x(4! 6!) -> (6! 4!)"),
    Case("aten.reshape", on(aten.reshape.default, (3, 4), [12]), "x(a b) -> (a×b)"),
    Case("aten._unsafe_view", on(aten._unsafe_view.default, (12,), [3, 4]), "x(a×b) -> (a b)"),
    Case("aten.flatten", on(aten.flatten.using_ints, (2, 3, 4), 1, 2), "x(a b c) -> (a b×c)"),
    Case("aten.view_as", on_two(aten.view_as.default, (2, 6), (12,)), "x(a b) y(a×b) -> (a×b)"),
    Case("aten.reshape_as", on_two(aten.reshape_as.default, (12,), (3, 4)), "x(a×b) y(a b) -> (a b)"),
    Case("aten.unflatten.int", on(aten.unflatten.int, (2, 12), -1, [3, 4]), "x(a b×c) -> (a b c)"),
    Case("aten.unflatten.int", on(aten.unflatten.int, (12, 2), 0, [3, -1]), "x(a×b c) -> (a b c)"),
    Case("aten.transpose.int", on(aten.transpose.int, (2, 3, 4), 0, -1), "x(a b c) -> (c b a)"),
    Case("aten.swapaxes", on(aten.swapaxes.default, (2, 3, 4), 1, 2), "x(a b c) -> (a c b)"),
    Case("aten.swapdims", on(aten.swapdims.default, (2, 3, 4), 1, 2), "x(a b c) -> (a c b)"),
    Case("aten.t", on(aten.t.default, (3, 4)), "x(a b) -> (b a)"),
    Case("aten.t", on(aten.t.default, (3,)), "x(a) -> (a)"),
    Case("aten.numpy_T", on(aten.numpy_T.default, (3, 4)), "x(a b) -> (b a)"),
    Case("aten.numpy_T", on(aten.numpy_T.default, (3, 3, 3)), "x(a b c) -> (c b a)"),
    Case("aten.mT", on(aten.mT.default, (2, 3, 4)), "x(a b c) -> (a c b)"),
    Case("aten.matrix_H", on(aten.matrix_H.default, (3, 4)), "x(a b) -> (b a)"),
    Case("aten.permute", on(aten.permute.default, (2, 3, 4), [2, 0, 1]), "x(a b c) -> (c a b)"),
    Case("aten.movedim.int", on(aten.movedim.int, (2, 3, 4), 0, -1), "x(a b c) -> (b c a)"),
    Case("aten.unsqueeze", on(aten.unsqueeze.default, (3, 4), -2), "x(a b) -> (a 1 b)"),
    Case("aten.squeeze", on(aten.squeeze.default, (1, 3, 1)), "x(1 a 1) -> (a)"),
    Case("aten.squeeze", on(aten.squeeze.dim, (1, 3, 1), -1), "x(1 a 1) -> (1 a)"),
    Case("aten.squeeze", on(aten.squeeze.dims, (1, 3, 1), [0, 2]), "x(1 a 1) -> (a)"),
    Case("aten.squeeze", on(aten.squeeze.dim, (2, 3), -1), "x(a b) -> (a b)"),
    Case("aten.expand", on(aten.expand.default, (1, 3), [4, -1]), "x(1 a) -> (b a)"),
    Case("aten.expand", on(aten.expand.default, (3,), [2, 4, 3]), "x(a) -> (b c a)"),
    Case("aten.broadcast_to", on(aten.broadcast_to.default, (1, 3), [4, 3]), "x(1 a) -> (b a)"),
    Case("aten.expand_as", on_two(aten.expand_as.default, (1, 3), (4, 3)), "x(1 a) y(b a) -> (b a)"),
    Case(
        "aten.broadcast_tensors", on_list(aten.broadcast_tensors.default, [(3, 1), (4,)]), "x(a 1) y(b) -> (a b), (a b)"
    ),
    Case("aten.meshgrid", on_list(aten.meshgrid.default, [(3,), (4,)]), "x(a) y(b) -> (a b), (a b)"),
    Case("aten.meshgrid", on_list(aten.meshgrid.indexing, [(3,), (3,)], indexing="ij"), "x(a) y(b) -> (a b), (a b)"),
    Case("aten.meshgrid", on_list(aten.meshgrid.indexing, [(3,), (3,)], indexing="xy"), "x(a) y(b) -> (b a), (b a)"),
    Case("aten.repeat", on(aten.repeat.default, (3, 4), [1, 2]), "x(a b) -> (a c×b)"),
    Case("aten.repeat", on(aten.repeat.default, (1, 4), [2, 3, 1]), "x(1 a) -> (b c a)"),
    Case("aten.tile", on(aten.tile.default, (3, 4), [2, 1]), "x(a b) -> (c×a b)"),
    Case("aten.repeat_interleave.self_int", on(aten.repeat_interleave.self_int, (3, 4), 2, 1), "x(a b) -> (a b×c)"),
    Case("aten.repeat_interleave.self_int", on(aten.repeat_interleave.self_int, (1, 4), 3, 0), "x(1 a) -> (b a)"),
    Case("aten.cat", on_list(aten.cat.default, [(2, 3), (2, 4)], 1), "x(a b) y(a c) -> (a b|c)"),
    Case("aten.cat", on_list(aten.cat.default, [(2, 1), (2, 4)], -1), "x(a 1) y(a b) -> (a 1!|b)"),
    Case("aten.cat", on_list(aten.cat.default, [(0,), (2, 4), (3, 4)]), "x(a) y(b c) z(d c) -> (b|d c)"),
    Case("aten.concat", on_list(aten.concat.default, [(2, 3), (4, 3)]), "x(a b) y(c b) -> (a|c b)"),
    Case("aten.stack", on_list(aten.stack.default, [(3, 4), (3, 4)], 1), "x(a b) y(a b) -> (a 2! b)"),
    Case("aten.slice.Tensor", on(aten.slice.Tensor, (2, 9), 1, 2, 5), "x(a b|c|d) -> (a c)"),
    Case("aten.slice.Tensor", on(aten.slice.Tensor, (2, 9), 1, -4, 9223372036854775807), "x(a b|c) -> (a c)"),
    Case("aten.slice.Tensor", on(aten.slice.Tensor, (9,), 0, 0, 4), "x(a|b) -> (a)"),
    Case("aten.slice.Tensor", on(aten.slice.Tensor, (2, 9), 1, 0, 9223372036854775807), "x(a b) -> (a b)"),
    Case("aten.slice.Tensor", on(aten.slice.Tensor, (8,), 0, 1, 8, 2), "x(a×2!) -> (a)"),
    Case("aten.slice.Tensor", on(aten.slice.Tensor, (8,), 0, 0, 9223372036854775807, 3), "x(8!) -> (3!)"),
    Case("aten.slice.Tensor", on(aten.slice.Tensor, (8,), 0, 2, 8, 2), "x(8!) -> (3!)"),
    Case(
        "aten.slice_scatter",
        on_two(aten.slice_scatter.default, (2, 9), (2, 3), 1, 2, 5),
        "x(a b|c|d) y(a c) -> (a b|c|d)",
    ),
    Case("aten.slice_scatter", on_two(aten.slice_scatter.default, (9, 2), (4, 2), 0, -4), "x(a|b c) y(b c) -> (a|b c)"),
    Case("aten.slice_scatter", on_two(aten.slice_scatter.default, (2, 9), (2, 9), 1), "x(a b) y(a b) -> (a b)"),
    Case(
        "aten.slice_scatter",
        on_two(aten.slice_scatter.default, (2, 8), (2, 4), 1, 0, 8, 2),
        "x(a 8!) y(a 4!) -> (a 8!)",
    ),
    Case("aten.select_scatter", on_two(aten.select_scatter.default, (2, 9), (2,), 1, 3), "x(a 9!) y(a) -> (a 9!)"),
    Case("aten.narrow.default", on(aten.narrow.default, (2, 9), 1, 0, 9), "x(a b) -> (a b)"),
    Case("aten.narrow.default", on(aten.narrow.default, (2, 9), 1, 2, 3), "x(a b|c|d) -> (a c)"),
    Case("aten.split", on(aten.split.Tensor, (2, 9), 4, -1), "x(a b|c|1!) -> (a b), (a c), (a 1)"),
    Case("aten.split", on(aten.split.sizes, (9, 2), [2, 3, 4]), "x(a|b|c d) -> (a d), (b d), (c d)"),
    Case(
        "aten.split_with_sizes",
        on(aten.split_with_sizes.default, (2, 9), [1, 3, 5], 1),
        "x(a 1!|b|c) -> (a 1), (a b), (a c)",
    ),
    Case("aten.split_with_sizes", fused, "x(a b×[c|d|e]) -> (a b c), (a b d), (a b e)"),
    Case("aten.chunk", on(aten.chunk.default, (2, 9), 2, 1), "x(a b|c) -> (a b), (a c)"),
    Case("getitem", item, "x(a b|c) -> (a c)"),
    Case("aten.constant_pad_nd", on(aten.constant_pad_nd.default, (3, 4), [1, 2]), "x(a 4!) -> (a 7!)"),
    Case("aten.constant_pad_nd", on(aten.constant_pad_nd.default, (3, 4), [1, -1]), "x(a 4!) -> (a 4!)"),
    Case("aten.pad", on(aten.pad.default, (3, 4, 5), [0, 0, 1, 1]), "x(a 4! b) -> (a 6! b)"),
    Case("aten.view_as_complex", on(aten.view_as_complex.default, (3, 4, 2)), "x(a b 2!) -> (a b)"),
    Case("aten.view_as_real", on(aten.view_as_real.default, (3, 4), dtype=torch.complex128), "x(a b) -> (a b 2!)"),
    Case("aten.diff", on(aten.diff.default, (3, 5)), "x(3! 5!) -> (3! 4!)"),
]


def cases() -> list[Any]:
    """All cases, numbered within their rule."""
    count: dict[str, int] = {}
    params = []
    for case in CASES:
        n = count[case.rule] = count.get(case.rule, -1) + 1
        params.append(pytest.param(case, id=f"{case.rule}-{n}"))
    return params


def graph_of(case: Case) -> tuple[fx.GraphModule, fx.Node]:
    bench = Bench()
    name = case.build(bench).name
    graph_module = bench.module()
    return graph_module, next(n for n in graph_module.graph.nodes if n.name == name)


def own_rules() -> dict[str, Rule]:
    """Rules of the package; doctests and other tests may have registered more."""
    families = {m.__name__ for m in (contraction, creation, indexing, pointwise, reduction, shape)}
    return {name: rule for name, rule in rules().items() if rule.apply.__module__ in families}


def keep_only(structure: Structure, choose: Callable[[int], Iterable[int]]) -> Plan:
    """The same choice of units for every group that may be cut; as many more as a group must keep."""
    cuts = {}
    for group in (structure.groups[name] for name in free_groups(structure)):
        units = [*choose(group.units), *range(group.units)]
        keep = sorted(list(dict.fromkeys(units))[: max(len([*choose(group.units)]), group.at_least)])
        cuts[group.name] = Cut(group.units, (tuple(keep),))
    return Plan(cuts)


def test_every_rule_has_a_case() -> None:
    assert own_rules().keys() == {c.rule for c in CASES}


def test_every_rule_has_a_golden_line() -> None:
    for name, found in own_rules().items():
        assert "->" in found.golden or name == "aten.einsum", name
        assert found.golden.count("(") == found.golden.count(")"), name
        assert "\n" not in found.golden, name


@pytest.mark.parametrize("case", cases())
def test_a_rule_says_what_its_operator_does_to_axes(case: Case) -> None:
    graph_module, node = graph_of(case)
    assert find_rule(node) is rules()[case.rule]
    assert signature(infer(graph_module), node) == case.says


@pytest.mark.parametrize("case", cases())
def test_cutting_is_exact(case: Case) -> None:
    graph_module, _ = graph_of(case)
    structure = infer(graph_module)
    plans = [keep_only(structure, lambda n: range(1, n)), keep_only(structure, lambda n: range(n - 1))]
    plans += [random_plan(structure, seed, least=2) for seed in range(KEEP_SETS)]
    cut = [name for plan in plans for name in verify(graph_module, plan, structure)]
    assert bool(cut) == bool(free_groups(structure))


@pytest.mark.parametrize("case", cases())
def test_cutting_down_to_a_single_unit_is_exact(case: Case) -> None:
    graph_module, _ = graph_of(case)
    structure = infer(graph_module)
    verify(graph_module, keep_only(structure, lambda n: [n - 1]), structure)


@pytest.mark.parametrize("case", cases())
def test_analysis_leaves_the_graph_alone(case: Case) -> None:
    graph_module, _ = graph_of(case)
    before = str(graph_module.graph)
    with contextlib.suppress(GraphError):
        infer(graph_module)
    assert str(graph_module.graph) == before


UNUSUAL = [
    ("narrow counted from the end", on(aten.narrow.default, (2, 9), 1, -4, 2), "x(a b|c|d) -> (a c)"),
    ("narrow counted to the end", on(aten.narrow.default, (2, 9), 1, -4, 4), "x(a b|c) -> (a c)"),
    ("tile by fewer numbers than dimensions", on(aten.tile.default, (3, 4), [2]), "x(a b) -> (a c×b)"),
    ("sum over named dimensions", on(aten.sum.dim_IntList, (3, 4), dim=[1], keepdim=True), "x(a ~b) -> (a 1)"),
    (
        "convolution by channel with named groups",
        lambda b: b(aten.conv1d.default, b.source("x", 2, 4, 9), b.source("w", 4, 1, 3), groups=4),
        "x(a b 9!) w(b 1 3!) -> (a b 7!)",
    ),
    ("the smallest are picked", on(aten.topk.default, (3, 5), 2, -1, False), "x(a 5!) -> (a 2!), (a 2!)"),
]


@pytest.mark.parametrize(
    ("build", "says"),
    [pytest.param(*n[1:], id=n[0]) for n in UNUSUAL],
)
def test_unusual_uses_of_operators_are_exact(build: Callable[[Bench], fx.Node], says: str) -> None:
    graph_module, node = graph_of(Case("", build, says))
    structure = infer(graph_module)
    assert signature(structure, node) == says
    for seed in range(KEEP_SETS):
        verify(graph_module, random_plan(structure, seed, least=2), structure)


# -- sizes that are rewritten -----------------------------------------------------------------------------------------


RESIZED = [
    ("view", on(aten.view.default, (3, 12), [3, 2, 6]), {"x[1].1": (0, 5)}, ([3, 2, 2],), {}),
    ("view keeps -1", on(aten.view.default, (3, 2, 6), [-1, 12]), {"x[2]": (0, 5)}, ([-1, 4],), {}),
    ("expand keeps -1", on(aten.expand.default, (1, 3), [4, -1]), {"x[1]": (2,)}, ([4, -1],), {}),
    ("unflatten", on(aten.unflatten.int, (2, 12), -1, [3, 4]), {"x[1].0": (1, 2)}, (-1, [2, 4]), {}),
    ("slice", on(aten.slice.Tensor, (2, 9), 1, 2, 5), {"x[1].0": (0,), "x[1].1": (1, 2)}, (1, 1, 3), {}),
    ("slice to the end", on(aten.slice.Tensor, (9,), 0, -4, 2**63 - 1), {"x[0].0": (0, 4)}, (0, 2, 6), {}),
    ("narrow", on(aten.narrow.default, (2, 9), 1, 2, 3), {"x[1].0": (0,), "x[1].1": (1, 2)}, (1, 1, 2), {}),
    ("split", on(aten.split.Tensor, (2, 9), 4, -1), {"x[1].0": (0,)}, ([1, 4, 1], -1), {}),
    ("chunk", on(aten.chunk.default, (2, 9), 2, 1), {"x[1].1": (0, 3)}, ([5, 2], 1), {}),
    ("layer_norm", on(aten.layer_norm.default, (3, 4), [4]), {"x[1]": (0, 2, 3)}, ([3],), {}),
    ("full", made(aten.full.default, [3, 4], 2.5), {"x[1]": (0,)}, ([3, 1], 2.5), {}),
    ("new_ones", made_like(aten.new_ones.default, [3, 4]), {"x[0]": (0, 1)}, ([2, 4],), {}),
    ("repeat", on(aten.repeat.default, (3, 4), [1, 2]), {"x[1]": (0, 1)}, ([1, 2],), {}),
    ("attention keeps its scale", self_attention, {"q[0].1": (0, 3)}, (), {"scale": 1 / 2}),
]


@pytest.mark.parametrize(("build", "keep", "args", "kwargs"), [r[1:] for r in RESIZED], ids=[r[0] for r in RESIZED])
def test_size_arguments_follow_the_cut(
    build: Callable[[Bench], fx.Node],
    keep: Mapping[str, tuple[int, ...]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    bench = Bench()
    name = build(bench).name
    structure = infer(bench.module())
    plan = Plan({g: Cut(structure.groups[g].units, (units,)) for g, units in keep.items()})
    node = next(n for n in prune_graph(resolve(structure, plan)).graph.nodes if n.name == name)
    assert tuple(a for a in node.args if not isinstance(a, fx.Node)) == args
    assert dict(node.kwargs) == kwargs


# -- what has no rule -------------------------------------------------------------------------------------------------


def mystery(x: Tensor) -> Tensor:
    """An operator that nobody wrote a rule for."""
    return x.flip(0) * 2


def mysterious(b: Bench) -> fx.Node:
    x = b(aten.view.default, b.source("x", 3, 12), [3, 2, 6])
    return b(aten.linear.default, b(mystery, x), b.source("w", 4, 6))


def test_an_operator_without_a_rule_freezes_what_flows_through_it_and_says_so() -> None:
    bench = Bench()
    structure = infer((mysterious(bench), bench.module())[1])
    (refusal,) = structure.refusals
    assert (refusal.node, refusal.operator) == ("mystery", "test_rules.mystery")
    assert refusal.frozen == ("x[0]:3", "x[1].0:2", "x[1].1:6")
    assert free_groups(structure) == ["w[0]"]
    assert structure.groups["x[1].1"].frozen == "test_rules.mystery at mystery has no axis rule"
    assert "test_rules.mystery" in structure.groups["w[1]"].frozen


def test_an_operator_without_a_rule_is_no_refusal_where_nothing_could_be_cut() -> None:
    bench = Bench()
    bench(mystery, bench.ids)
    assert infer(bench.module()).refusals == []


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda b, x: b(aten.einsum.default, "...i,oi->...o", [x, b.source("w", 4, 6)]), "every axis"),
        (lambda b, x: b(aten.repeat_interleave.self_int, x, 2), "it goes over all dimensions at once"),
    ],
)
def test_what_a_rule_does_not_cover_is_frozen_as_if_there_were_none(build: Any, why: str) -> None:
    bench = Bench()
    build(bench, bench.source("x", 3, 6))
    structure = infer(bench.module())
    (refusal,) = structure.refusals
    assert refusal.why.endswith(why)
    assert refusal.frozen[:2] == ("x[0]:3", "x[1]:6")
    assert str(structure.groups["x[1]"].frozen).endswith(f"has no axis rule for this: {refusal.why}")


def test_a_rule_can_be_registered_from_outside() -> None:
    @rule("test_rules.mystery", golden="(a *) -> (a *), a fixed")
    def flipped(cx: Any, x: Any) -> Any:
        cx.freeze(x[0], "flipped")
        return x

    try:
        bench = Bench()
        node = mysterious(bench)
        graph_module = bench.module()
        structure = infer(graph_module)
        assert structure.refusals == []
        assert signature(structure, node) == "x(3! a×b) w(c b) -> (3! a c)"
        assert verify(graph_module, keep_only(structure, lambda n: range(1, n)), structure)
    finally:
        registry._RULES.pop("test_rules.mystery")


def test_a_rule_that_contradicts_the_shapes_is_refused_by_name() -> None:
    rule("test_rules.mystery", golden="(a b) -> (b a)")(lambda cx, x: x[::-1])
    try:
        bench = Bench()
        bench(mystery, bench.source("x", 3, 4))
        with pytest.raises(GraphError, match=r"^mystery: the axis rule of test_rules\.mystery says"):
            infer(bench.module())
    finally:
        registry._RULES.pop("test_rules.mystery")


def test_a_graph_that_calls_modules_is_refused() -> None:
    bench = Bench()
    bench.root.add_module("inner", torch.nn.Identity())
    node = bench.graph.call_module("inner", (bench.source("x", 3),))
    with pytest.raises(GraphError, match=rf"^{node.name}: found a call_module node"):
        infer(bench.module())
