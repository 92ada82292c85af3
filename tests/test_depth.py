"""Skipped layers: the same as a layer whose output is its input, in graph, module and checkpoint, from the plan on."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import FeedForward, Toy, decoder, logits, make, tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import slimgraph
from slimgraph import checkpoint, harm, hf
from slimgraph.budget import Goal, Skip, solve_curves
from slimgraph.cost import macs
from slimgraph.debug import bisect, diff, verify
from slimgraph.debug.report import layers_of
from slimgraph.depth import SkippedLayer, outputs_of, skip_layers, skippable, without_layers
from slimgraph.errors import CheckpointError, ModelError, PlanError
from slimgraph.groups import infer
from slimgraph.manifest import Manifest
from slimgraph.passes import (
    ApplyPlan,
    FeatureSpace,
    HarmAllocation,
    Magnitude,
    NoRecovery,
    Pearson,
    Regression,
    Sweep,
    UniformAllocation,
)
from slimgraph.plan import Cut, Plan, resolve
from slimgraph.recipe import Recipe, method
from slimgraph.state import KEY, State, attach
from slimgraph.streaming import prune_checkpoint
from slimgraph.surgery import assign
from slimgraph.trace import tensor_at, trace
from slimgraph.units import parameter_count, units_of

IDS = tokens(4, 9, seed=5)
DEEP: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "gpt_neox": {"num_hidden_layers": 4},
    "gemma3": {"num_hidden_layers": 4},
    "phi3": {"num_hidden_layers": 4},
}
every_family = pytest.mark.parametrize("family", DEEP)
every_choice = pytest.mark.parametrize("skipped", [(1,), (3,), (1, 2), (3, 1)])


@contextlib.contextmanager
def handed_on(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """The layers return what they are given, by hooks."""

    def hand_on(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        value = args[0] if args else kwargs["hidden_states"]
        return value if isinstance(output, Tensor) else (value, *output[1:])

    hooks = [model.get_submodule(p).register_forward_hook(hand_on, with_kwargs=True) for p in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- the graph and the module -----------------------------------------------------------------------------------------


@every_family
@every_choice
def test_a_skipped_layer_hands_on_what_it_is_given(family: str, skipped: tuple[int, ...]) -> None:
    made = decoder(family, **DEEP[family])
    paths = [made.structure.layers[i] for i in skipped]
    before = logits(made.graph, IDS)
    shorter = skip_layers(made.structure, paths)
    with handed_on(made.model, paths):
        expected = logits(made.model, IDS)
    torch.testing.assert_close(logits(shorter, IDS), expected)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(logits(made.graph, IDS), before)
    assert infer(shorter).layers == [p for p in made.structure.layers if p not in paths]
    module = without_layers(made.model, outputs_of(made.model, paths, IDS))
    torch.testing.assert_close(logits(module, IDS), expected)
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in shorter.named_parameters()}
    assert all(p is made.model.get_parameter(n) for n, p in module.named_parameters())
    assert not any(isinstance(m, SkippedLayer) for m in made.model.modules())


class Tupled(FeedForward):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None, None


class Stack(Toy):
    """Layers that return tuples, and add their input themselves."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.out(x)


def test_a_tuple_stays_a_tuple() -> None:
    model = Stack(Tupled(), Tupled())
    assert outputs_of(model, ["layers.0", "layers.1"], IDS) == {"layers.0": 3, "layers.1": 3}
    stand_in = SkippedLayer(Tupled(), 3)
    assert stand_in("x") == stand_in(x="x") == ("x", None, None)
    assert SkippedLayer(Tupled(), 0)("x") == "x"


def test_plain_attributes_of_a_layer_stay() -> None:
    layer = FeedForward()
    layer.attention_type, layer.scale, layer.table = "sliding", 0.5, [1]  # type: ignore[assignment]
    stand_in = SkippedLayer(layer, 0)
    assert (stand_in.attention_type, stand_in.scale) == ("sliding", 0.5)
    assert not hasattr(stand_in, "table")
    assert list(stand_in.parameters()) == []


