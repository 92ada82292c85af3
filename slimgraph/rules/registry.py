"""The registry of axis rules, and what a rule sees.

A rule says for one ATen operator how the terms of its output follow from the terms of its inputs, and which terms must
be equal. It receives the operator's arguments with every tensor replaced by its
`Dims` (one term per dimension) and every symbolic size by a number, and a `Context` to unify, cut and freeze with.

Registering a rule from outside the package takes a few lines:

>>> from slimgraph.rules import rule
>>> @rule("mylib.scaled_gate", golden="(* n), (* n) -> (* n)")
... def scaled_gate(cx, x, gate):
...     return cx.broadcast(x, gate)

An operator without a rule freezes whatever flows through it, with the operator's name as the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.axes import DATA, ONE, Axes, Term, size
from slimgraph.errors import GraphError

__all__ = [
    "Choice",
    "Context",
    "Contraction",
    "Dims",
    "NotCoveredError",
    "Resize",
    "Rule",
    "SizeOf",
    "find_rule",
    "operator_name",
    "rule",
    "rules",
]

Dims = tuple[Term, ...]
SizeOf = Callable[[Term], int]
Resize = Callable[[fx.Node, "Resizing"], None]


class NotCoveredError(Exception):
    """What a rule raises, before it notes or unifies anything, for a use of its operator that it does not cover.

    The node is then treated as one without a rule: what flows through it is frozen, with this message.
    """


@dataclass(frozen=True)
class Rule:
    """The axis rule of one operator.

    Attributes:
        apply: called with a `Context` and the operator's arguments; returns the output's dims, or a list of dims for an
            operator with several outputs.
        golden: the rule in one line, for people: letters are axes, `*` any number of leading axes.
        resize: rewrites the node's size arguments after axes were cut; None when the operator has none.
    """

    apply: Callable[..., Any]
    golden: str
    resize: Resize | None = None


@dataclass(frozen=True)
class Contraction:
    """A node sums over an axis that two of its inputs share.

    Attributes:
        node: the contracting node.
        left, right: the nodes it reads; by convention `right` is the weight when there is one.
        term: the axis that is summed away.
        left_dim, right_dim: where that axis lies in `left` and in `right`.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    term: Term
    left_dim: int
    right_dim: int


@dataclass(frozen=True)
class Choice:
    """A node chooses among the positions of an axis: a softmax or a ranking.

    What is cut can no longer be chosen, as if it came in as minus infinity.

    Attributes:
        node: the choosing node.
        source: the node it reads.
        dim: where the axis lies in `source`.
        term: the axis.
        at_least: number of positions that must stay for the node to work.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    term: Term
    at_least: int


@dataclass(frozen=True)
class Resizing:
    """What a `resize` function may ask: the terms of a node, and the new size of a term."""

    dims: Callable[[Any], Any]
    size_of: SizeOf
    axes: Axes


_SMALL = 64  # elements; constants written into code are that small

_RULES: dict[str, Rule] = {}


def rule(
    *operators: str, golden: str, resize: Resize | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an axis rule for operators, named like `aten.linear.default`, or `aten.linear` for all overloads."""

    def register(apply: Callable[..., Any]) -> Callable[..., Any]:
        for name in operators:
            _RULES[name] = Rule(apply, golden, resize)
        return apply

    return register


def rules() -> dict[str, Rule]:
    """All registered rules by operator name."""
    return dict(_RULES)


def operator_name(node: fx.Node) -> str:
    """`aten.linear.default` for an operator overload, the qualified Python name for anything else."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target is operator.getitem:
        return "getitem"
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}".strip(".")


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of the node's operator: of its overload, else of all overloads, else of pointwise operators."""
    name = operator_name(node)
    packet = name.rpartition(".")[0]
    found = _RULES.get(name) or _RULES.get(packet)
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _RULES["pointwise"]
    return found


