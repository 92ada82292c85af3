"""Recipes: every pass as YAML and back, the presets, and what is no recipe."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgraph.errors import PlanError, RecipeError
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
    pass_names,
)
from slimgraph.recipe import METHODS, Recipe, method

ALLOCATION = {"ratio": 0.3, "unit_ratio": None, "heads": "kv", "round_to": 4, "kinds": "heads"}
CHANGED: dict[str, dict[str, Any]] = {
    "apply_plan": {"plan": {"a.weight[1]": {"units": 3, "keep": [[0, 2]], "within": None}, "layers.1": None}},
    "bias_only": {},
    "cosine_allocation": {**ALLOCATION, "alpha": 5.0, "layers": 3},
    "fluctuation": {},
    "fluctuation_allocation": ALLOCATION,
    "elimination": {"prior": 7.0, "steps": 3, "swaps": 5},
    "feature_space": {"directions": False, "activations": False, "sources": False, "keep_lowest": 0.01},
    "harm_allocation": {
        **ALLOCATION,
        "widths": (0.5,),
        "tokens": 64,
        "samples": 3,
        "power": 1.5,
        "together": False,
        "depth": True,
        "spare_last_heads": 0.5,
        "dtype": None,
        "of": "macs",
    },
    "least_squares": {"target": "dense", "prior": 7.0, "correction": 9.0},
    "magnitude": {},
    "no_recovery": {},
    "pearson": {"search": False},
    "random_importance": {"seed": 7},
    "regression": {},
    "self_calibration": {"samples": 5, "given": None, "temperature": 0.5, "dtype": None, "seed": 7},
    "sweep": {"dtype": "bfloat16"},
    "taylor": {"batch": 4},
    "uniform_allocation": {**ALLOCATION, "spare_first": 0.25, "spare_last": 0.125},
    "verify": {},
    "wanda_sp": {},
}
"""A value other than the default for every field of every pass."""


def own_passes() -> dict[str, type[Pass]]:
    """Passes of the package; doctests and other tests may have registered more."""
    found = {name: pass_named(name) for name in pass_names()}
    return {
        n: c for n, c in found.items() if c.__module__.startswith("slimgraph.passes.") and "base" not in c.__module__
    }


def test_every_pass_and_every_field_is_in_the_table() -> None:
    assert own_passes().keys() == CHANGED.keys()
    for name, cls in own_passes().items():
        assert {f.name for f in dataclasses.fields(cls)} == CHANGED[name].keys()
        for field in dataclasses.fields(cls):
            assert CHANGED[name][field.name] != field.default or field.name == "unit_ratio"


@pytest.mark.parametrize("name", CHANGED)
def test_a_pass_survives_yaml(name: str) -> None:
    one = pass_named(name)(**CHANGED[name])
    recipe = Recipe((one,))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in CHANGED[name].items()}
    assert recipe.to_dict() == {"passes": [{name: plain}]}
    again = Recipe.from_yaml(recipe.to_yaml()).passes[0]
    assert type(again) is type(one)
    assert {k: type(v) for k, v in vars(again).items()} == {k: type(v) for k, v in vars(one).items()}


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(CHANGED)), max_size=6))
def test_a_recipe_keeps_its_order(names: list[str]) -> None:
    recipe = Recipe(tuple(pass_named(n)(**CHANGED[n]) for n in names))
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert [p.name for p in again.passes] == names


def test_short_forms_are_read() -> None:
    recipe = Recipe.from_yaml(
        "passes: [pearson, {feature_space: {}}, {regression: null}, {uniform_allocation: {ratio: 0}}]"
    )
    assert recipe.passes == (Pearson(), FeatureSpace(), Regression(), UniformAllocation(ratio=0.0))


def test_notes_of_a_checkpoint_are_no_part_of_the_recipe() -> None:
    data = {"passes": ["sweep"], "notes": {"samples": 3}}
    assert Recipe.from_dict(data) == Recipe((Sweep(),))


# -- presets ----------------------------------------------------------------------------------------------------------

OPTIONS = {"heads": "kv", "round_to": 4}


def test_methods_are_these_recipes() -> None:
    cosine, uniform = CosineAllocation(ratio=0.2, **OPTIONS), UniformAllocation(ratio=0.2, **OPTIONS)
    inner = UniformAllocation(ratio=0.2, spare_first=0.125, spare_last=0.0625, **OPTIONS)
    harm = HarmAllocation(ratio=0.2, **OPTIONS)
    fit, low = LeastSquares(), Sweep(dtype="bfloat16")
    expected = {
        "slimgraph": (SelfCalibration(seed=5), Pearson(), FeatureSpace(), fit, harm, low, Verify()),
        "slimllm": (Pearson(), FeatureSpace(), Regression(), cosine, Sweep(), Verify()),
        "magnitude": (Magnitude(), NoRecovery(), uniform, Sweep(), Verify()),
        "wanda": (WandaSp(), NoRecovery(), uniform, Sweep(), Verify()),
        "flap": (Fluctuation(), BiasOnly(), FluctuationAllocation(ratio=0.2, **OPTIONS), Sweep(), Verify()),
        "taylor": (Taylor(), NoRecovery(), inner, Sweep(), Verify()),
        "random": (RandomImportance(seed=5), NoRecovery(), uniform, Sweep(), Verify()),
    }
    assert tuple(expected) == METHODS
    assert {name: method(name, 0.2, seed=5, **OPTIONS).passes for name in METHODS} == expected


def test_a_recovery_can_be_chosen() -> None:
    assert method("slimllm", 0.2, recovery="bias_only").passes[2] == BiasOnly()
    assert method("wanda", 0.2, recovery="regression").passes[1] == Regression()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"name": "best"},
            RecipeError,
            "no method is called 'best'; there are slimgraph, slimllm, magnitude, wanda, flap, taylor, random",
        ),
        (
            {"recovery": "hope"},
            RecipeError,
            "no recovery is called 'hope'; there are bias_only, least_squares, no_recovery, regression",
        ),
        ({"ratio": 1.0}, PlanError, "ratio is 1; expected a share of all parameters, 0 <= ratio < 1"),
        ({"ratio": -0.1}, PlanError, "ratio is -0.1; expected a share of all parameters, 0 <= ratio < 1"),
    ],
)
def test_an_impossible_method_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        method(**{"name": "slimllm", "ratio": 0.2, **arguments})


# -- what is no recipe ------------------------------------------------------------------------------------------------

NEITHER = "a recipe is a mapping with a list `passes`, like {passes: [{magnitude: {}}]}"

NO_RECIPES = [
    ("", NEITHER),
    ("3", NEITHER),
    ("[magnitude]", NEITHER),
    ("{}", NEITHER),
    ("passes: 3", NEITHER),
    ("{passes: [], speed: 3}", "unknown recipe key 'speed'; expected `passes`"),
    ("passes: [3]", "pass 1 of the recipe: found 3, expected one name with its fields"),
    (
        "passes: [sweep, {sweep: {}, verify: {}}]",
        "pass 2 of the recipe: found {'sweep': {}, 'verify': {}}, expected one name with its fields",
    ),
    ("passes: [{magic: {}}]", "no pass is called 'magic'; there are "),
    (
        "passes: [{pearson: {serch: true}}]",
        "pass 1 of the recipe, pearson: serch: Unexpected keyword argument (found True); its fields are search",
    ),
    (
        "passes: [sweep, {pearson: {search: 3}}]",
        "pass 2 of the recipe, pearson: search: Input should be a valid boolean, unable to interpret input (found 3)",
    ),
    (
        "passes: [{uniform_allocation: {ratio: much}}]",
        "pass 1 of the recipe, uniform_allocation: ratio: "
        "Input should be a valid number, unable to parse string as a number (found 'much')",
    ),
    ("passes: [{apply_plan: {}}]", "pass 1 of the recipe, apply_plan: plan: Field required"),
    ("passes: [{uniform_allocation: {}}]", "uniform_allocation: give either ratio or unit_ratio; found None and None"),
    (
        "passes: [{cosine_allocation: {ratio: 0.2, unit_ratio: 0.2}}]",
        "cosine_allocation: give either ratio or unit_ratio; found 0.2 and 0.2",
    ),
    (
        "passes: [{uniform_allocation: {ratio: 0.2, kinds: all}}]",
        "uniform_allocation: kinds is 'all'; expected both, heads or channels",
    ),
    (
        "passes: [{uniform_allocation: {ratio: 0.2, round_to: 0}}]",
        "uniform_allocation: round_to is 0; expected at least 1",
    ),
    ("passes: [", "the recipe is not YAML: "),
    ("passes: !!python/object:os.system []", "the recipe is not YAML: "),
    ("passes: magnitude", NEITHER),
    ("passes: [{sweep: [1]}]", "pass 1 of the recipe, sweep: "),
    ("passes: [{verify: false}]", "pass 1 of the recipe, verify: "),
    ("passes: [sweep, {elimination: 0}]", "pass 2 of the recipe, elimination: "),
]


@pytest.mark.parametrize(("text", "message"), NO_RECIPES)
def test_what_is_no_recipe_is_refused_with(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert str(caught.value).startswith(message)


def test_a_file_is_read(tmp_path: Path) -> None:
    recipe = method("slimllm", 0.2)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_file(path) == recipe


def test_errors_of_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=rf"^cannot read recipe {re.escape(str(path))}: "):
        Recipe.from_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=rf"^cannot read recipe {re.escape(str(path))}: "):
        Recipe.from_file(path)
    path.write_text(yaml.safe_dump({"passes": ["magic"]}), encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"^{re.escape(str(path))}: no pass is called 'magic'"):
        Recipe.from_file(path)