class Lender(FeedForward):
    """Adds to the residual stream, what another layer lent it as well, and lends what it computed inside."""

    def forward(self, x: Tensor, lent: Tensor | None = None) -> Any:
        inner = self.up(x).relu()
        return x + self.down(inner if lent is None else inner + lent), inner


class Lending(Toy):
    def forward(self, input_ids: Tensor) -> Tensor:
        x, lent = self.embedding(input_ids), None
        for i, layer in enumerate(self.layers):
            x, inner = layer(x, lent if i == 3 else None)
            lent = inner if i == 1 else lent
        return self.out(x)


NO_LAYERS = [
    (
        ["model.layers.9"],
        r"^no layer is called 'model\.layers\.9'; expected one of model\.layers\.0, ",
    ),
    (
        ["model.layers.2", "model.layers.0"],
        r"^layer model\.layers\.0 is the first one that reads ",
    ),
]


@pytest.mark.parametrize(("layers", "message"), NO_LAYERS)
def test_what_is_no_layer_that_can_go_is_refused(layers: list[str], message: str) -> None:
    made = decoder("llama", **DEEP["llama"])
    with pytest.raises(PlanError, match=message):
        skip_layers(made.structure, layers)
    with pytest.raises(PlanError, match=message):
        resolve(made.structure, Plan(skipped=tuple(layers)))
    assert skippable(made.structure, made.structure.layers).keys() == set(made.structure.layers[1:])


def test_a_layer_that_lends_what_it_computes_stays() -> None:
    structure = infer(trace(Lending(*(Lender() for _ in range(5)))))
    with pytest.raises(PlanError, match=r"^layer layers\.1 cannot be skipped: \w+ reads \w+, which is computed "):
        skip_layers(structure, ["layers.1"])
    assert skippable(structure, structure.layers).keys() == {"layers.2", "layers.3", "layers.4"}


def test_a_layer_whose_weights_are_read_elsewhere_stays() -> None:
    model = make("llama", **DEEP["llama"])
    shared = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assign(model, "model.layers.3.mlp.down_proj.weight", shared)
    with pytest.raises(PlanError, match=r"linear\w* reads its model\.layers\.1\.mlp\.down_proj\.weight; expected "):
        skip_layers(infer(trace(model)), ["model.layers.1"])


def test_a_layer_that_others_add_to_the_stream_stays() -> None:
    """x + layer(x) without the layer is not x + x."""
    structure = infer(trace(Toy(FeedForward(), FeedForward(), FeedForward())))
    with pytest.raises(PlanError, match=r"^layer layers\.1 cannot be skipped: add\w* outside of it reads its "):
        skip_layers(structure, ["layers.1"])


KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("kinds", [[*KINDS, *KINDS, *KINDS], [*KINDS[::-1], *KINDS[::-1], *KINDS]])
def test_the_first_layer_of_each_kind_stays(kinds: list[str]) -> None:
    """Its cache says how long the masks of its kind have to be; with all others gone a cache changes nothing."""
    model: Any = make("gemma3", num_hidden_layers=6, layer_types=kinds, sliding_window=5)
    structure = infer(trace(model))
    left = {path for path in structure.layers if path not in skippable(structure, structure.layers)}
    assert left == {"model.layers.0", "model.layers.1"}
    shorter: Any = without_layers(model, dict.fromkeys(structure.layers[2:], 0))
    expected = logits(shorter, IDS)
    cache, found = None, []
    for piece in IDS.split([4, 1, 3, 1], 1):
        with torch.no_grad():
            out = shorter(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected)


