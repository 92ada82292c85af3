from __future__ import annotations

from pathlib import Path

import pytest
from decoders import FeedForward, Toy, decoder, make, tokens
from torch import nn

from slimgraph.cost import cache_bytes, checkpoint_bytes, cost, macs, weight_bytes
from slimgraph.passes import ApplyPlan
from slimgraph.pipeline import prune
from slimgraph.plan import Cut, Plan
from slimgraph.recipe import Recipe


def linear_products(model: nn.Module) -> int:
    """Multiply-accumulates per token of every two-dimensional weight but the embedding's rows."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.ndim == 2}
    return sum(p.numel() for p in weights.values() if id(p) not in looked_up)


def test_products_of_a_llama_are_those_of_its_formula() -> None:
    made = decoder("llama")
    n, heads, width, layers = 7, 6, 4, 2
    attention = layers * 2 * heads * width * n * n  # queries with keys, weights with values
    assert macs(made.graph, n) == linear_products(made.model) * n + attention


def test_products_of_other_spellings_count_too() -> None:
    made = decoder("gpt2")  # its projections are addmm, its output is tied to the embedding
    n, layers = 5, 2
    tied = made.model.get_submodule("lm_head").get_parameter("weight").numel()
    expected = sum(p.numel() for p in made.model.parameters() if p.ndim == 2)
    positions = made.model.get_submodule("transformer.wpe").get_parameter("weight").numel()
    embedding = made.model.get_submodule("transformer.wte").get_parameter("weight").numel()
    per_token = expected - positions - embedding + tied
    assert macs(made.graph, n) == per_token * n + layers * 2 * 24 * n * n


def test_products_grow_with_the_batch() -> None:
    graph = decoder().graph
    before = [(node.args, node.kwargs) for node in graph.graph.nodes]
    assert macs(graph, 6, batch=3) == 3 * macs(graph, 6)
    assert [(node.args, node.kwargs) for node in graph.graph.nodes] == before


def test_values_do_not_matter() -> None:
    assert cost(decoder().model, tokens=9) == cost(make().to("meta"), tokens=9)


def test_pruned_layers_of_different_widths_are_counted_as_they_are() -> None:
    dense = decoder()
    kept = {0: (1,), 1: (0, 2)}
    cuts = {f"model.layers.{n}.self_attn.o_proj.weight[1].0": Cut(3, (keep,)) for n, keep in kept.items()}
    recipe = Recipe((ApplyPlan(Plan(cuts).to_dict()),))
    pruned = prune(dense.model, tokens(2, 5), recipe=recipe).model
    assert pruned is not None
    width, value_bytes = 4, 8
    assert cache_bytes(dense.model) == (2 * (3 + 3) * width * value_bytes, 0)
    assert cache_bytes(pruned) == (2 * (1 + 2) * width * value_bytes, 0)
    found = cost(pruned, tokens=8)
    assert found.parameters == sum(p.numel() for p in pruned.parameters())
    assert found.macs_per_token == linear_products(pruned) + 2 * (2 + 4) * width * 8


def test_a_cache_in_half_precision_is_half_as_large() -> None:
    whole, half = cache_bytes(make().float()), cache_bytes(make().bfloat16())
    assert whole is not None
    assert half is not None
    assert half[0] * 2 == whole[0]


def test_a_model_without_a_cache_has_none() -> None:
    assert cache_bytes(Toy(FeedForward())) is None
    assert cost(Toy(FeedForward())).cache_bytes_per_token is None


def test_tied_weights_are_counted_once() -> None:
    tied = make(tie_word_embeddings=True)
    assert weight_bytes(tied) == sum(8 * p.numel() for p in tied.parameters())


def test_a_checkpoint_is_as_large_as_its_files(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    found = checkpoint_bytes(tmp_path)
    assert found == (tmp_path / "model.safetensors").stat().st_size
    assert found >= weight_bytes(model)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_what_is_no_checkpoint_has_no_size(tmp_path: Path, place: str) -> None:
    assert checkpoint_bytes(tmp_path / place) is None
