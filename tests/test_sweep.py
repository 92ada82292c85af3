"""The sweep against plain references on the module itself: hooks, whole activations, one site after the other."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import reference
import torch
from decoders import decoder, logits, make, tokens
from reference import RawSite, RawSource
from torch import Tensor, nn

from slimgraph.errors import CalibrationError, NumericsError
from slimgraph.evidence import Evidence
from slimgraph.execute import Observer, Stop, lower, run
from slimgraph.groups import Site, Structure, infer
from slimgraph.moments import Moments, Norms
from slimgraph.passes import CosineAllocation, FeatureSpace, Pearson, Regression, Sweep, UniformAllocation, Verify, base
from slimgraph.pipeline import prune, run_passes
from slimgraph.plan import Plan, resolve
from slimgraph.products import faster_in
from slimgraph.recipe import Recipe
from slimgraph.state import State, attach
from slimgraph.surgery import Refit, prune_graph
from slimgraph.sweep import Decision, layer_similarity, sweep
from slimgraph.trace import tensor_at, trace
from slimgraph.units import Units, units_of

IDS = tokens(6, 9, seed=3)


# -- references -------------------------------------------------------------------------------------------------------


def inputs_of(model: nn.Module, name: str, ids: Tensor = IDS) -> Tensor:
    """(tokens, features) what a submodule is given."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    logits(model, ids)
    handle.remove()
    return seen[0].flatten(0, -2)


