"""Whether passes stand in an order that can work: told from what each says of itself, before any of them runs."""

from __future__ import annotations

from collections.abc import Sequence

from slimgraph.errors import RecipeError
from slimgraph.passes import Pass

__all__ = ["check_order"]

_LACKING = {
    "choice": "which units stay: put an importance pass before it, like magnitude",
    "fit": "how to refit: put a recovery pass before it, like regression or no_recovery",
    "budget": "how many units stay: put an allocation pass before it, like uniform_allocation",
}


def check_order(passes: Sequence[Pass]) -> None:
    """Refuse passes of which one would find that another is missing, or would undo what another shared out.

    What passes do not say of themselves (`Pass.gives` is None) may be anything; it is then seen as they run.

    >>> from slimgraph.passes import Magnitude, Sweep, UniformAllocation
    >>> check_order([Magnitude(), UniformAllocation(ratio=0.2), Sweep()])
    Traceback (most recent call last):
    slimgraph.errors.RecipeError: pass 3 of the recipe, sweep: nothing before it says how to refit: ...

    Raises:
        RecipeError: likewise; the message says where, and what to do.
    """
    given: set[str] = set()
    shared: str | None = None  # the allocation that no sweep has carried out so far
    for place, step in enumerate(passes, 1):
        where = f"pass {place} of the recipe, {step.name}"
        lacking = [need for need in step.needs if need not in given]
        if lacking:
            raise RecipeError(f"{where}: nothing before it says {_LACKING[lacking[0]]}")
        if shared is not None and step.gives in ("fit", "budget"):
            raise RecipeError(
                f"{where}: it stands between {shared} and the sweep that carries out what was shared out; expected it "
                f"before {shared}, or after the sweep"
            )
        if step.gives is None:
            given, shared = set(_LACKING), None
        elif step.gives == "cut":
            given, shared = given - {"budget"}, None
        else:
            given |= {step.gives}
            shared = step.name if step.gives == "budget" else shared
    if shared is not None:
        raise RecipeError(f"{shared} of the recipe shares out a budget that nothing carries out; put a sweep after it")
