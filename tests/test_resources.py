"""What a unit takes of a resource, and budgets of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from decoders import FeedForward, Toy, decoder, make, tokens
from torch import Tensor, fx, nn

import slimgraph
from slimgraph.cost import cache_bytes, macs
from slimgraph.errors import GraphError, PlanError, RecipeError
from slimgraph.passes import FeatureSpace, HarmAllocation, LeastSquares, Pearson, Sweep
from slimgraph.pipeline import prune
from slimgraph.plan import Plan, resolve
from slimgraph.recipe import Recipe
from slimgraph.resources import cached_numbers, per_unit, seconds
from slimgraph.surgery import prune_graph
from slimgraph.trace import trace
from slimgraph.units import Units, units_of

FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma3"]
every_family = pytest.mark.parametrize("family", FAMILIES)
VALUE_BYTES = 8  # float64


def sites_of(family: str, heads: str = "auto") -> list[Units]:
    structure = decoder(family).structure
    return [units_of(structure, s, heads) for s in structure.prunable_sites()]


def cut_by_one(family: str, units: Units) -> fx.GraphModule:
    kept = torch.arange(len(units.blocks)).view(units.block_count, units.block_size)[:, :-1].flatten()
    return prune_graph(resolve(decoder(family).structure, Plan(units.cut(kept))))


@every_family
@pytest.mark.parametrize("heads", ["kv", "balanced"])
def test_a_unit_takes_what_cutting_it_saves(family: str, heads: str) -> None:
    made, n = decoder(family), 6
    units = [u for u in sites_of(family, heads) if u.block_size > 1]
    products = per_unit(made.structure, units, lambda graph: macs(graph, n))
    cached = per_unit(made.structure, units, lambda graph: cached_numbers(graph, n))
    for u in units:
        cut = cut_by_one(family, u)
        assert macs(made.graph, n) - macs(cut, n) == pytest.approx(products[u.site.name])
        assert cached_numbers(made.graph, n) - cached_numbers(cut, n) == pytest.approx(cached[u.site.name])
    assert {u.site.kind for u in units if cached[u.site.name]} <= {"heads"}
    assert all(products[u.site.name] > 0 for u in units)


@every_family
def test_attention_reads_what_the_cache_holds(family: str) -> None:
    made, n = decoder(family), 6
    growth, _ = cache_bytes(made.model) or (0, 0)
    assert growth > 0
    assert cached_numbers(made.graph, n) * VALUE_BYTES == growth * n


def test_heads_that_share_keys_free_no_cache() -> None:
    structure = decoder().structure
    (whole, *_), (shared, *_) = (
        [u for u in sites_of("llama", heads) if u.site.kind == "heads"] for heads in ("kv", "balanced")
    )
    width, n = 4, 5
    for units, expected in ((whole, 2 * width * n), (shared, 0)):
        found = per_unit(structure, [units], lambda graph: cached_numbers(graph, n))
        assert found == {units.site.name: expected}


class Sharing(nn.Module):
    """Two attentions over the same keys and values, the second over repeated ones."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.key, self.value = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor, width: int = 4) -> Tensor:
            return y.unflatten(-1, (-1, width)).transpose(1, 2)

        key, value = heads(self.key(x)), heads(self.value(x))
        found = x
        for query in self.queries:
            repeated = [y.expand(-1, 2, -1, -1) for y in (key, value)]
            found = found + nn.functional.scaled_dot_product_attention(heads(query(x)), *repeated).transpose(
                1, 2
            ).flatten(2)
        return found


def test_what_two_attentions_read_is_held_once() -> None:
    assert cached_numbers(trace(Toy(Sharing())), 7) == 2 * 4 * 7


@pytest.mark.parametrize("model", [Toy(FeedForward()), make(attention="eager")], ids=["none", "eager"])
def test_without_attention_there_is_no_telling(model: nn.Module) -> None:
    with pytest.raises(GraphError, match=r"has no scaled_dot_product_attention.*take another budget"):
        cached_numbers(trace(model), 7)


def test_a_pass_takes_time() -> None:
    assert 0 < seconds(decoder().graph, tokens(2, 8)) < 10


# -- budgets ----------------------------------------------------------------------------------------------------------


def pruned(model: nn.Module, ratio: float, **fields: Any) -> slimgraph.Result:
    allocation = HarmAllocation(ratio=ratio, round_to=1, **fields)
    return prune(model, tokens(4, 8), recipe=Recipe((Pearson(), FeatureSpace(), LeastSquares(), allocation, Sweep())))


def test_a_budget_of_products_is_met_in_products() -> None:
    dense = decoder()
    graph = pruned(dense.model, 0.2, of="macs").graph
    assert 1 - macs(graph, 8) / macs(dense.graph, 8) == pytest.approx(0.2, abs=0.02)


def test_a_budget_of_cache_is_met_in_cache() -> None:
    model = make(num_attention_heads=8, num_key_value_heads=8)
    result = pruned(model, 0.25, of="cache", heads="kv", widths=(0.25, 0.5, 0.75))
    before, after = cache_bytes(model), cache_bytes(result.model)  # type: ignore[arg-type]
    assert before is not None
    assert after is not None
    assert after[0] == before[0] * 0.75
    assert result.budget is not None
    channels = [keep for name, keep in result.budget.keep.items() if "down_proj" in name]
    assert channels == [20, 20]  # they free no cache


def test_a_budget_of_cache_needs_whole_kv_groups() -> None:
    with pytest.raises(PlanError, match=r"^of cache: no cut frees any of it; .* \(heads: kv\)"):
        pruned(decoder().model, 0.25, of="cache", heads="balanced")


def test_a_budget_of_time_is_met_in_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is made to be proportional to parameters: both budgets are then the same."""

    def as_parameters(graph: fx.GraphModule, ids: Tensor) -> float:
        assert ids.shape == (1, 8)
        return 1e-6 * sum(p.numel() for p in graph.parameters())

    monkeypatch.setattr("slimgraph.passes.harm.seconds", as_parameters)
    dense = make(num_hidden_layers=4, intermediate_size=96)
    result = pruned(dense, 0.2, of="latency")
    without_biases = sum(p.numel() for n, p in result.graph.named_parameters() if not n.endswith("bias"))
    assert 1 - without_biases / result.parameters_before == pytest.approx(0.2, abs=0.01)


def test_times_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a smaller graph may seem to be slower."""
    monkeypatch.setattr("slimgraph.passes.harm.seconds", lambda graph, ids: -sum(p.numel() for p in graph.parameters()))
    with pytest.raises(
        PlanError, match=r"^of latency: model\.layers.* takes more of it when it is cut to half than as"
    ):
        pruned(make(), 0.2, of="latency")


def test_an_unknown_resource_is_refused() -> None:
    message = "harm_allocation: of is 'joules'; expected one of parameters, macs, cache, latency"
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        HarmAllocation(ratio=0.2, of="joules")
