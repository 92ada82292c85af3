"""Recipes: lists of passes, as data. YAML in, YAML out; and the presets behind `--method`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from slimgraph.errors import PlanError, RecipeError
from slimgraph.order import check_order
from slimgraph.passes import (
    BiasOnly,
    CosineAllocation,
    FeatureSpace,
    Fluctuation,
    FluctuationAllocation,
    HarmAllocation,
    LeastSquares,
    Magnitude,
    NoRecovery,
    Pass,
    Pearson,
    RandomImportance,
    Regression,
    SelfCalibration,
    Sweep,
    Taylor,
    UniformAllocation,
    Verify,
    WandaSp,
    pass_named,
)

__all__ = ["METHODS", "Recipe", "default_method", "method", "recipe_for"]

METHODS = ("slimgraph", "slimllm", "magnitude", "wanda", "flap", "taylor", "random")


@dataclass(frozen=True)
class Recipe:
    """Passes in the order in which they run.

    >>> recipe = Recipe.from_yaml("passes: [{magnitude: {}}, {uniform_allocation: {ratio: 0.2}}]")
    >>> print(recipe.passes[1].ratio)
    0.2
    >>> Recipe.from_yaml(recipe.to_yaml()) == recipe
    True
    """

    passes: tuple[Pass, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: {"passes": [{name: fields}, ...]}."""
        return {"passes": [p.to_recipe() for p in self.passes]}

    def to_yaml(self) -> str:
        """The recipe as a YAML document."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Read what `to_dict` wrote.

        Raises:
            RecipeError: unknown pass, unknown field, or a value of the wrong type; the message names it.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("passes"), list):
            raise RecipeError("a recipe is a mapping with a list `passes`, like {passes: [{magnitude: {}}]}")
        unknown = data.keys() - {"passes", "notes"}  # notes: what a checkpoint says besides, not part of the recipe
        if unknown:
            raise RecipeError(f"unknown recipe key {min(map(str, unknown))!r}; expected `passes`")
        return cls(tuple(_read_pass(i, entry) for i, entry in enumerate(data["passes"], 1)))

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a YAML document; see `from_dict` for errors."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe is not YAML: {str(error).splitlines()[0]}") from error
        return cls.from_dict(data)

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """Read a YAML file; see `from_dict` for errors."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe {path}: {error}") from error
        try:
            return cls.from_yaml(text)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error


def method(
    name: str, ratio: float, *, recovery: str | None = None, heads: str = "auto", round_to: int = 8, seed: int = 0
) -> Recipe:
    """The recipe of a named method.

    Args:
        name: "slimgraph", the project's own: samples that the model writes itself beside the given ones, SlimLLM's
            scores, widths by measured harm, and full least squares. "slimllm", the published method in full; the others
            for comparison. "flap" ranks the units of all layers together and puts the mean of what goes into the bias.
            "taylor" needs gradients (see `slimgraph.passes.taylor` for what they cost), spares the first eighth and the
            last sixteenth of the layers as LLM-Pruner does, cuts the others alike and refits nothing. "magnitude",
            "wanda" and "random" cut all layers alike and refit nothing.
        ratio: share of all parameters that goes.
        recovery: recipe name of the recovery pass, "least_squares", "regression", "bias_only" or "no_recovery"; the
            method's own by default.
        heads: "kv", "balanced" or "auto".
        round_to: kept channels are a multiple of this, at sites that have more.
        seed: of random scores, and of the samples that "slimgraph" has the model write.

    Raises:
        RecipeError: there is no such method or recovery.
        PlanError: the ratio is not between 0 and 1.
    """
    if not 0 <= ratio < 1:
        raise PlanError(f"ratio is {ratio:g}; expected a share of all parameters, 0 <= ratio < 1")
    if name == "slimllm":
        allocation = CosineAllocation(ratio=ratio, heads=heads, round_to=round_to)
        return Recipe((Pearson(), FeatureSpace(), _recovery(recovery or "regression"), allocation, Sweep(), Verify()))
    if name == "slimgraph":
        harm = HarmAllocation(ratio=ratio, heads=heads, round_to=round_to)
        fit, sweep = _recovery(recovery or "least_squares"), Sweep(dtype="bfloat16")
        return Recipe((SelfCalibration(seed=seed), Pearson(), FeatureSpace(), fit, harm, sweep, Verify()))
    if name == "flap":
        ranked = FluctuationAllocation(ratio=ratio, heads=heads, round_to=round_to)
        return Recipe((Fluctuation(), _recovery(recovery or "bias_only"), ranked, Sweep(), Verify()))
    if name == "taylor":
        inner = UniformAllocation(ratio=ratio, heads=heads, round_to=round_to, spare_first=4 / 32, spare_last=2 / 32)
        return Recipe((Taylor(), _recovery(recovery or "no_recovery"), inner, Sweep(), Verify()))
    scores: dict[str, Pass] = {"magnitude": Magnitude(), "wanda": WandaSp(), "random": RandomImportance(seed=seed)}
    if name not in scores:
        raise RecipeError(f"no method is called {name!r}; there are {', '.join(METHODS)}")
    uniform = UniformAllocation(ratio=ratio, heads=heads, round_to=round_to)
    return Recipe((scores[name], _recovery(recovery or "no_recovery"), uniform, Sweep(), Verify()))


def default_method(writes: bool) -> str:
    """The method where none is asked for: "slimgraph", or "slimllm" for a model that cannot write text.

    Args:
        writes: whether the model is in memory as a whole and `generate.can_generate`.
    """
    return "slimgraph" if writes else "slimllm"


def recipe_for(recipe: Recipe | str, ratio: float, **options: Any) -> Recipe:
    """The recipe itself, or that of the method of this name; see `method` for the options.

    Raises:
        RecipeError: the passes of the recipe cannot work in their order; or there is no such method.
        PlanError: the ratio is not between 0 and 1.
    """
    if not isinstance(recipe, Recipe):
        return method(recipe, ratio, **options)
    check_order(recipe.passes)
    return recipe


def _recovery(name: str) -> Pass:
    passes: dict[str, Pass] = {p.name: p for p in (LeastSquares(), Regression(), BiasOnly(), NoRecovery())}
    if name not in passes:
        raise RecipeError(f"no recovery is called {name!r}; there are {', '.join(sorted(passes))}")
    return passes[name]


def _read_pass(place: int, entry: Any) -> Pass:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(f"pass {place} of the recipe: found {entry!r}, expected one name with its fields")
    ((name, fields),) = entry.items()
    cls = pass_named(str(name))
    adapter = TypeAdapter(with_config(ConfigDict(extra="forbid"))(cls))
    try:
        return adapter.validate_python({} if fields is None else fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "fields"
        known = ", ".join(f.name for f in dataclasses.fields(cls)) or "none"
        hint = f"; its fields are {known}" if first["type"] == "unexpected_keyword_argument" else ""
        raise RecipeError(
            f"pass {place} of the recipe, {name}: {where}: {first['msg']} (found {first['input']!r}){hint}"
        ) from error