@dataclass
class Context:
    """What a rule may do at one node.

    Attributes:
        axes: the algebra.
        node: the node that is being analysed.
        shapes: sizes of the node's output, or of each of its outputs.
        symbolic: for each size in `shapes`, whether it is a batch or sequence size.
        moving: nodes whose value depends on the model's input.
        contractions, statistics, heads, created, choices, ranges: what rules note down; see the methods below.
    """

    axes: Axes
    node: fx.Node
    shapes: list[tuple[int, ...]]
    symbolic: list[tuple[bool, ...]]
    moving: set[fx.Node]
    contractions: list[Contraction]
    statistics: list[tuple[fx.Node, Term]]
    heads: list[Term]
    created: dict[fx.Node, Dims]
    choices: list[Choice]
    ranges: dict[tuple[fx.Node, int], Term]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the node's only (or first) output."""
        return self.shapes[0]

    def fresh(self, dim: int, label: str, output: int = 0) -> Term:
        """A new axis for a dimension of the output; batch and sequence sizes are frozen."""
        n = self.shapes[output][dim]
        if self.symbolic[output][dim]:
            return self.axes.atom(n, "data", DATA)
        return self.axes.atom(n, label)

    def frozen(self, dim: int, reason: str, output: int = 0) -> Term:
        """A new axis for a dimension of the output that must not be cut."""
        term = self.fresh(dim, "fixed", output)
        self.axes.freeze(term, reason)
        return term

    def freeze(self, term: Term, reason: str) -> None:
        """Forbid cutting an axis, saying at which node and why."""
        self.axes.freeze(term, f"{reason} ({operator_name(self.node)} at {self.node.name})")

    def unify(self, first: Term, second: Term) -> None:
        """Say that two axes are the same."""
        self.axes.unify(first, second)

    def broadcast(self, *tensors: Dims) -> Dims:
        """Dims of an elementwise operation: aligned from the right, size 1 stretches, the rest is unified."""
        rank = max((len(t) for t in tensors), default=0)
        result: list[Term] = []
        for i in range(-rank, 0):
            terms = [t[i] for t in tensors if len(t) >= -i and size(t[i]) != 1]
            for other in terms[1:]:
                self.unify(terms[0], other)
            result.append(self.axes.find(terms[0]) if terms else ONE)
        return tuple(result)

    def contract(self, left: Dims, right: Dims, dims: tuple[int, int], arguments: tuple[int, int] = (0, 1)) -> None:
        """Unify two axes that are summed over, and remember the contraction.

        Args:
            left: terms of the one tensor.
            right: terms of the other.
            dims: which dimension of each is summed over.
            arguments: which arguments of the operator the two tensors are.
        """
        left_dim, right_dim = dims[0] % len(left), dims[1] % len(right)
        self.unify(left[left_dim], right[right_dim])
        a, b = (self.argument(i) for i in arguments)
        self.contractions.append(Contraction(self.node, a, b, left[left_dim], left_dim, right_dim))

    def argument(self, index: int) -> fx.Node:
        """The node that is the operator's index-th argument."""
        value = self.node.args[index]
        if not isinstance(value, fx.Node):
            raise GraphError(f"{self.node.name}: argument {index} of {operator_name(self.node)} is not a tensor")
        return value

    def batch_of_activations(self, terms: Sequence[Term], left_arg: int, right_arg: int) -> None:
        """Note axes over which two activations are multiplied separately: this is what makes an axis one of heads."""
        if {self.argument(left_arg), self.argument(right_arg)} <= self.moving:
            self.heads.extend(t for t in terms if size(t) > 1)

    def statistic(self, term: Term) -> None:
        """Note an axis over which a mean, variance or sum is taken: cutting it changes the statistic."""
        self.statistics.append((self.node, term))

    def choose(self, x: Dims, dim: int, at_least: int = 1) -> None:
        """Note that the node chooses among the positions of a dimension of its first argument."""
        dim %= len(x)
        self.choices.append(Choice(self.node, self.argument(0), dim, x[dim], at_least))

    def range_over(self, term: Term, output: int = 0) -> None:
        """Say that the integers in an output are positions of an axis."""
        self.ranges[self.node, output] = term

    def range_of(self, node: object) -> Term | None:
        """The axis whose positions the integers of a node are, if that is known."""
        return self.ranges.get((node, 0)) if isinstance(node, fx.Node) else None

    def looked_up(self, term: Term, index: object, how: str) -> None:
        """Positions of an axis are read by an index: by one that ranges over this axis, or else the axis is fixed."""
        over = self.range_of(index)
        if over is not None and size(over) == size(term):
            self.unify(term, over)
            return
        self.freeze(term, how)
        if over is not None:
            self.freeze(over, how)

    def constant(self, node: object) -> Tensor | None:
        """The value of a small tensor that was written into the model's code, if it can be known."""
        while isinstance(node, fx.Node) and node.op == "call_function" and node not in self.moving:
            if operator_name(node).split(".")[1:2] not in (["clone"], ["to"], ["lift_fresh_copy"], ["detach"]):
                return None
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "get_attr" or node.graph.owning_module is None:
            return None
        path, _, leaf = str(node.target).rpartition(".")
        value = getattr(node.graph.owning_module.get_submodule(path), leaf)
        known = isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and not value.is_meta
        return value if known and value.numel() <= _SMALL else None

    def create(self, dims: Dims) -> Dims:
        """Note a tensor that the graph makes itself; its axes are cut like those of a parameter."""
        self.created[self.node] = dims
        return dims

    def reason(self, term: Term) -> str:
        """Why a term is frozen."""
        return next((a.frozen for a in self.axes.atoms(term) if a.frozen), "frozen")
