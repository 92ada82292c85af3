"""What is inferred from the graphs of decoders: terms of every weight, groups, sites, layers."""

from __future__ import annotations

import json
from typing import Any

import networkx as nx
import pytest
import torch
from decoders import FeedForward, Toy, decoder, make, tokens
from labelled import Bench, aten, parameters_shown
from torch import nn

import slimgraph
from slimgraph.axes import Atom, Term
from slimgraph.errors import GraphError, PlanError
from slimgraph.groups import Structure, infer
from slimgraph.passes import Magnitude, NoRecovery, Sweep, UniformAllocation
from slimgraph.recipe import Recipe
from slimgraph.trace import trace

GQA: dict[str, Any] = {}
MHA = {"num_key_value_heads": 6}
MQA = {"num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}

LLAMA_REST = {
    "mlp.gate_proj.weight": "(f ~d)",
    "mlp.up_proj.weight": "(f ~d)",
    "mlp.down_proj.weight": "(~d f)",
    "input_layernorm.weight": "(~d)",
    "post_attention_layernorm.weight": "(~d)",
}

GOLDEN: list[tuple[str, str, dict[str, Any], str, dict[str, str]]] = [
    (
        "grouped-query attention: kv groups × heads in a group × (half | half), the halves rotated into each other",
        "llama",
        GQA,
        "model.layers.0",
        {
            "self_attn.q_proj.weight": "(a×b×[c|c] ~d)",
            "self_attn.k_proj.weight": "(a×[c|c] ~d)",
            "self_attn.v_proj.weight": "(a×e ~d)",
            "self_attn.o_proj.weight": "(~d a×b×e)",
            **LLAMA_REST,
        },
    ),
    (
        "multi-head attention",
        "llama",
        MHA,
        "model.layers.1",
        {
            "self_attn.q_proj.weight": "(a×[b|b] ~c)",
            "self_attn.k_proj.weight": "(a×[b|b] ~c)",
            "self_attn.v_proj.weight": "(a×d ~c)",
            "self_attn.o_proj.weight": "(~c a×d)",
            "mlp.gate_proj.weight": "(e ~c)",
            "mlp.up_proj.weight": "(e ~c)",
            "mlp.down_proj.weight": "(~c e)",
            "input_layernorm.weight": "(~c)",
            "post_attention_layernorm.weight": "(~c)",
        },
    ),
    (
        "multi-query attention: one key and value head for all",
        "llama",
        MQA,
        "model.layers.0",
        {
            "self_attn.q_proj.weight": "(a×[b|b] ~c)",
            "self_attn.k_proj.weight": "(b|b ~c)",
            "self_attn.v_proj.weight": "(d ~c)",
            "self_attn.o_proj.weight": "(~c a×d)",
            "mlp.gate_proj.weight": "(e ~c)",
            "mlp.up_proj.weight": "(e ~c)",
            "mlp.down_proj.weight": "(~c e)",
            "input_layernorm.weight": "(~c)",
            "post_attention_layernorm.weight": "(~c)",
        },
    ),
    (
        "biases follow their projections",
        "llama",
        TIED,
        "model.layers.0",
        {
            "self_attn.q_proj.weight": "(a×b×[c|c] ~d)",
            "self_attn.q_proj.bias": "(a×b×[c|c])",
            "self_attn.k_proj.weight": "(a×[c|c] ~d)",
            "self_attn.k_proj.bias": "(a×[c|c])",
            "self_attn.v_proj.weight": "(a×e ~d)",
            "self_attn.v_proj.bias": "(a×e)",
            "self_attn.o_proj.weight": "(~d a×b×e)",
            "self_attn.o_proj.bias": "(~d)",
            "mlp.gate_proj.weight": "(f ~d)",
            "mlp.gate_proj.bias": "(f)",
            "mlp.up_proj.weight": "(f ~d)",
            "mlp.up_proj.bias": "(f)",
            "mlp.down_proj.weight": "(~d f)",
            "mlp.down_proj.bias": "(~d)",
            "input_layernorm.weight": "(~d)",
            "post_attention_layernorm.weight": "(~d)",
        },
    ),
    (
        "fused query | key | value, stored the other way round, without rotation",
        "gpt2",
        {},
        "transformer.h.1",
        {
            "ln_1.weight": "(~a)",
            "ln_1.bias": "(~a)",
            "attn.c_attn.weight": "(~a b×c|b×c|b×d)",
            "attn.c_attn.bias": "(b×c|b×c|b×d)",
            "attn.c_proj.weight": "(b×d ~a)",
            "attn.c_proj.bias": "(~a)",
            "ln_2.weight": "(~a)",
            "ln_2.bias": "(~a)",
            "mlp.c_fc.weight": "(~a e)",
            "mlp.c_fc.bias": "(e)",
            "mlp.c_proj.weight": "(e ~a)",
            "mlp.c_proj.bias": "(~a)",
        },
    ),
    (
        "interleaved heads × (query | key | value), of query and key a part is rotated",
        "gpt_neox",
        {},
        "gpt_neox.layers.0",
        {
            "input_layernorm.weight": "(~a)",
            "input_layernorm.bias": "(~a)",
            "post_attention_layernorm.weight": "(~a)",
            "post_attention_layernorm.bias": "(~a)",
            "attention.query_key_value.weight": "(b×[c|c|d|c|c|d|e] ~a)",
            "attention.query_key_value.bias": "(b×[c|c|d|c|c|d|e])",
            "attention.dense.weight": "(~a b×e)",
            "attention.dense.bias": "(~a)",
            "mlp.dense_h_to_4h.weight": "(f ~a)",
            "mlp.dense_h_to_4h.bias": "(f)",
            "mlp.dense_4h_to_h.weight": "(~a f)",
            "mlp.dense_4h_to_h.bias": "(~a)",
        },
    ),
    (
        "fused query | key | value of grouped-query attention, fused gate | up",
        "phi3",
        {},
        "model.layers.1",
        {
            "self_attn.o_proj.weight": "(~a b×c×d)",
            "self_attn.qkv_proj.weight": "(b×c×[e|e]|b×[e|e]|b×d ~a)",
            "mlp.gate_up_proj.weight": "(f|f ~a)",
            "mlp.down_proj.weight": "(~a f)",
            "input_layernorm.weight": "(~a)",
            "post_attention_layernorm.weight": "(~a)",
        },
    ),
]
FAMILIES = [("llama", GQA), ("llama", MQA), ("llama", TIED), ("gpt2", {}), ("gpt_neox", {}), ("phi3", {})]

every_family = pytest.mark.parametrize(("family", "changes"), FAMILIES)


def heads_of_first_layer(structure: Structure) -> tuple[str, ...]:
    return next(s.groups for s in structure.sites if s.kind == "heads" and s.layer == 0)


@pytest.mark.parametrize(("family", "changes", "layer", "shown"), [g[1:] for g in GOLDEN], ids=[g[0] for g in GOLDEN])
def test_weights_of_a_layer_are_made_of(
    family: str, changes: dict[str, Any], layer: str, shown: dict[str, str]
) -> None:
    structure = decoder(family, **changes).structure
    assert parameters_shown(structure, layer, shown) == shown
    assert {n for n in structure.analysis.sources if n.startswith(layer + ".")} == {f"{layer}.{n}" for n in shown}


SINGLE = {"num_attention_heads": 1, "num_key_value_heads": 1}


def test_the_width_of_a_single_head_is_not_taken_for_channels() -> None:
    structure = decoder(**SINGLE).structure
    assert [(s.kind, s.layer) for s in structure.prunable_sites()] == [("channels", 0), ("channels", 1)]
    width = next(g for g in structure.groups.values() if g.name.endswith("v_proj.weight[0]"))
    assert (width.kind, width.units) == ("inner", 4)


def test_a_model_that_was_pruned_to_single_heads_is_pruned_again() -> None:
    heads = UniformAllocation(unit_ratio=0.5, kinds="heads")
    ids = tokens(4, 9)
    once = slimgraph.prune(
        make(num_attention_heads=2, num_key_value_heads=2),
        ids,
        recipe=Recipe((Magnitude(), NoRecovery(), heads, Sweep())),
    )
    assert once.model is not None
    twice = slimgraph.prune(once.model, ids, 0.1, recipe="slimllm", round_to=1)
    assert twice.module_failure is None
    assert twice.parameters_after < once.parameters_after


SITES = [
    ("llama", GQA, "self_attn.o_proj.weight[1]", "3 × 2 × 4", (".0", ".1"), None, (1, 0)),
    ("llama", MHA, "self_attn.o_proj.weight[1]", "6 × 4", (".0",), None, (1, 0)),
    ("llama", MQA, "self_attn.o_proj.weight[1]", "6 × 4", (".0",), None, (1, 0)),
    ("llama", TIED, "self_attn.o_proj.weight[1]", "3 × 2 × 4", (".0", ".1"), "self_attn.o_proj.bias", (1, 0)),
    ("llama", GQA, "mlp.down_proj.weight[1]", "20", ("",), None, (1, 0)),
    ("llama", TIED, "mlp.down_proj.weight[1]", "20", ("",), "mlp.down_proj.bias", (1, 0)),
    ("gpt2", {}, "attn.c_proj.weight[0]", "4 × 6", (".0",), "attn.c_proj.bias", (0, 1)),
    ("gpt2", {}, "mlp.c_proj.weight[0]", "20", ("",), "mlp.c_proj.bias", (0, 1)),
    ("gpt_neox", {}, "attention.dense.weight[1]", "3 × 8", (".0",), "attention.dense.bias", (1, 0)),
    ("phi3", {}, "self_attn.o_proj.weight[1]", "3 × 2 × 4", (".0", ".1"), None, (1, 0)),
]


@pytest.mark.parametrize(("family", "changes", "name", "shown", "groups", "bias", "dims"), SITES)
def test_every_layer_has_the_site(
    family: str,
    changes: dict[str, Any],
    name: str,
    shown: str,
    groups: tuple[str, ...],
    bias: str | None,
    dims: tuple[int, int],
) -> None:
    structure = decoder(family, **changes).structure
    found = [s for s in structure.sites if s.name.endswith(name)]
    assert [s.layer for s in found] == [0, 1]
    for site, layer in zip(found, structure.layers, strict=True):
        assert site.name == f"{layer}.{name}"
        assert site.structure == shown
        assert site.groups == tuple(site.name + g for g in groups)
        assert site.bias == (bias and f"{layer}.{bias}")
        assert (site.in_dim, site.out_dim) == dims
        assert site.kind == ("channels" if "mlp" in name else "heads")
        assert site.writes_residual
        assert site in structure.prunable_sites()


ORIGINS = [
    ("llama", GQA, "self_attn.o_proj.weight[1]", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], (0, 1)),
    ("llama", MQA, "self_attn.o_proj.weight[1]", ["self_attn.q_proj"], (0, 1)),
    ("llama", GQA, "mlp.down_proj.weight[1]", ["mlp.gate_proj", "mlp.up_proj"], (0, 1)),
    ("gpt2", {}, "attn.c_proj.weight[0]", ["attn.c_attn"], (1, 0)),
    ("gpt2", {}, "mlp.c_proj.weight[0]", ["mlp.c_fc"], (1, 0)),
    ("gpt_neox", {}, "attention.dense.weight[1]", ["attention.query_key_value"], (0, 1)),
    ("phi3", {}, "mlp.down_proj.weight[1]", ["mlp.gate_up_proj"], (0, 1)),
]