def test_a_layer_that_returns_neither_tensor_nor_tuple_has_no_stand_in() -> None:
    class Named(FeedForward):
        def forward(self, x: Tensor) -> Any:
            return {"hidden": super().forward(x)}

    class Reading(Toy):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = x + layer(x)["hidden"]
            return self.out(x)

    with pytest.raises(ModelError, match=r"^layer layers\.1 returns dict; expected a tensor or a tuple that begins "):
        outputs_of(Reading(Named(), Named()), ["layers.1"], IDS)


# -- plans and checkpoints --------------------------------------------------------------------------------------------


def applied(model: nn.Module, plan: dict[str, Any]) -> slimgraph.pipeline.Result:
    return slimgraph.prune(model, IDS, recipe=Recipe((ApplyPlan(plan),)), verify=True)


@every_family
def test_a_plan_that_skips_and_cuts_makes_a_checkpoint(family: str, tmp_path: Path) -> None:
    """As any other: it loads, its checks pass, and a cache of keys and values has no holes."""
    dense = make(family, **DEEP[family])
    structure = infer(trace(dense))
    site = next(s for s in structure.prunable_sites() if s.layer == 2 and s.kind == "channels")
    plan = Plan({site.groups[0]: Cut(20, ((0, *range(3, 20)),))}, (structure.layers[1], structure.layers[3]))
    result = applied(dense, plan.to_dict())
    assert result.plan == plan
    assert result.model is not None
    assert result.difference == pytest.approx(0, abs=1e-12)
    masked = copy.deepcopy(dense)
    tensor_at(masked, site.parameter).detach().index_fill_(site.in_dim, torch.tensor([1, 2]), 0.0)
    with handed_on(masked, list(plan.skipped)):
        torch.testing.assert_close(logits(result.model, IDS), logits(masked, IDS))
    assert [each.channels for each in layers_of(result)] == [(20, 20), (20, 0), (20, 18), (20, 0)]
    widths = result.manifest().per_layer_config  # by the layer's own number
    assert widths.keys() == {2} if family == "llama" else widths.keys() <= {2}
    result.save(tmp_path / "pruned")
    loaded = checkpoint.load(tmp_path / "pruned")
    # A dtype of buffers that is not the weights' is not kept by loading.
    torch.testing.assert_close(logits(loaded, IDS), logits(result.model, IDS), rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in loaded.parameters()) == result.parameters_after < result.parameters_before
    found = {c.name: c for c in verify(tmp_path / "pruned", against=dense).checks}
    assert [c for c in found.values() if c.passed is False] == []
    assert found["masked equivalence"].passed
    assert found["cache"].passed
    assert found["plan"].detail == "1 groups cut, 2 layers skipped, all shapes follow"


def test_a_model_can_be_pruned_again_where_layers_are_skipped(tmp_path: Path) -> None:
    """What was cut in a layer is forgotten once the layer goes; what was skipped stays so."""
    dense = make("llama", **DEEP["llama"])
    down = "model.layers.{}.mlp.down_proj.weight[1]"
    cuts = {down.format(i): {"units": 20, "keep": [list(range(15 - i))], "within": None} for i in (1, 2)}
    once = applied(dense, {**cuts, "model.layers.3": None})
    once.save(tmp_path / "once")
    shorter = checkpoint.load(tmp_path / "once")
    twice = applied(shorter, {"model.layers.1": None})
    twice.save(tmp_path / "twice")
    found = checkpoint.load(tmp_path / "twice")
    assert twice.model is not None
    assert logits(found, IDS).equal(logits(twice.model, IDS))
    manifest = checkpoint.load_manifest(tmp_path / "twice")
    assert manifest is not None
    assert manifest.skipped == {"model.layers.1": 0, "model.layers.3": 0}
    assert manifest.per_layer_config == {2: {"intermediate_size": 13}}
    with handed_on(dense, ["model.layers.3", "model.layers.1"]):
        again = applied(dense, {down.format(2): cuts[down.format(2)]})
        assert again.model is not None
        with handed_on(again.model, ["model.layers.3", "model.layers.1"]):
            torch.testing.assert_close(logits(found, IDS), logits(again.model, IDS))