def owner_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def refit_in_place(model: nn.Module, site: Site, channels: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The new projection in the dense module: columns of channels that are gone are zero."""
    owner = model.get_submodule(owner_of(site.parameter))
    whole = torch.zeros(weight.shape[0], site.channels, dtype=weight.dtype)
    whole[:, channels] = weight
    owner.weight = nn.Parameter(whole if site.in_dim == 1 else whole.T.contiguous())
    if bias is not None:
        owner.bias = nn.Parameter(bias)


@dataclass
class Recorder:
    """Decides at random, and keeps what it was shown; a copy of the model has the same decisions carried out."""

    model: nn.Module
    seed: int = 0
    skip: Callable[[Site], bool] = lambda site: False
    evidence: dict[str, Evidence] = field(default_factory=dict)
    expected: dict[str, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    done: list[tuple[str, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pruned = copy.deepcopy(self.model)

    def decide(self, units: Units, evidence: Evidence) -> Decision | None:
        site = units.site
        self.evidence[site.name] = evidence
        _ = evidence.moments  # while the activations are there
        origins = [inputs_of(self.pruned, owner_of(o.parameter)) for o in site.origins]
        self.expected[site.name] = (inputs_of(self.pruned, owner_of(site.parameter)), origins)
        self.done.append((site.name, not self.skip(site)))
        if self.skip(site):
            return None
        generator = torch.Generator().manual_seed(self.seed + len(self.evidence))
        keep = max(1, units.block_size // 2)
        rows = [
            torch.randperm(units.block_size, generator=generator)[:keep].sort()[0] for _ in range(units.block_count)
        ]
        kept = torch.cat([r + b * units.block_size for b, r in enumerate(rows)])
        channels = evidence.kept_channels(kept)
        shape = (evidence.weight.shape[0], len(channels))
        weight = torch.randn(shape, dtype=torch.float64, generator=generator) / len(channels) ** 0.5
        bias = torch.randn(shape[0], dtype=torch.float64, generator=generator)
        refit_in_place(self.pruned, site, channels, weight, bias)
        return Decision(kept, channels, Refit(weight, bias))


def all_units(structure: Structure, heads: str = "auto") -> list[Units]:
    return [units_of(structure, s, heads) for s in structure.prunable_sites()]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "kv"),
    ("llama", {}, "balanced"),
    ("gpt2", {}, "auto"),
    ("gpt_neox", {}, "auto"),
]
every_family = pytest.mark.parametrize(("family", "changes", "heads"), FAMILIES)


# -- what a decision sees ---------------------------------------------------------------------------------------------


@every_family
def test_a_decision_sees_the_activations_of_the_pruned_model_before_it(
    family: str, changes: dict[str, Any], heads: str
) -> None:
    made = decoder(family, **changes)
    recorder = Recorder(made.model)
    units = all_units(made.structure, heads)
    sweep(made.structure, IDS.split(2), units, recorder.decide)
    assert recorder.done == [(s.name, True) for s in made.structure.sites]
    dense = [inputs_of(made.model, owner_of(u.site.parameter)) for u in units]
    for u, before in zip(units, dense, strict=True):
        evidence, (x, origins) = recorder.evidence[u.site.name], recorder.expected[u.site.name]
        moments = Moments.of(x)
        assert evidence.moments.count == IDS.numel()
        close(evidence.moments.mean, moments.mean)
        close(evidence.moments.scatter, moments.scatter)
        assert u.site.layer == 0 or not torch.allclose(moments.mean, before.mean(0))
        assert len(evidence.sources) == len(origins)
        for source, z in zip(evidence.sources, origins, strict=True):
            close(source.input_norms, Norms.of(z).norms)


@every_family
def test_evidence_is_the_dense_weight_and_its_units(family: str, changes: dict[str, Any], heads: str) -> None:
    made = decoder(family, **changes)
    recorder = Recorder(made.model)
    units = all_units(made.structure, heads)
    sweep(made.structure, [IDS], units, recorder.decide)
    for u in units:
        site, evidence = u.site, recorder.evidence[u.site.name]
        weight = tensor_at(made.model, site.parameter)
        assert torch.equal(evidence.weight, weight if site.in_dim == 1 else weight.T)
        assert (
            evidence.bias is None if site.bias is None else torch.equal(evidence.bias, tensor_at(made.model, site.bias))
        )
        assert evidence.units.equal(u.members)
        assert evidence.blocks.equal(u.blocks)
        assert (evidence.kind, evidence.name) == (site.kind, site.name)
        for origin, source in zip(site.origins, evidence.sources, strict=True):
            weight = tensor_at(made.model, origin.parameter)
            assert torch.equal(source.weight, weight if origin.in_dim == 1 else weight.T)
            assert len(source.units) == len(source.weight)


@pytest.mark.parametrize("heads", ["kv", "balanced"])
def test_the_swept_model_is_the_pruned_graph(heads: str) -> None:
    made = decoder()
    recorder = Recorder(made.model)
    decisions = sweep(made.structure, [IDS], all_units(made.structure, heads), recorder.decide)
    plan = Plan()
    for u in all_units(made.structure, heads):
        plan = plan.merged(Plan(u.cut(decisions[u.site.name].units)))
    pruned = prune_graph(resolve(made.structure, plan), {name: d.refit for name, d in decisions.items()})
    close(logits(pruned, IDS), logits(recorder.pruned, IDS))


def test_a_site_without_a_decision_stays_dense() -> None:
    made = decoder()
    recorder = Recorder(made.model, skip=lambda site: site.kind == "heads")
    decisions = sweep(made.structure, [IDS], all_units(made.structure), recorder.decide)
    assert decisions.keys() == {s.name for s in made.structure.sites if s.kind == "channels"}
    assert recorder.done == [(s.name, s.kind == "channels") for s in made.structure.sites]
    for name, (x, _) in recorder.expected.items():
        close(recorder.evidence[name].moments.mean, x.mean(0))


def test_only_the_asked_for_sites_are_visited() -> None:
    made = decoder()
    recorder = Recorder(made.model)
    last = all_units(made.structure)[-1]
    sweep(made.structure, [IDS], [last], recorder.decide)
    assert list(recorder.evidence) == [last.site.name]
    close(recorder.evidence[last.site.name].moments.mean, inputs_of(made.model, owner_of(last.site.parameter)).mean(0))


@pytest.mark.parametrize("sizes", [[1] * 6, [4, 2], [5, 1]])
def test_the_size_of_micro_batches_changes_nothing(sizes: list[int]) -> None:
    made = decoder()
    whole, parts = Recorder(made.model), Recorder(made.model)
    one = sweep(made.structure, [IDS], all_units(made.structure), whole.decide)
    other = sweep(made.structure, IDS.split(sizes), all_units(made.structure), parts.decide)
    for name, decision in one.items():
        assert decision.units.equal(other[name].units)
        close(whole.evidence[name].moments.scatter, parts.evidence[name].moments.scatter)
        close(whole.evidence[name].moments.mean, parts.evidence[name].moments.mean)
        for a, b in zip(whole.evidence[name].sources, parts.evidence[name].sources, strict=True):
            close(a.input_norms, b.input_norms)


# -- weights and values -----------------------------------------------------------------------------------------------


def test_weights_are_fetched_by_name_once_they_are_needed_and_dropped_after() -> None:
    made = decoder()
    alive: dict[str, list[weakref.ref[Tensor]]] = {}
    expected: list[str] = []

    class Fetching:
        def __call__(self, name: str) -> Tensor:
            tensor = tensor_at(made.graph, name).detach().clone()
            alive.setdefault(name, []).append(weakref.ref(tensor))
            return tensor

        def expect(self, names: Sequence[str]) -> None:
            expected.extend(names)

    checked = []

    def decide(units: Units, evidence: Evidence) -> None:
        gc.collect()
        held = {n for n, refs in alive.items() if any(r() is not None for r in refs)}
        if units.site.layer == 1:
            checked.append(not any(n.startswith("model.layers.0.") for n in held))
        else:
            checked.append(not any(n.startswith("model.layers.1.") for n in alive))
        close(evidence.moments.mean, inputs_of(made.model, owner_of(units.site.parameter)).mean(0))

    sweep(made.structure, [IDS], all_units(made.structure), decide, weights=Fetching())
    assert checked == [True] * 4
    assert alive.keys() <= set(expected)  # a store that reads ahead is told of everything
    assert not {"lm_head.weight", "model.norm.weight"} & alive.keys()


def test_a_run_gives_observers_what_they_need() -> None:
    made = decoder()
    nodes = list(made.graph.graph.nodes)
    (output,) = [n for n in nodes if n.op == "output"]
    last = output.args[0].name
    seen: list[Tensor] = []
    run(made.graph, IDS.split(3), observers=[Observer(last, (last,), seen.append)])
    close(torch.cat(seen), logits(made.model, IDS))


def test_only_the_nodes_run_in_the_lower_dtype() -> None:
    """Products are as those of autocast; what is looked at and decided is not, and what adds up keeps its digits."""
    model = make("llama").float()
    structure = infer(trace(model))
    site, (_, after) = all_units(structure)[-1].site, structure.boundaries()[0]
    seen: list[Tensor] = []
    inside: list[torch.dtype] = []

    def product_dtype(*_: Any) -> None:
        inside.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

    run(
        structure.analysis.graph_module,
        [IDS],
        observers=[Observer(after, (after,), seen.append), Observer(after, (), product_dtype)],
        stops={site.node: Stop(site.reads, product_dtype)},
        dtype=torch.bfloat16,
    )
    assert inside == [torch.float32] * 2
    exact = hidden_after_first_layer(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = hidden_after_first_layer(model)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(seen[0], exact, rtol=0, atol=1e-3)


def hidden_after_first_layer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[1]
    return found


def test_a_sweep_in_the_lower_dtype_finds_nearly_the_same() -> None:
    """What a site reads is rounded, and its statistics, weights and fits are not."""
    structure = infer(trace(make("llama").float()))
    seen: dict[torch.dtype | None, list[Tensor]] = {None: [], torch.bfloat16: []}

    for dtype, found in seen.items():

        def look(units: Units, evidence: Evidence, found: list[Tensor] = found) -> None:
            assert evidence.weight.dtype == torch.float32
            assert evidence.precision == torch.float64
            found.append(evidence.moments.scatter)

        sweep(structure, [IDS], all_units(structure), look, dtype=dtype)
    for exact, rough in zip(*seen.values(), strict=True):
        assert rough.dtype == torch.float64
        assert not rough.equal(exact)
        torch.testing.assert_close(rough, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


def test_the_pass_sweeps_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "faster_in", lambda *_: True)
    model, budget = make("llama").float(), UniformAllocation(ratio=0.2, round_to=1)
    found = [
        prune(model, IDS, recipe=Recipe((Pearson(), FeatureSpace(), Regression(), budget, Sweep(dtype=dtype)))).model
        for dtype in (None, "bfloat16")
    ]
    exact, rough = (logits(m, IDS) for m in found if m is not None)
    assert not torch.allclose(exact, rough, rtol=0, atol=1e-4)
    assert float((exact - rough).norm() / exact.norm()) < 0.1


def test_a_dtype_that_costs_time_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "faster_in", lambda *_: False)
    model, budget = make("llama").float(), UniformAllocation(ratio=0.2, round_to=1)
    exact, asked = (
        prune(model, IDS, recipe=Recipe((Pearson(), FeatureSpace(), Regression(), budget, Sweep(dtype=dtype)))).model
        for dtype in (None, "bfloat16")
    )
    assert exact is not None
    assert asked is not None
    assert logits(asked, IDS).equal(logits(exact, IDS))


def test_float64_is_faster_nowhere() -> None:
    assert not faster_in(torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_a_float32_model_is_run_in_a_lower_dtype(dtype: torch.dtype) -> None:
    graph = trace(make("llama").to(dtype))
    assert lower(graph, torch.bfloat16) is None
    assert lower(trace(make("llama").float()), torch.bfloat16) is torch.bfloat16
    assert lower(trace(make("llama").float()), None) is None


def test_a_run_shows_every_node_in_its_progress() -> None:
    ticks: list[str] = []

    class Watching:
        def __call__(self, stage: str, total: int | None = None) -> Any:
            self.stage, self.total = stage, total
            return self

        def __enter__(self) -> Callable[[], None]:
            return lambda: ticks.append(self.stage)

        def __exit__(self, *_: object) -> None:
            assert len(ticks) == self.total

    made = decoder()
    layer_similarity(made.structure, [IDS], progress=Watching())  # type: ignore[arg-type]
    assert set(ticks) == {"dense forward"}


# -- similarity of layers ---------------------------------------------------------------------------------------------

LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def similarity_by_hooks(model: nn.Module, layers: str, ids: Tensor) -> list[float]:
    found: list[float] = []

    def look(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = out[0] if isinstance(out, tuple) else out
        found.append(float(torch.cosine_similarity(before, after, dim=-1).mean()))

    handles = [m.register_forward_hook(look, with_kwargs=True) for m in model.get_submodule(layers).children()]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", list(LAYERS))
@pytest.mark.parametrize("batch", [2, 6])
def test_layer_similarity_equals_the_cosine_of_what_goes_in_and_comes_out(family: str, batch: int) -> None:
    made = decoder(family)
    found = layer_similarity(made.structure, IDS.split(batch))
    expected = similarity_by_hooks(made.model, LAYERS[family], IDS)
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == 2


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4, dtype=torch.long)]])
def test_no_tokens_are_refused(batches: list[Tensor]) -> None:
    made = decoder()
    with pytest.raises(CalibrationError, match=r"^no calibration tokens; expected at least one sequence$"):
        sweep(made.structure, batches, all_units(made.structure), Recorder(made.model).decide)


BAD = [
    pytest.param("layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj", float("nan")),
    pytest.param("layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj", float("inf")),
    pytest.param("layers.0.input_layernorm.weight", "layers.0.self_attn.o_proj", float("nan")),
]


@pytest.mark.parametrize(("parameter", "site", "value"), BAD)
def test_activations_that_are_no_numbers_name_the_site(parameter: str, site: str, value: float) -> None:
    model = make()
    with torch.no_grad():
        tensor_at(model, f"model.{parameter}").view(-1)[3] = value
    structure = infer(trace(model))
    with pytest.raises(NumericsError, match=rf"model\.{re.escape(site)}\.weight\[1\]"):
        sweep(structure, [IDS], all_units(structure), Recorder(make()).decide)


# -- the whole method -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """What the plain reference decided at a site."""

    kept: list[int]
    weight: Tensor
    bias: Tensor


def attention_site(layer: Any, x: Tensor, z: Tensor, heads: str) -> RawSite:
    attention = layer.self_attn
    width, count, groups = (
        attention.head_dim,
        attention.config.num_attention_heads,
        attention.config.num_key_value_heads,
    )
    per_unit = width if heads == "balanced" else width * (count // groups)
    units = torch.arange(count * width) // per_unit
    blocks = torch.arange(count) // (count // groups) if heads == "balanced" else torch.zeros(groups, dtype=torch.long)
    return RawSite(x, attention.o_proj.weight, attention.o_proj.bias, units, blocks)


def feed_forward_site(layer: Any, x: Tensor, z: Tensor) -> RawSite:
    units = torch.arange(x.shape[1])
    sources = tuple(RawSource(p.weight, units, z) for p in (layer.mlp.gate_proj, layer.mlp.up_proj))
    return RawSite(
        x, layer.mlp.down_proj.weight, layer.mlp.down_proj.bias, units, torch.zeros(len(units), dtype=int), sources
    )


def slimllm_by_hooks(
    model: nn.Module, ids: Tensor, *, ratio: float, layers: int, alpha: float, heads: str
) -> tuple[nn.Module, dict[str, Pruned], dict[int, float]]:
    """SlimLLM as it is written down: layer after layer, heads then channels, everything on whole activations."""
    model = copy.deepcopy(model)
    similarity = torch.tensor(similarity_by_hooks(model, "model.layers", ids), dtype=torch.float64)
    chosen = similarity.argsort(descending=True)[:layers]
    ratios = ratio * layers * torch.softmax(alpha * similarity[chosen], 0)
    of_layer = dict(zip(chosen.tolist(), ratios.tolist(), strict=True))
    decided = {}
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            if i not in of_layer:
                continue
            path = f"model.layers.{i}"
            x, z = inputs_of(model, f"{path}.self_attn.o_proj", ids), inputs_of(model, f"{path}.self_attn.q_proj", ids)
            site = attention_site(layer, x, z, heads)
            keep = int(int((site.blocks == 0).sum()) * (1 - of_layer[i]) + 0.5)
            kept, _ = reference.pearson_search(site, keep)
            decided[f"{path}.self_attn.o_proj.weight[1]"] = carry_out(layer.self_attn.o_proj, site, kept)

            x, z = inputs_of(model, f"{path}.mlp.down_proj", ids), inputs_of(model, f"{path}.mlp.up_proj", ids)
            site = feed_forward_site(layer, x, z)
            keep = int(len(site.units) * (1 - of_layer[i]) + 0.5)
            kept = sorted(reference.feature_space(site).argsort(descending=True)[:keep].tolist())
            decided[f"{path}.mlp.down_proj.weight[1]"] = carry_out(layer.mlp.down_proj, site, kept)
    return model, decided, of_layer


def carry_out(projection: Any, site: RawSite, kept: list[int]) -> Pruned:
    channels = torch.isin(site.units, torch.tensor(kept)).nonzero().flatten()
    weight, bias = reference.regression(site, channels)
    whole = torch.zeros_like(projection.weight)
    whole[:, channels] = weight
    projection.weight, projection.bias = nn.Parameter(whole), nn.Parameter(bias)
    return Pruned(kept, weight, bias)


@pytest.mark.parametrize(
    ("heads", "changes"), [("kv", {}), ("balanced", {}), ("kv", {"attention_bias": True, "mlp_bias": True})]
)
def test_slimllm_equals_the_method_carried_out_by_hand(heads: str, changes: dict[str, Any]) -> None:
    settings = {"ratio": 0.4, "layers": 2, "alpha": 3.0}
    model = make(num_hidden_layers=3, **changes)
    by_hand, decided, of_layer = slimllm_by_hooks(model, IDS, heads=heads, **settings)

    allocation = CosineAllocation(unit_ratio=settings["ratio"], layers=2, alpha=3.0, heads=heads, round_to=1)
    recipe = Recipe((Pearson(), FeatureSpace(), Regression(), allocation, Sweep(), Verify()))
    graph = trace(model)
    structure = infer(graph)
    state = State(batches=IDS.split(4))
    pruned = run_passes(attach(graph, state), recipe.passes)

    assert state.budget is not None
    assert state.budget.unit_ratios == pytest.approx(of_layer)
    assert state.refits.keys() == {n for n, d in decided.items() if d.weight.shape != tensor_at(model, n[:-3]).shape}
    for name, refit in state.refits.items():
        units = units_of(structure, next(s for s in structure.sites if s.name == name), heads)
        cut = state.plan.cuts[units.group]
        kept = [b * units.block_size + u for b, row in enumerate(cut.keep) for u in row]
        assert kept == decided[name].kept
        close(refit.weight, decided[name].weight, 1e-6)
        close(refit.bias, decided[name].bias, 1e-6)
    assert len(state.refits) == 4
    close(logits(pruned, IDS), logits(by_hand, IDS), 1e-6)


def test_what_is_not_finite_is_refused_even_where_no_score_looks_at_it() -> None:
    model = make()
    with torch.no_grad():
        tensor_at(model, "model.layers.1.mlp.up_proj.weight")[0, 0] = torch.nan
    structure = infer(trace(model))
    last = [s for s in structure.prunable_sites() if s.layer == 1 and s.kind == "channels"]
    with pytest.raises(NumericsError, match=r"layers.1.mlp.down_proj.*activations are NaN"):
        sweep(structure, [IDS], [units_of(structure, s) for s in last], lambda units, evidence: None)