@pytest.mark.parametrize(("family", "changes", "name", "origins", "dims"), ORIGINS)
def test_a_site_knows_what_produces_its_units(
    family: str, changes: dict[str, Any], name: str, origins: list[str], dims: tuple[int, int]
) -> None:
    structure = decoder(family, **changes).structure
    for site in (s for s in structure.sites if s.name.endswith(name)):
        layer = structure.layers[site.layer or 0]
        assert [o.parameter for o in site.origins] == [f"{layer}.{o}.weight" for o in origins]
        assert {(o.dim, o.in_dim) for o in site.origins} == {dims}
        assert len({o.reads for o in site.origins}) == 1


@every_family
def test_layers_are_found_in_order(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    assert [path.rpartition(".")[2] for path in structure.layers] == ["0", "1"]
    assert [s.layer for s in structure.sites] == [0, 0, 1, 1]
    assert structure.refusals == []


@every_family
def test_there_is_one_residual_stream_in_all_layers(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    (residual,) = [g for g in structure.groups.values() if g.kind == "residual"]
    assert residual.units == 24
    assert residual.layer is None
    assert residual.frozen is None
    assert len(residual.statistics) >= 5
    for layer in structure.layers:
        inside = {o.source.removeprefix(layer) for o in residual.occurrences if o.source.startswith(layer + ".")}
        assert len(inside) >= 4
    weights = {o.source for o in residual.occurrences}
    assert {s.parameter for s in structure.sites} <= weights


@every_family
def test_kinds_and_layers_of_groups(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    for site in structure.sites:
        for name in site.groups:
            assert structure.group(name).kind == site.kind
            assert structure.group(name).layer == site.layer
            assert structure.group(name).statistics == ()
            assert structure.group(name).frozen is None
    removed = {g for s in structure.sites for g in s.groups}
    assert {g.kind for n, g in structure.groups.items() if n not in removed} == {"residual", "inner"}


@every_family
def test_the_vocabulary_is_frozen_and_says_why(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    frozen = {g.name: g.frozen for g in structure.groups.values() if g.frozen}
    tied = "tie_word_embeddings" in changes or family == "gpt2"
    assert len([n for n, g in structure.groups.items() if g.units == 40]) == (1 if tied else 2)
    for name, group in structure.groups.items():
        if group.units == 40:
            assert name in frozen
    assert any(
        "rows are looked up by token or position (aten.embedding.default at embedding" in r for r in frozen.values()
    )
    assert tied or "the model's output" in frozen.values()
    with_positions = [r for n, r in frozen.items() if "wpe" in n]
    assert len(with_positions) == (family == "gpt2")


def test_tied_weights_are_one_parameter_read_twice() -> None:
    assert decoder(**TIED).structure.tied == {"model.embed_tokens.weight": 2}
    assert "lm_head.weight" not in decoder(**TIED).structure.analysis.sources
    assert decoder("gpt2").structure.tied == {"transformer.wte.weight": 2}
    assert decoder().structure.tied == {}


def test_rotary_pairs_are_one_group_over_all_layers() -> None:
    structure = decoder().structure
    (rotary,) = [
        g for g in structure.groups.values() if "model.rotary_emb.inv_freq" in {o.source for o in g.occurrences}
    ]
    assert (rotary.units, rotary.kind, rotary.layer) == (2, "inner", None)
    halves = {(o.source, o.place) for o in rotary.occurrences if o.source.endswith("layers.1.self_attn.q_proj.weight")}
    assert {place for _, place in halves} == {(2, 0), (2, 1)}


@pytest.mark.parametrize(("family", "changes"), [("llama", GQA), ("gpt_neox", {})])
def test_sdpa_and_eager_attention_give_the_same_groups(family: str, changes: dict[str, Any]) -> None:
    structures = [decoder(family, attention=a, **changes).structure for a in ("sdpa", "eager")]
    assert without_nodes(structures[0].to_dict()) == without_nodes(structures[1].to_dict())
    layer = structures[0].layers[0]
    names = [n.removeprefix(layer + ".") for n in structures[0].analysis.sources if n.startswith(layer + ".")]
    assert parameters_shown(structures[0], layer, names) == parameters_shown(structures[1], layer, names)


def without_nodes(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_nodes(v) for k, v in value.items() if k not in ("node", "reads", "statistics")}
    if isinstance(value, (list, tuple)):
        return [without_nodes(v) for v in value]
    return value


@every_family
def test_an_occurrence_is_where_its_group_is(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    seen: dict[Atom, int] = {}
    for group in structure.groups.values():
        atom = structure.atom(group.name)
        assert atom.size == group.units > 1
        for o in group.occurrences:
            assert at_place(structure.analysis.axes.find(structure.analysis.sources[o.source][o.dim]), o.place) is atom
            seen[atom] = seen.get(atom, 0) + 1
    for dims in structure.analysis.sources.values():
        for atom in (a for t in dims for a in structure.analysis.axes.atoms(t) if a in seen):
            seen[atom] -= 1
    assert set(seen.values()) == {0}
    for name, parameter in structure.analysis.graph_module.named_parameters():
        assert {o.source for g in structure.groups.values() for o in g.occurrences} >= {name}, parameter.shape


def at_place(term: Term, place: tuple[int, ...]) -> Term:
    for i in place:
        assert not isinstance(term, Atom)
        term = (term.factors if hasattr(term, "factors") else term.parts)[i]
    return term


@every_family
def test_a_structure_is_plain_data_and_a_graph(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    described = structure.to_dict()
    assert json.loads(json.dumps(described)) == json.loads(
        json.dumps(infer(decoder(family, **changes).graph).to_dict())
    )
    assert [g["name"] for g in described["groups"]] == list(structure.groups)
    graph = structure.to_networkx()
    kinds = nx.get_node_attributes(graph, "type")
    assert {n for n, kind in kinds.items() if kind == "group"} == set(structure.groups)
    assert nx.bipartite.is_bipartite(graph)
    marked = {frozenset(e) for e in graph.edges if graph.edges[e]["site"]}
    assert marked == {frozenset((g, s.parameter)) for s in structure.sites for g in s.groups}


@every_family
def test_the_boundaries_of_a_layer_are_on_the_residual_stream(family: str, changes: dict[str, Any]) -> None:
    structure = decoder(family, **changes).structure
    (first, second) = structure.boundaries()
    assert first[1] == second[0]
    nodes = {n.name: n for n in structure.analysis.graph_module.graph.nodes}
    (residual,) = [g.name for g in structure.groups.values() if g.kind == "residual"]
    for name in (*first, *second):
        assert structure.analysis.terms(nodes[name])[-1] is structure.atom(residual)


def test_an_unknown_group_is_refused_by_name() -> None:
    structure = decoder().structure
    with pytest.raises(PlanError, match=rf"^no group is called 'nope'; .* lists the {len(structure.groups)} groups"):
        structure.group("nope")


# -- by hand ----------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Two feed-forward blocks that share their inner projection: its channels are summed away at two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8)
        self.side = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).relu()
        return self.down(h) + self.side(h)


class Normed(nn.Module):
    """A norm over the channels before they are summed away."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))


def test_units_that_two_sites_sum_away_are_not_pruned_automatically() -> None:
    structure = infer(trace(Toy(Shared(), FeedForward())))
    assert [s.name for s in structure.sites if s.layer == 0] == ["layers.0.down.weight[1]", "layers.0.side.weight[1]"]
    assert len({s.groups for s in structure.sites if s.layer == 0}) == 1
    assert [s.name for s in structure.prunable_sites()] == ["layers.1.down.weight[1]"]


def test_units_under_a_norm_are_not_pruned_automatically() -> None:
    structure = infer(trace(Toy(Normed(), FeedForward())))
    assert [s.name for s in structure.prunable_sites()] == ["layers.1.down.weight[1]"]
    assert structure.group("layers.0.down.weight[1]").statistics


def test_a_site_that_does_not_write_to_the_residual_stream_is_not_pruned_automatically() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.middle, self.down = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.middle(self.up(x).relu()).relu())

    structure = infer(trace(Toy(Deep())))
    assert {s.name: s.writes_residual for s in structure.sites} == {
        "layers.0.middle.weight[1]": False,
        "layers.0.down.weight[1]": True,
    }
    assert [s.name for s in structure.prunable_sites()] == ["layers.0.down.weight[1]"]


def test_the_output_of_a_layer_is_the_last_value_that_leaves_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = FeedForward(), FeedForward()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            middle = x + self.first(x)
            return middle, middle + self.second(middle)

    class Early(Toy):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            middle, last = self.layers[0](self.embedding(input_ids))
            return self.out(middle + last)

    structure = infer(trace(Early(Block())))
    ((_, after),) = structure.boundaries()
    nodes = {n.name: n for n in structure.analysis.graph_module.graph.nodes}
    assert [n.name for n in nodes.values() if "add" in n.name][1] == after


def test_a_model_without_layers_has_no_prunable_site() -> None:
    class Flat(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            return self.out(x + self.down(self.up(x).relu()))

    structure = infer(trace(Flat()))
    assert structure.layers == []
    assert structure.prunable_sites() == []


def test_a_layer_off_the_residual_stream_has_no_boundaries() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)])
            self.out = nn.Linear(8, 10)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.layers[1](self.layers[0](self.embedding(input_ids)).relu()))

    with pytest.raises(GraphError, match=r"^layer layers\.0: found no value of the residual stream"):
        infer(trace(Stack())).boundaries()


def test_a_numbered_module_beside_the_residual_stream_is_no_layer() -> None:
    class Angles(nn.Module):
        def forward(self, positions: torch.Tensor) -> torch.Tensor:
            return positions.float().cos()

    class Beside(Toy):
        def __init__(self, *blocks: nn.Module) -> None:
            super().__init__(*blocks)
            self.tables = nn.ModuleList([Angles()])

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            angles = self.tables[0](torch.arange(input_ids.shape[1]))[:, None]
            for layer in self.layers:
                x = x + layer(x * angles)
            return self.out(x)

    structure = infer(trace(Beside(FeedForward(), FeedForward())))
    assert structure.layers == ["layers.0", "layers.1"]
    assert [s.layer for s in structure.prunable_sites()] == [0, 1]
    assert len(structure.boundaries()) == 2


def test_positions_of_a_batch_are_no_group() -> None:
    bench = Bench()
    bench(aten.add.Tensor, bench(aten.embedding.default, bench.source("w", 9, 4), bench.ids), bench.source("p", 3, 4))
    structure = infer(bench.module())
    assert {n: g.units for n, g in structure.groups.items()} == {"w[0]": 9, "w[1]": 4}
