"""Random graphs of operators, random cuts: the axis algebra against execution.

Every graph is made from a seed, so that a failure can be repeated:

    pytest tests/test_fuzz.py -m slow                                  2000 graphs, from seed 0
    SLIMGRAPH_FUZZ=1000:9000 pytest tests/test_fuzz.py -m slow         seeds 1000 to 8999
    SLIMGRAPH_FUZZ=4711:4712 pytest tests/test_fuzz.py -m slow         the graph of seed 4711 alone
"""

from __future__ import annotations

import math
import operator
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from labelled import Bench, aten, conditional_plan, random_plan, verify
from torch import Tensor, fx

from slimgraph.groups import infer
from slimgraph.rules import operator_name

BLOCK = 100
LARGEST = 4000  # elements of a tensor
SHAPES = [(2, 12), (3, 4, 2), (24,), (4, 6), (2, 3, 4), (1, 8), (2, 1, 6), (5, 4), (2, 2, 2, 3)]


class Fuzzer:
    """Grows a graph step by step; each method is one way to add to it, or gives up by returning None."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.bench = Bench(seed)
        self.made = 0
        self.pool: list[fx.Node] = []
        for _ in range(self.dice.randint(1, 3)):
            self.pool.append(self.fresh(self.dice.choice(SHAPES)))

    def grow(self, steps: int) -> fx.GraphModule:
        ways = [self.moves, self.joins, self.cuts, self.repeats, self.computes, self.sums, self.reduces, self.indexes]
        for _ in range(steps):
            node = self.dice.choice(ways)()
            if node is not None and node.meta["val"].numel() <= LARGEST:
                self.pool.append(node)
        return self.bench.module()

    # -- choosing ------------------------------------------------------------------------------------------------

    def fresh(self, shape: Sequence[int], **kwargs: int) -> fx.Node:
        self.made += 1
        return self.bench.source(f"p{self.made}", *shape, **kwargs)

    def any(self, accept: Callable[[list[int]], bool] = lambda shape: True) -> tuple[fx.Node, list[int]] | None:
        fitting = [n for n in self.pool if accept(shape_of(n))]
        if not fitting:
            return None
        node = self.dice.choice(fitting)
        return node, shape_of(node)

    def like(self, shape: list[int]) -> fx.Node:
        """A tensor that broadcasts with this shape: one that is there already, or a new one."""
        there = [n for n in self.pool if shape_of(n) == shape]
        if there and self.dice.random() < 0.5:
            return self.dice.choice(there)
        start = self.dice.randrange(len(shape)) if shape and self.dice.random() < 0.3 else 0
        return self.fresh([1 if self.dice.random() < 0.15 else n for n in shape[start:]])

    def factors(self, n: int) -> list[int]:
        out = []
        while n > 1:
            out.append(self.dice.choice([d for d in range(2, n + 1) if n % d == 0]))
            n //= out[-1]
        if self.dice.random() < 0.2:
            out.insert(self.dice.randint(0, len(out)), 1)
        return out or [1]

    def parts(self, n: int) -> list[int]:
        cuts = sorted(self.dice.sample(range(1, n), self.dice.randint(0, min(3, n - 1)))) if n > 1 else []
        return [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]

    # -- growing -------------------------------------------------------------------------------------------------

    def moves(self) -> fx.Node | None:
        found = self.any(lambda s: bool(s))
        if found is None:
            return None
        node, shape = found
        dim = self.dice.randrange(len(shape))
        new = self.factors(math.prod(shape))
        match self.dice.randrange(10):
            case 0:
                return self.bench(aten.reshape.default, node, new)
            case 1:
                contiguous = self.bench(aten.contiguous.default, node)
                new[self.dice.randrange(len(new))] = -1
                return self.bench(aten.view.default, contiguous, new)
            case 2:
                return self.bench(aten.permute.default, node, self.dice.sample(range(len(shape)), len(shape)))
            case 3:
                return self.bench(aten.transpose.int, node, dim, self.dice.randrange(len(shape)) - len(shape))
            case 4:
                return self.bench(aten.unflatten.int, node, dim, self.factors(shape[dim]))
            case 5:
                return self.bench(aten.flatten.using_ints, node, 0, dim)
            case 6:
                return self.bench(aten.unsqueeze.default, node, self.dice.randint(0, len(shape)))
            case 7:
                return self.bench(aten.squeeze.dim, node, dim)
            case 8:
                return self.bench(aten.movedim.int, node, dim, self.dice.randrange(len(shape)))
            case _:
                return self.bench(aten.reshape_as.default, node, self.fresh(new))

    def joins(self) -> fx.Node | None:
        found = self.any(lambda s: bool(s))
        if found is None:
            return None
        node, shape = found
        dim = self.dice.randrange(len(shape))
        if self.dice.random() < 0.3:
            others = [self.fresh(shape) for _ in range(self.dice.randint(1, 2))]
            return self.bench(aten.stack.default, [node, *others], self.dice.randint(0, len(shape)))
        fitting = [n for n in self.pool if shape_of(n)[:dim] + shape_of(n)[dim + 1 :] == shape[:dim] + shape[dim + 1 :]]
        fitting = [n for n in fitting if len(shape_of(n)) == len(shape)]
        other = [*shape[:dim], self.dice.randint(1, 4), *shape[dim + 1 :]]
        tensors = [node, self.dice.choice(fitting), self.fresh(other)][: self.dice.randint(2, 3)]
        self.dice.shuffle(tensors)
        return self.bench(aten.cat.default, tensors, dim - (len(shape) if self.dice.random() < 0.5 else 0))

    def cuts(self) -> fx.Node | None:
        found = self.any(lambda s: bool(s) and max(s) > 1)
        if found is None:
            return None
        node, shape = found
        dim = self.dice.choice([i for i, n in enumerate(shape) if n > 1])
        n = shape[dim]
        if self.dice.random() < 0.4:
            first = self.dice.randrange(n)
            last = self.dice.randint(first + 1, n)
            match self.dice.randrange(5):
                case 4:
                    piece = self.fresh([last - first if i == dim else m for i, m in enumerate(shape)])
                    return self.bench(aten.slice_scatter.default, node, piece, dim, first, last)
                case 0:
                    return self.bench(aten.slice.Tensor, node, dim, first, last)
                case 1:
                    return self.bench(aten.slice.Tensor, node, dim - len(shape), first - n, 2**63 - 1)
                case 2:
                    return self.bench(aten.narrow.default, node, dim, first, last - first)
                case _:
                    return self.bench(aten.slice.Tensor, node, dim, self.dice.randint(0, 1), n, 2)
        match self.dice.randrange(3):
            case 0:
                pieces = self.bench(aten.split_with_sizes.default, node, self.parts(n), dim)
            case 1:
                pieces = self.bench(aten.split.Tensor, node, self.dice.randint(1, n), dim)
            case _:
                pieces = self.bench(aten.chunk.default, node, self.dice.randint(1, 3), dim)
        order = list(range(len(pieces.meta["val"])))
        self.dice.shuffle(order)
        items = [self.bench(operator.getitem, pieces, i) for i in order]
        for item in items[1:]:
            self.pool.append(item)
        if len(items) > 1 and self.dice.random() < 0.4:
            return self.bench(aten.cat.default, items, dim)
        return items[0]

    def repeats(self) -> fx.Node | None:
        found = self.any(lambda s: bool(s))
        if found is None:
            return None
        node, shape = found
        dim = self.dice.randrange(len(shape))
        times = self.dice.randint(2, 3)
        match self.dice.randrange(4):
            case 0:
                wide = self.bench(aten.unsqueeze.default, node, dim)
                return self.bench(aten.expand.default, wide, [*shape[:dim], times, *shape[dim:]])
            case 1:
                return self.bench(aten.repeat_interleave.self_int, node, times, dim)
            case 2:
                return self.bench(aten.repeat.default, node, [times if i == dim else 1 for i in range(len(shape))])
            case _:
                return self.bench(aten.expand.default, node, [times, *(-1 for _ in shape)])

    def computes(self) -> fx.Node | None:
        found = self.any()
        if found is None:
            return None
        node, shape = found
        match self.dice.randrange(7):
            case 0:
                return self.bench(aten.silu.default, node)
            case 1:
                return self.bench(aten.to.dtype, node, torch.float64)
            case 2:
                mask = self.bench(aten.gt.Tensor, node, self.like(shape))
                return self.bench(aten.where.self, mask, node, self.like(shape))
            case 3:
                made = self.bench(aten.full.default, shape, 1.5)
                return self.bench(aten.mul.Tensor, node, made)
            case 4 if shape:
                numbers = self.bench(aten.arange.default, shape[-1])
                return self.bench(aten.mul.Tensor, node, numbers)
            case _:
                return self.bench(
                    self.dice.choice([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]), node, self.like(shape)
                )

    def sums(self) -> fx.Node | None:
        found = self.any(lambda s: len(s) >= 2)
        if found is None:
            return None
        node, shape = found
        match self.dice.randrange(7):
            case 6:
                letters = "abcdefgh"[: len(shape)]
                summed = self.dice.choice(letters)
                weight = self.fresh((shape[letters.index(summed)], 3))
                pattern = f"{letters},{summed}z->{letters.replace(summed, '')}z"
                return self.bench(aten.einsum.default, pattern, [node, weight])
            case 0 | 1:
                bias = [self.fresh((5,))] if self.dice.random() < 0.5 else []
                return self.bench(aten.linear.default, node, self.fresh((5, shape[-1])), *bias)
            case 2:
                return self.bench(aten.matmul.default, node, self.fresh((shape[-1], 3)))
            case 3:
                other = self.dice.choice([node, self.fresh(shape)])
                return self.bench(aten.matmul.default, node, self.bench(aten.transpose.int, other, -1, -2))
            case 4 if len(shape) >= 3:
                query, key = self.bench(aten.softmax.int, node, -1), self.fresh((*shape[:-2], 3, shape[-1]))
                value = self.fresh((*shape[:-2], 3, 4))
                return self.bench(aten.scaled_dot_product_attention.default, query, key, value)
            case 4:
                return self.bench(aten.addmm.default, self.fresh((3,)), node, self.fresh((shape[-1], 3)))
            case _:
                return self.bench(
                    aten.sum.dim_IntList, node, [self.dice.randrange(len(shape))], self.dice.random() < 0.5
                )

    def reduces(self) -> fx.Node | None:
        found = self.any(lambda s: bool(s))
        if found is None:
            return None
        node, shape = found
        dim = self.dice.randrange(len(shape))
        match self.dice.randrange(6):
            case 0:
                return self.bench(aten.mean.dim, node, [dim], True)
            case 1:
                weight = [self.fresh(shape[-1:])] if self.dice.random() < 0.7 else []
                return self.bench(aten.layer_norm.default, node, shape[-1:], *weight)
            case 2:
                return self.bench(aten.rms_norm.default, node, shape[-1:], self.fresh(shape[-1:]), 1e-6)
            case 3:
                return self.bench(aten.softmax.int, node, dim)
            case 4:
                return self.bench(aten.cumsum.default, node, dim)
            case _:
                return self.bench(aten.amax.default, node, [dim], True)

    def indexes(self) -> fx.Node | None:
        found = self.any(lambda s: bool(s) and max(s) > 1)
        if found is None:
            return None
        node, shape = found
        dim = self.dice.choice([i for i, n in enumerate(shape) if n > 1])
        n = shape[dim]
        match self.dice.randrange(6):
            case 0:
                return self.bench(aten.select.int, node, dim, self.dice.randrange(n))
            case 1:
                return self.bench(aten.index_select.default, node, dim, self.fresh((3,), below=n))
            case 2:
                return self.best(node, dim, 0)
            case 3:
                return self.bench(aten.gather.default, self.fresh(shape), dim, self.best(node, dim, 1))
            case 4:
                return self.bench(aten.index.Tensor, self.fresh((n, 3)), [self.best(node, dim, 1)])
            case _:
                return self.bench(aten.flip.default, node, [dim])

    def best(self, node: fx.Node, dim: int, output: int) -> fx.Node:
        """The best along a dimension, or where they are; among numbers of which no two are alike."""
        distinct = self.bench(aten.add.Tensor, node, self.fresh(shape_of(node)))
        found = self.bench(aten.topk.default, distinct, self.dice.randint(1, shape_of(node)[dim]), dim)
        return self.bench(operator.getitem, found, output)


def shape_of(node: fx.Node) -> list[int]:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return list(value.shape)


def graph_of(seed: int) -> fx.GraphModule:
    return Fuzzer(seed).grow(random.Random(seed).randint(2, 10))


def attempt(seed: int) -> Counter[str]:
    """Cut the graph of a seed in two ways; returns its operators if something of them was cut."""
    graph_module = graph_of(seed)
    structure = infer(graph_module)
    plans = [random_plan(structure, s) for s in (seed, seed + 1)]
    return used(graph_module, [n for plan in plans for n in verify(graph_module, plan, structure)])


def attempt_conditional(seed: int) -> Counter[str]:
    """The same with units of one group chosen anew for each unit of another."""
    graph_module = graph_of(seed)
    structure = infer(graph_module)
    plan = conditional_plan(structure, seed)
    return used(graph_module, [] if plan is None else verify(graph_module, plan, structure))


def used(graph_module: fx.GraphModule, cut: list[str]) -> Counter[str]:
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    return Counter({operator_name(n) for n in nodes} if cut else ())


def attempt_all(one: Callable[[int], Counter[str]], seeds: Sequence[int]) -> Counter[str]:
    total: Counter[str] = Counter()
    for seed in seeds:
        try:
            total += one(seed)
        except Exception as error:
            error.add_note(f"seed {seed}:\n{graph_of(seed).graph}")
            raise
    return total


def seed_blocks() -> list[range]:
    first, _, last = os.environ.get("SLIMGRAPH_FUZZ", "0:2000").partition(":")
    return [range(s, min(s + BLOCK, int(last))) for s in range(int(first), int(last), BLOCK)]


def test_a_few_random_graphs_do_to_slices_what_the_terms_say() -> None:
    assert len(attempt_all(attempt, range(40))) > 30


def test_a_few_random_graphs_do_so_when_choices_depend_on_each_other() -> None:
    assert attempt_all(attempt_conditional, range(40))


@pytest.mark.slow
@pytest.mark.parametrize("one", [attempt, attempt_conditional])
@pytest.mark.parametrize("seeds", seed_blocks(), ids=lambda s: f"{s.start}-{s.stop - 1}")
def test_random_graphs_do_to_slices_what_the_terms_say(seeds: range, one: Callable[[int], Counter[str]]) -> None:
    tried = attempt_all(one, seeds)
    # Choices within a group are refused more often than not: a whole block may hold none that is allowed.
    assert tried or one is attempt_conditional or len(seeds) < BLOCK
