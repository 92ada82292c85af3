"""Recipes whose passes cannot work in their order are refused before anything runs, and no others are."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import pytest
from decoders import decoder, tokens
from torch import fx

import slimgraph
from slimgraph.errors import PlanError, RecipeError
from slimgraph.order import check_order
from slimgraph.passes import (
    ApplyPlan,
    CosineAllocation,
    HarmAllocation,
    Magnitude,
    NoRecovery,
    Pass,
    Regression,
    SelfCalibration,
    Sweep,
    UniformAllocation,
    Verify,
    pass_named,
    pass_names,
)
from slimgraph.pipeline import check_carried_out, run_passes
from slimgraph.recipe import METHODS, Recipe, method
from slimgraph.state import State, attach, state_of
from slimgraph.trace import trace

SHARE = UniformAllocation(ratio=0.1, round_to=1)

REFUSED: list[tuple[tuple[Pass, ...], str]] = [
    (
        (Sweep(),),
        "pass 1 of the recipe, sweep: nothing before it says how many units stay: put an allocation pass before it, "
        "like uniform_allocation",
    ),
    (
        (Magnitude(), SHARE, Sweep()),
        "pass 3 of the recipe, sweep: nothing before it says how to refit: put a recovery pass before it, like "
        "regression or no_recovery",
    ),
    (
        (Verify(), NoRecovery(), SHARE, Sweep()),
        "pass 4 of the recipe, sweep: nothing before it says which units stay: put an importance pass before it, like "
        "magnitude",
    ),
    (
        (SelfCalibration(), Magnitude(), HarmAllocation(ratio=0.1), Regression(), Sweep()),
        "pass 3 of the recipe, harm_allocation: nothing before it says how to refit: put a recovery pass before it, "
        "like regression or no_recovery",
    ),
    (
        (Magnitude(), SHARE, Regression(), Sweep()),
        "pass 3 of the recipe, regression: it stands between uniform_allocation and the sweep that carries out what "
        "was shared out; expected it before uniform_allocation, or after the sweep",
    ),
    (
        (Magnitude(), NoRecovery(), SHARE, Verify(), CosineAllocation(ratio=0.1), Sweep()),
        "pass 5 of the recipe, cosine_allocation: it stands between uniform_allocation and the sweep that carries out "
        "what was shared out; expected it before uniform_allocation, or after the sweep",
    ),
    (
        (Magnitude(), NoRecovery(), SHARE, Sweep(), Sweep()),
        "pass 5 of the recipe, sweep: nothing before it says how many units stay: put an allocation pass before it, "
        "like uniform_allocation",
    ),
    (
        (Magnitude(), NoRecovery(), SHARE, ApplyPlan({}), Verify()),
        "uniform_allocation of the recipe shares out a budget that nothing carries out; put a sweep after it",
    ),
]


@pytest.mark.parametrize(("passes", "message"), REFUSED)
def test_what_cannot_work_is_refused(passes: tuple[Pass, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        check_order(passes)


def test_it_is_refused_before_anything_runs() -> None:
    ran = []

    @dataclass(frozen=True)
    class Early(Verify):
        def run(self, graph_module: fx.GraphModule, state: State) -> None:
            ran.append(self)

    with pytest.raises(RecipeError, match=r"^pass 2 of the recipe, sweep: "):
        slimgraph.prune(decoder().model, tokens(2, 8), recipe=Recipe((Early(), Sweep())))
    assert not ran


def test_every_order_that_is_accepted_runs_and_no_other_does() -> None:
    """Orders of passes of four kinds, and what may follow a sweep: as said beforehand, so it happens."""
    kinds: tuple[Pass, ...] = (Magnitude(), NoRecovery(), SHARE, Sweep())
    few = [p for n in (1, 2) for p in itertools.product(kinds, repeat=n)]
    orders = [*few, *itertools.product(kinds, repeat=3), *itertools.permutations(kinds), *((*kinds, *p) for p in few)]
    dense = trace(decoder().model)
    accepted = 0
    for passes in orders:
        try:
            check_order(passes)
        except RecipeError:
            with pytest.raises(PlanError):
                _run(dense, passes)
            continue
        _run(dense, passes)
        accepted += 1
    assert accepted == 24


def _run(dense: fx.GraphModule, passes: tuple[Pass, ...]) -> None:
    graph = attach(fx.GraphModule(dense, dense.graph), State(batches=[tokens(2, 8)]))
    check_carried_out(state_of(run_passes(graph, passes)))


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_in_order(name: str) -> None:
    check_order(method(name, 0.2).passes)


def test_every_pass_says_what_it_gives() -> None:
    own = [n for n in pass_names() if pass_named(n).__module__.startswith("slimgraph.")]
    assert "sweep" in own
    assert [n for n in own if pass_named(n).gives is None] == []


def test_a_pass_that_does_not_say_may_give_anything() -> None:
    class Mine(Pass):
        """It could have recorded all that a sweep needs."""

    check_order([Mine(), Sweep()])
    check_order([Magnitude(), NoRecovery(), SHARE, Mine()])
    with pytest.raises(RecipeError, match=r"^pass 1 of the recipe, sweep: "):
        check_order([Sweep(), Mine()])