def test_what_is_cut_is_forgotten_when_its_layer_goes() -> None:
    cut = {"model.layers.1.mlp.down_proj.weight[1]": Cut(20, ((0, 1),))}
    assert Plan(cut).merged(Plan(skipped=("model.layers.1",))) == Plan(skipped=("model.layers.1",))
    assert Plan(cut).merged(Plan(skipped=("model.layers.10",))).cuts == cut
    with pytest.raises(PlanError, match=r"^group 'model\.layers\.1\.mlp\.\S+' lies in model\.layers\.1, which the "):
        resolve(decoder("llama").structure, Plan(cut, ("model.layers.1",)))


def test_depth_after_another_cut_counts_what_is_left() -> None:
    model = idle("llama", "model.layers.2", "self_attn.o_proj.weight", "mlp.down_proj.weight")
    scores = (Pearson(), FeatureSpace(), Regression())
    first = UniformAllocation(ratio=0.1, round_to=1, kinds="heads")
    then = HarmAllocation(ratio=0.25, round_to=1, depth=True, dtype=None, kinds="channels")
    result = slimgraph.prune(model, IDS, recipe=Recipe((*scores, first, Sweep(), then, Sweep())), verify=False)
    assert result.plan.skipped == ("model.layers.2",)
    assert result.budget is not None
    assert result.budget.parameters_after == result.parameters_after
    assert result.parameters_after / result.parameters_before == pytest.approx(0.9 * 0.75, abs=0.02)
    with pytest.raises(PlanError, match=r"^uniform_allocation: an earlier pass skips model\.layers\.1; expected all "):
        slimgraph.prune(model, IDS, recipe=Recipe((ApplyPlan({"model.layers.1": None}), *scores, first, Sweep())))


def test_a_manifest_names_nothing_in_a_skipped_layer() -> None:
    entries: dict[str, Any] = {**Manifest.empty().to_dict(), "skipped": {"layers.1": 0}}
    Manifest.from_dict({**entries, "added": {"layers.10.bias": [3]}})
    message = r"manifest names 'layers\.1\.up\.bias' in the layer 'layers\.1', which is skipped, expected "
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_dict({**entries, "added": {"layers.1.up.bias": [3]}})


def test_a_manifest_that_skips_what_is_not_there_is_refused() -> None:
    model: Any = make("llama")
    with pytest.raises(CheckpointError, match=r"^the manifest names the module 'model\.layers\.7', LlamaForCausalLM "):
        hf.apply(model, Manifest.from_dict({**Manifest.empty().to_dict(), "skipped": {"model.layers.7": 0}}))


def test_a_skipped_layer_is_seen_by_those_who_compare() -> None:
    dense = make("llama", **DEEP["llama"])
    result = applied(dense, {"model.layers.2": None})
    assert result.model is not None
    hf.attach(result.model, result.manifest())
    found = diff(dense, result.model)
    assert [each.units["channels"] for each in found.layers] == [(20, 20), (20, 20), (20, 0), (20, 20)]
    assert "0 parameters reshaped, 9 gone, 0 biases added" in repr(found)
    assert found.views == ()
    assert diff(result.model, result.model).views == ()
    kv = {"model.layers.3.self_attn.o_proj.weight[1].0": {"units": 3, "keep": [[0, 2]], "within": None}}
    both = applied(dense, {**kv, "model.layers.1": None})
    assert both.model is not None
    hf.attach(both.model, both.manifest())
    assert {view.module for view in diff(dense, both.model).views} == {"model.layers.3.self_attn"}
    seen = bisect(dense, result.model, tokens(64), seq_len=16)
    assert [each.path for each in seen.layers] == [f"model.layers.{i}" for i in (0, 1, 3)]
    assert max(each.error for each in seen.layers) == pytest.approx(0, abs=1e-12)


