"""Planted faults are found, and nothing is found where nothing is wrong."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from decoders import VOCABULARY, decoder, make
from torch import Tensor, nn

import slimgraph
from slimgraph import hf
from slimgraph.debug.bisect import bisect
from slimgraph.debug.compare import Distance
from slimgraph.debug.findings import Bisection
from slimgraph.debug.opened import Opened, open_model
from slimgraph.errors import CalibrationError, GraphError, ModelError, PlanError
from slimgraph.execute import run as run_graph
from slimgraph.plan import Cut, Plan
from slimgraph.trace import tensor_at

IDS = torch.randint(0, VOCABULARY, (96,), generator=torch.Generator().manual_seed(3))
RECIPE = slimgraph.method("wanda", 0.25, recovery="regression", round_to=1)  # every layer is cut
SAMPLES = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(4))


class Pruned(NamedTuple):
    """A pruned model, and the same traced once."""

    model: Any
    plan: Plan
    opened: Opened
    save: Callable[[Path], object]


@pytest.fixture(scope="module")
def result() -> Pruned:
    made = slimgraph.prune(decoder("llama").model, SAMPLES, recipe=RECIPE)
    assert made.model is not None
    return Pruned(made.model, made.plan, open_model(made.model), made.save)


@functools.cache
def dense_llama() -> Opened:
    return open_model(decoder("llama").model)


def look(
    result: Pruned, pruned: nn.Module | Opened | None = None, *, restore: bool = False, **options: Any
) -> Bisection:
    found = result.opened if pruned is None else pruned
    return bisect(dense_llama(), found, IDS, seq_len=16, plan=result.plan, restore=restore, **options)


def broken(result: Pruned, change: Callable[[nn.Module], None]) -> nn.Module | Opened:
    """A copy of the pruned module with a fault in its second layer; traced anew only where the fault is no weight."""
    model = copy.deepcopy(result.model)
    with torch.no_grad():
        change(model.model.layers[1])
    if change in (stale_scale, stale_groups):
        return model  # type: ignore[no-any-return]
    return replace(result.opened, model=model, weights=functools.partial(tensor_at, model))


# ---- nothing wrong ----


def test_a_sound_model_has_no_faults(result: Pruned) -> None:
    found = look(result)
    assert (found.faults, found.suspects) == ([], [])
    assert {s.site for s in found.sites} == {s.name for s in decoder("llama").structure.sites}
    cut = [s for s in found.sites if s.bare is not None]
    assert cut
    assert all(0 < s.own <= s.bare * 1.25 for s in cut if s.own is not None and s.bare is not None)
    # What a site loses by itself is no more than what has added up by the end.
    assert found.first_past_threshold is not None
    assert "nothing: where pruning is not meant" in repr(found)


def test_a_model_against_itself_is_the_same() -> None:
    found = bisect(dense_llama(), dense_llama(), IDS, seq_len=16)
    assert all(n.error == 0.0 and n.own == 0.0 for n in found.nodes)
    assert found.kl == pytest.approx(0.0, abs=1e-9)
    assert found.dense_loss == found.pruned_loss
    assert found.first_past_threshold is None
    assert all(b.gain == pytest.approx(0.0, abs=1e-9) for b in found.layers)


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt_neox", "phi3"))])
def test_no_faults_in_other_families(family: str) -> None:
    dense = decoder(family).model
    pruned = slimgraph.prune(dense, SAMPLES, recipe=slimgraph.method("slimllm", 0.1, round_to=1))
    assert pruned.model is not None
    found = bisect(dense, pruned.model, IDS, seq_len=16, plan=pruned.plan)
    assert (found.faults, found.suspects) == ([], [])
    assert any(n.lossy and n.own for n in found.nodes)


@torch.no_grad()
def test_the_losses_are_those_of_the_modules(result: Pruned) -> None:
    found = look(result)
    dense, pruned = (
        torch.log_softmax(m(IDS.view(-1, 16)).logits[:, :-1].float(), -1)  # type: ignore[operator]
        for m in (decoder("llama").model, result.model)
    )
    target = IDS.view(-1, 16)[:, 1:, None]
    assert found.dense_loss == pytest.approx(-float(dense.gather(-1, target).mean()), rel=1e-5)
    assert found.pruned_loss == pytest.approx(-float(pruned.gather(-1, target).mean()), rel=1e-5)
    assert found.kl == pytest.approx(float((dense.exp() * (dense - pruned)).sum(-1).mean()), rel=1e-4)


# ---- restoring layers ----


@torch.no_grad()
def test_restoring_a_layer_is_running_the_dense_one(result: Pruned) -> None:
    found = look(result, restore=True)
    dense = decoder("llama").model
    target = IDS.view(-1, 16)[:, 1:, None]
    for layer in found.layers:
        mixed = copy.deepcopy(result.model)
        mixed.model.layers[layer.layer] = copy.deepcopy(dense.model.layers[layer.layer])  # type: ignore[union-attr, index, operator]
        logits = torch.log_softmax(mixed(IDS.view(-1, 16)).logits[:, :-1].float(), -1)  # type: ignore[misc, operator]
        assert layer.cross_entropy == pytest.approx(-float(logits.gather(-1, target).mean()), rel=1e-5)
        assert layer.gain == pytest.approx(found.kl - (layer.kl or 0.0))
    assert found.costliest is max(found.layers, key=lambda b: b.gain or 0.0)


def test_the_layer_that_was_ruined_costs_most(result: Pruned) -> None:
    def ruin(layer: Any) -> None:
        layer.mlp.down_proj.weight.mul_(-3)

    found = look(result, broken(result, ruin), restore=True)
    assert found.costliest is not None
    assert found.costliest.layer == 1


# ---- planted faults ----


def wrong_index(layer: Any) -> None:
    weight = layer.mlp.up_proj.weight
    weight[[0, 1]] = weight[[1, 0]].clone()


def wrong_bias(layer: Any) -> None:
    layer.mlp.down_proj.bias.add_(5.0)


def swapped_heads(layer: Any) -> None:
    projection, size = layer.self_attn.q_proj.weight, layer.self_attn.head_dim
    heads = projection.view(-1, size, projection.shape[-1])
    heads[[0, 1]] = heads[[1, 0]].clone()


def swapped_at_the_output(layer: Any) -> None:
    weight, size = layer.self_attn.o_proj.weight, layer.self_attn.head_dim
    heads = weight.view(weight.shape[0], -1, size)
    heads[:, [0, 1]] = heads[:, [1, 0]].clone()


def stale_scale(layer: Any) -> None:
    layer.self_attn.scaling *= 2


def stale_groups(layer: Any) -> None:
    layer.self_attn.num_key_value_groups = 5


@pytest.mark.parametrize(
    ("fault", "module", "operator"),
    [
        (wrong_index, "model.layers.1.mlp.up_proj", "aten.linear.default"),
        (swapped_heads, "model.layers.1.self_attn.q_proj", "aten.linear.default"),
        (stale_scale, "model.layers.1.self_attn", "aten.scaled_dot_product_attention.default"),
    ],
)
def test_a_fault_is_found_at_its_node(result: Pruned, fault: Any, module: str, operator: str) -> None:
    found = look(result, broken(result, fault))
    first = found.faults[0]
    assert (first.module, first.operator, first.layer) == (module, operator, 1)
    assert module in repr(found)
    # The accumulated error is past any threshold long before: it does not tell where the fault is.
    assert found.first_past_threshold is not None
    assert found.first_past_threshold.name != first.name


@pytest.mark.parametrize(
    ("fault", "site"),
    [
        (wrong_bias, "model.layers.1.mlp.down_proj.weight[1]"),
        (swapped_at_the_output, "model.layers.1.self_attn.o_proj.weight[1]"),
    ],
)
def test_a_fault_in_a_site_makes_it_suspect(result: Pruned, fault: Any, site: str) -> None:
    found = look(result, broken(result, fault))
    assert [s.site for s in found.suspects] == [site]
    assert found.faults == []  # nothing else differs while the site's output is put right
    assert "worse than none" in repr(found)


def test_a_stale_attribute_that_stops_the_model_is_named(result: Pruned) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn .*num_key_value_groups = 5"):
        look(result, broken(result, stale_groups))


def test_not_a_number_is_found(result: Pruned) -> None:
    def spoil(layer: Any) -> None:
        layer.self_attn.v_proj.weight[0, 0] = math.nan

    found = look(result, broken(result, spoil))
    assert found.faults[0].module == "model.layers.1.self_attn.v_proj"
    assert found.faults[0].note == "NaN or infinity"
    assert found.to_dict()["nodes"][-1]["error"] is None
    json.dumps(found.to_dict(), allow_nan=False)


# ---- from disk ----


def test_checkpoints_are_read_tensor_by_tensor(result: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, expected = decoder("llama").model, look(result, restore=True)
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    result.save(tmp_path / "pruned")

    def refuse(*_: Any, **options: Any) -> None:
        raise AssertionError("loaded whole")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    found = bisect(tmp_path / "dense", tmp_path / "pruned", IDS, seq_len=16, dtype=torch.float64)
    assert found.faults == []
    # Not to the last digit: the frequencies of a model in double precision are float32 once loaded.
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert [b.gain for b in found.layers] == pytest.approx([b.gain for b in expected.layers], rel=1e-3)


def test_layouts_that_are_converted_on_loading_are_loaded_whole(tmp_path: Path) -> None:
    model = make("gpt2")
    model.transformer.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    opened = open_model(tmp_path, dtype=torch.float64)
    assert torch.equal(opened.weights("transformer.h.0.mlp.c_fc.weight"), model.transformer.h[0].mlp.c_fc.weight)  # type: ignore[union-attr, index, operator]


def test_values_are_freed_on_the_way(result: Pruned) -> None:
    """No more than a few layers' weights are alive at a time."""
    import weakref

    from slimgraph.debug.weave import weave
    from slimgraph.plan import resolve

    dense, pruned = dense_llama(), result.opened
    strands, threads = weave(dense, pruned, resolve(dense.structure, result.plan))
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def fetch(name: str) -> Tensor:
        nonlocal most
        tensor = strands.fetch(name).clone()
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    from slimgraph.execute import Observer

    last = threads[-1].free
    run_graph(strands.module(), [IDS.view(-1, 16)], weights=fetch, observers=[Observer(last, (), lambda: None)])
    names = {n.target for n in strands.graph.find_nodes(op="get_attr")}
    assert most < len(names) / 3


