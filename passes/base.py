"""What all passes have in common: a name for recipes, fields as keys, and the `torch.fx` calling convention."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from slimgraph.errors import RecipeError
from slimgraph.products import faster_in
from slimgraph.state import State, state_of

__all__ = ["Pass", "check_dtype", "dtype_for", "pass_named", "pass_names", "register"]

_DTYPES = {None: None, "bfloat16": torch.bfloat16}
_PASSES: dict[str, type[Pass]] = {}

P = TypeVar("P", bound="type[Pass]")


@dataclasses.dataclass(frozen=True)
class Pass:
    """A step of a recipe.

    Subclasses are frozen dataclasses that implement `run`.

    Attributes:
        name: in recipes.
        gives: what it leaves for passes after it: "choice" (which units stay), "fit", "budget", "cut" (one that carries
            a budget out), or "" for nothing that others ask for. None where that is not said.
        needs: which of the first three it asks for; `slimgraph.order.check_order` looks before anything runs.
    """

    name: ClassVar[str] = ""
    gives: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run on a graph module that carries a state.

        Raises:
            PlanError: the graph module carries no state.
        """
        state = state_of(graph_module)
        result = self.run(graph_module, state)
        state.history.append(self.to_recipe())
        return PassResult(graph_module if result is None else result, result is not None)

    def run(self, graph_module: fx.GraphModule, state: State) -> fx.GraphModule | None:
        """Do the work; return a new graph module, or None when the graph stays as it is."""
        raise NotImplementedError

    def to_recipe(self) -> dict[str, Any]:
        """The recipe entry: {name: fields}."""
        fields = dataclasses.asdict(self)
        return {self.name: {key: _plain(value) for key, value in fields.items()}}


def _plain(value: Any) -> Any:
    """As JSON can hold it, and a recipe takes it back."""
    if isinstance(value, tuple):
        return list(value)
    return "inf" if isinstance(value, float) and value == math.inf else value


def register(cls: P) -> P:
    """Class decorator: make a pass known to recipes, under its class name in snake case.

    >>> @register
    ... @dataclasses.dataclass(frozen=True)
    ... class NothingAtAll(Pass):
    ...     def run(self, graph_module, state):
    ...         return None
    >>> pass_named("nothing_at_all")().to_recipe()
    {'nothing_at_all': {}}
    """
    cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    _PASSES[cls.name] = cls
    return cls


def pass_named(name: str) -> type[Pass]:
    """The pass class of that recipe name.

    Raises:
        RecipeError: there is none.
    """
    if name not in _PASSES:
        raise RecipeError(f"no pass is called {name!r}; there are {', '.join(pass_names())}")
    return _PASSES[name]


def pass_names() -> list[str]:
    """Recipe names of all passes."""
    return sorted(_PASSES)


def check_dtype(name: str, dtype: str | None) -> None:
    """Refuse a dtype that a pass could not run the model in.

    Raises:
        RecipeError: it is neither "bfloat16" nor None.
    """
    if dtype not in _DTYPES:
        raise RecipeError(f"{name}: dtype is {dtype!r}; expected bfloat16 or null")


def dtype_for(dtype: str | None, state: State) -> torch.dtype | None:
    """The dtype of that recipe value; None where products take no less time in it: it would cost digits only."""
    found = _DTYPES[dtype]
    if found is None or not state.batches:
        return None
    # Processes measure by themselves, and have to decide alike.
    votes, processes = state.combine(
        torch.tensor([float(faster_in(found, state.batches[0].device)), 1.0], dtype=torch.float64)
    )
    return found if 2 * votes > processes else None