def test_a_streamed_model_skips_nothing(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    recipe = Recipe((ApplyPlan({"model.layers.1": None}),))
    with pytest.raises(PlanError, match=r"^a streamed model cannot skip layers; found model\.layers\.1 in the plan: "):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out", IDS, recipe=recipe)


def test_a_model_that_skips_layers_is_streamed_as_any_other(tmp_path: Path) -> None:
    skipped = applied(make("llama", **DEEP["llama"]).float(), {"model.layers.2": None})
    skipped.save(tmp_path / "skipped")
    recipe = method("magnitude", 0.2, round_to=1)
    expected = slimgraph.prune(checkpoint.load(tmp_path / "skipped"), IDS, recipe=recipe)
    assert expected.model is not None
    prune_checkpoint(tmp_path / "skipped", tmp_path / "out", IDS, recipe=recipe, dtype=torch.float32)
    found = checkpoint.load(tmp_path / "out")
    torch.testing.assert_close(logits(found, IDS), logits(expected.model, IDS))
    assert isinstance(found.get_submodule("model.layers.2"), SkippedLayer)


# -- harm and budget --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_harm_of_a_layer_is_what_its_absence_does(family: str) -> None:
    made = decoder(family, **DEEP[family])
    paths = made.structure.layers[1:]
    found = harm.measure(made.structure, [IDS], [], {}, lambda *_: None, tokens=99, power=1.5, layers=paths)  # type: ignore[arg-type, return-value]
    assert found.keys() == set(paths)
    for path in paths:
        dense = torch.distributions.Categorical(logits=logits(made.model, IDS)[:, ::4])
        with handed_on(made.model, [path]):
            cut = torch.distributions.Categorical(logits=logits(made.model, IDS)[:, ::4])
        expected = torch.distributions.kl_divergence(dense, cut).pow(1.5).mean().pow(1 / 1.5)
        assert found[path] == {0: pytest.approx(float(expected), rel=1e-4)}


@functools.cache
def goal_of() -> Goal:
    structure = decoder("llama").structure
    units = [units_of(structure, s) for s in structure.prunable_sites()]
    sizes = {n: p.numel() for n, p in structure.analysis.graph_module.named_parameters()}
    return Goal(structure, units, {0: 1.0, 1: 1.0}, sizes, {}, round_to=4)


def left_by(keep: Mapping[str, int], skipped: tuple[str, ...]) -> int:
    """Parameters that stay."""
    return _left(tuple(keep[u.site.name] for u in goal_of().sites), skipped)


@functools.cache
def _left(widths: tuple[int, ...], skipped: tuple[str, ...]) -> int:
    goal = goal_of()
    cut = zip(goal.sites, widths, strict=True)
    kept = {u.group: width for u, width in cut if _path(goal, u.site.layer) not in skipped}
    sizes = {n: size for n, size in goal.sizes.items() if not n.startswith(tuple(f"{p}." for p in skipped))}
    return parameter_count(goal.structure, kept, sizes)


def _path(goal: Goal, layer: int | None) -> str:
    assert layer is not None
    return goal.structure.layers[layer]


@st.composite
def convex_curves(draw: st.DrawFn) -> dict[str, dict[int, float]]:
    """Harm at every width a site can have; each step harms more than the one before it."""
    curves = {}
    for u in goal_of().sites:
        widths = list(range(u.block_size, 0, -1 if u.site.kind == "heads" else -8))
        number = len(widths) - 1
        steps = sorted(draw(st.lists(st.floats(0.01, 5), min_size=number, max_size=number, unique=True)))
        curves[u.site.name] = dict(zip(widths, itertools.accumulate([0.0, *steps]), strict=True))
    return curves


@settings(max_examples=80, deadline=None)
@given(curves=convex_curves(), harms=st.tuples(st.floats(0.01, 20), st.floats(0.01, 20)), price=st.floats(1e-4, 0.02))
def test_layers_and_widths_are_shared_out_at_the_least_harm(
    curves: dict[str, dict[int, float]], harms: tuple[float, float], price: float
) -> None:
    """Any price of a parameter makes some choice the best one in each layer; no other that goes as far harms less."""
    goal = goal_of()
    whole = {u.site.name: u.block_size for u in goal.sites}
    total = sum(goal.sizes.values())
    gone = [total - left_by(whole, (path,)) for path in goal.structure.layers]
    skips = {p: Skip(i, harms[i], gone[i], gone[i]) for i, p in enumerate(goal.structure.layers)}
    needed, least, skipped = 0, 0.0, []
    for path, block in skips.items():
        mine = [u.site.name for u in goal.sites if _path(goal, u.site.layer) == path]
        choices = [(block.harm, block.parameters, True)]
        for widths in itertools.product(*(curves[name] for name in mine)):
            keep = dict(zip(mine, widths, strict=True))
            saves = total - left_by({**whole, **keep}, ())
            choices.append((sum(curves[n][w] for n, w in keep.items()), saves, False))
        ranked = sorted(choices, key=lambda c: c[0] - price * c[1])
        assume(ranked[1][0] - price * ranked[1][1] > ranked[0][0] - price * ranked[0][1] + 1e-6)
        least, needed = least + ranked[0][0], needed + ranked[0][1]
        skipped += [path] if ranked[0][2] else []
    budget = solve_curves(goal, curves, needed / total, skips=skips)
    assert set(budget.skipped) == set(skipped)
    assert budget.parameters_after == total - needed == left_by(budget.keep, budget.skipped)
    cut = [u.site.name for u in goal.sites if _path(goal, u.site.layer) not in skipped]
    found = sum(curves[name][budget.keep[name]] for name in cut) + sum(skips[p].harm for p in skipped)
    assert found == pytest.approx(least)
    assert {layer for layer, share in budget.unit_ratios.items() if share == 1} == {skips[p].layer for p in skipped}


def test_a_layer_that_saves_too_much_is_left_out() -> None:
    """Its sites then are cut as if it could not go."""
    goal = goal_of()
    total = sum(goal.sizes.values())
    curves = {u.site.name: {u.block_size: 0.0, 1: 1.0} for u in goal.sites}
    gone = total - left_by({u.site.name: u.block_size for u in goal.sites}, ("model.layers.1",))
    skips = {"model.layers.1": Skip(1, 1e-3, gone, gone)}
    assert solve_curves(goal, curves, gone / total, skips=skips).skipped == ("model.layers.1",)
    short = (gone - 1) / total
    assert solve_curves(goal, curves, short, skips=skips) == solve_curves(goal, curves, short)


def test_a_layer_that_does_not_fit_is_not_promised() -> None:
    """Widths alone do not go far enough, and the layer goes too far."""
    goal = goal_of()
    total = sum(goal.sizes.values())
    whole = {u.site.name: u.block_size for u in goal.sites}
    curves = {name: {n: 0.0, n - 1: 1.0} for name, n in whole.items()}
    gone = total - left_by(whole, ("model.layers.1",))
    most = 1 - left_by({name: n - 1 for name, n in whole.items()}, ()) / total
    with pytest.raises(PlanError, match=rf"^ratio 0\.35 cannot be reached: .* narrowest width, {most:.4f} goes"):
        solve_curves(goal, curves, 0.35, skips={"model.layers.1": Skip(1, 0.1, gone, gone)})


@pytest.mark.parametrize("saves", [0.0, -3.0])
def test_a_layer_that_saves_nothing_stays(saves: float) -> None:
    goal = goal_of()
    curves = {u.site.name: {u.block_size: 0.0, 1: 1.0} for u in goal.sites}
    useless = {"model.layers.1": Skip(1, 100.0, saves, 1000)}
    for ratio in (0.1, 0.2, 0.3):
        assert solve_curves(goal, curves, ratio, skips=useless) == solve_curves(goal, curves, ratio)


def test_layers_count_in_what_can_be_reached() -> None:
    goal = goal_of()
    total = sum(goal.sizes.values())
    curves = {u.site.name: {u.block_size: 0.0, u.block_size - 1: 1.0} for u in goal.sites}
    whole = {u.site.name: u.block_size for u in goal.sites}
    gone = total - left_by(whole, ("model.layers.1",))
    skips = {"model.layers.1": Skip(1, 1e3, gone, gone)}
    narrow = {name: n - 1 for name, n in whole.items()}
    most = 1 - left_by(narrow, ("model.layers.1",)) / total
    assert solve_curves(goal, curves, most, skips=skips).skipped == ("model.layers.1",)
    with pytest.raises(PlanError, match=rf"^ratio 0\.9 cannot be reached: .* is not too large, {most:.4f} goes"):
        solve_curves(goal, curves, 0.9, skips=skips)


# -- the allocation ---------------------------------------------------------------------------------------------------


def idle(family: str, layer: str, *weights: str, **changes: Any) -> nn.Module:
    """A model of which one layer adds nothing to the residual stream."""
    model = make(family, **{**DEEP[family], **changes})
    with torch.no_grad():
        for name in weights:
            model.get_parameter(f"{layer}.{name}").zero_()
    return model


IDLE = [
    ("llama", "model.layers.2", ("self_attn.o_proj.weight", "mlp.down_proj.weight")),
    ("gpt2", "transformer.h.2", ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")),
    ("gemma3", "model.layers.2", ("self_attn.o_proj.weight", "mlp.down_proj.weight")),
]


@pytest.mark.parametrize(
    ("family", "layer", "weights", "of"), [*((*case, "parameters") for case in IDLE), (*IDLE[0], "macs")]
)
def test_a_layer_that_does_nothing_goes(family: str, layer: str, weights: tuple[str, ...], of: str) -> None:
    """First of all, and whole; what is still to go is shared out among the others."""
    model = idle(family, layer, *weights)
    allocation = HarmAllocation(ratio=0.25, round_to=1, depth=True, widths=(0.1,), of=of, dtype=None)
    recipe = Recipe((Pearson(), FeatureSpace(), Regression(), allocation, Sweep()))
    result = slimgraph.prune(model, IDS, recipe=recipe, verify=True)
    assert result.plan.skipped == (layer,)
    assert result.model is not None
    assert result.budget is not None
    assert (
        result.budget.parameters_after == result.parameters_after == sum(p.numel() for p in result.model.parameters())
    )
    assert {n for n in result.plan.cuts if n.startswith(f"{layer}.")} == set()
    before, after = (_amount(of, g) for g in (trace(model), result.graph))
    assert 1 - after / before == pytest.approx(0.25, abs=0.03)
    widths_alone = replace(allocation, depth=False)
    without = slimgraph.prune(model, IDS, recipe=Recipe((*recipe.passes[:3], widths_alone, Sweep())))
    assert without.plan.skipped == ()


def _amount(of: str, graph: fx.GraphModule) -> float:
    return macs(graph, IDS.shape[1]) if of == "macs" else sum(p.numel() for p in graph.parameters())


def test_layers_whose_heads_stay_are_not_skipped() -> None:
    model = idle("llama", "model.layers.3", "self_attn.o_proj.weight", "mlp.down_proj.weight")
    spared = HarmAllocation(ratio=0.25, round_to=1, depth=True, spare_last_heads=0.25, dtype=None)

    def allocated(allocation: HarmAllocation) -> PassResult:
        graph = attach(trace(model), State(batches=[IDS]))
        for step in (Magnitude(), NoRecovery()):
            step(graph)
        return allocation(graph)

    assert not allocated(spared).modified
    assert not allocated(replace(spared, kinds="channels")).modified
    result = allocated(replace(spared, spare_last_heads=0.0))
    assert result.modified
    assert result.graph_module.meta[KEY].plan.skipped == ("model.layers.3",)
    assert {u.site.layer for u in result.graph_module.meta[KEY].units} == {0, 1, 2}