# ---- what is refused ----


def test_what_cannot_be_compared_is_refused(result: Pruned) -> None:
    dense = dense_llama()
    with pytest.raises(CalibrationError, match="found 96 tokens, expected at least one window of 200"):
        bisect(dense, dense, IDS, seq_len=200)
    with pytest.raises(CalibrationError, match=f"found the token ids 0 to {VOCABULARY}, expected 0 to"):
        bisect(dense, dense, torch.cat([IDS, torch.full((16,), VOCABULARY)]), seq_len=16, batch=1)
    with pytest.raises(ModelError, match="GPT2LMHeadModel"):
        bisect(dense, decoder("gpt2").model, IDS, seq_len=16)
    with pytest.raises(ModelError, match=r"2 layers and .* 3"):
        bisect(dense, decoder("llama", num_hidden_layers=3).model, IDS, seq_len=16)
    with pytest.raises(PlanError, match="give the dense one first"):
        bisect(result.model, dense, IDS, seq_len=16)  # type: ignore[arg-type]
    wrong = Plan({"model.layers.0.mlp.down_proj.weight[1]": Cut(19, ((0, 1),))})
    with pytest.raises(PlanError, match="has 20 units; the plan was made for 19"):
        bisect(dense, dense, IDS, seq_len=16, plan=wrong)


def test_without_a_plan_nothing_is_said_about_faults(result: Pruned) -> None:
    model: Any = copy.deepcopy(result.model)
    model.config.quantization_config = None
    assert hf.manifest_of(model) is None
    found = bisect(decoder("llama").model, model, IDS, seq_len=16, restore=False)  # type: ignore[arg-type]
    assert found.faults == []
    assert "not known: the pruned model says no plan" in repr(found)


class _Crossing(nn.Module):
    """Two layers, the second of which reads a value from inside the first besides the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)}) for _ in range(2))
        self.out = nn.Linear(8, VOCABULARY)
        self.double().eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x, inner = self.embedding(input_ids), 0.0
        for layer in self.layers:
            inner = layer["up"](x).relu() + inner  # type: ignore[index]
            x = x + layer["down"](inner)  # type: ignore[index]
        return self.out(x)


def test_layers_that_share_more_than_the_residual_stream_are_not_restored() -> None:
    model = _Crossing()
    with pytest.raises(GraphError, match="besides the residual stream"):
        bisect(model, model, IDS, seq_len=16)
    assert bisect(model, model, IDS, seq_len=16, restore=False).faults == []


def test_distance() -> None:
    x, y = torch.tensor([3.0, 4.0, -math.inf]), torch.tensor([3.0, 3.0, -math.inf])
    one = Distance()
    one.add(x, y)
    assert one.error == pytest.approx(1 / 5)
    assert one.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    one.add(torch.ones(2), torch.tensor([1.0, math.nan]))
    assert one.error == math.inf
    other = Distance()
    other.add(torch.arange(6).view(2, 3), torch.tensor([[0, 2], [3, 5]]), {1: torch.tensor([0, 2])})
    assert other.error == 0.0
    other.add(torch.ones(2), torch.ones(3))
    assert other.shapes == ([2], [3])
