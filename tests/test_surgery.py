"""Pruned graphs and modules compute what the dense model computes without the units that are gone."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from decoders import FeedForward, Toy, decoder, logits, make, own_graph, tokens
from labelled import Kept, free_groups
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import slimgraph
from slimgraph.errors import GraphError, ModelError
from slimgraph.groups import Structure, infer
from slimgraph.masked import masked_logits
from slimgraph.module import PrunedModule, agreement, prune_module
from slimgraph.passes import ApplyPlan
from slimgraph.plan import Cut, Plan, resolve
from slimgraph.state import State, attach, state_of
from slimgraph.surgery import Refit, assign, prune_graph, refresh_shapes
from slimgraph.trace import tensor_at, trace

IDS = tokens(3, 7)


def random_decoder(seed: int) -> dict[str, Any]:
    """A random configuration; sizes coincide often, so that they cannot be told apart by value."""
    dice = random.Random(seed)
    heads = dice.choice([2, 4, 6])
    head_dim = dice.choice([2, 4, 6])
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": dice.choice([n for n in (1, 2, 3, 6) if heads % n == 0]),
        "head_dim": head_dim,
        "hidden_size": dice.choice([n for n in (heads * head_dim, 6, 12, 24) if n % heads == 0]),
        "intermediate_size": dice.choice([heads * head_dim, heads, 5, 16]),
        "num_hidden_layers": dice.randint(1, 3),
        "tie_word_embeddings": dice.random() < 0.5,
        "attention_bias": dice.random() < 0.5,
        "mlp_bias": dice.random() < 0.5,
        "attention": dice.choice(["sdpa", "eager"]),
    }


DECODERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("phi3", {}),
    *(("llama", random_decoder(seed)) for seed in range(3)),
]
every_decoder = pytest.mark.parametrize(
    ("family", "changes"), DECODERS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(DECODERS)]
)


def site_plan(structure: Structure, seed: int, *, share: float = 0.7) -> Plan:
    """Random units gone at random sites: channels, heads, kv groups, as many heads of each kv group, or both."""
    dice = random.Random(seed)
    cuts: dict[str, Cut] = {}

    def keep(units: int, fewest: int = 1) -> list[int]:
        return sorted(dice.sample(range(units), dice.randint(fewest, units)))

    for site in structure.sites:
        if dice.random() > share:
            continue
        sizes = [structure.groups[g].units for g in site.groups]
        if len(sizes) == 1 or dice.random() < 0.5:
            cuts[site.groups[0]] = Cut(sizes[0], (tuple(keep(sizes[0])),))
        if len(sizes) == 2 and dice.random() < 0.7:
            kept = dice.randint(1, sizes[1])
            rows = tuple(tuple(sorted(dice.sample(range(sizes[1]), kept))) for _ in range(sizes[0]))
            cuts[site.groups[1]] = Cut(sizes[1], rows, site.groups[0])
    return Plan(cuts)


@contextmanager
def zeroed(model: nn.Module, structure: Structure, plan: Plan) -> Iterator[nn.Module]:
    """The dense model, with what the plan removes set to zero at the input of every site."""
    kept = Kept(structure, plan)
    handles = []
    for site in structure.sites:
        term = structure.analysis.sources[site.parameter][site.in_dim]
        mask = torch.zeros(site.channels, dtype=torch.float64)
        mask[kept.positions(term)] = 1
        owner = model.get_submodule(site.parameter.rpartition(".")[0])
        handles.append(owner.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask, *args[1:])))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def assert_equals_the_masked_model(model: nn.Module, structure: Structure, plan: Plan) -> PrunedModule:
    resolved = resolve(structure, plan)
    pruned = prune_graph(resolved)
    with zeroed(model, structure, plan):
        expected = logits(model, IDS)
    close(logits(pruned, IDS), expected)
    close(masked_logits(resolved, IDS), expected)
    module = prune_module(model, resolved, pruned)
    close(logits(module.module, IDS), expected)
    return module


@every_decoder
@pytest.mark.parametrize("seed", [0, 1])
def test_pruning_is_zeroing_at_the_sites(family: str, changes: dict[str, Any], seed: int) -> None:
    made = decoder(family, **changes)
    assert_equals_the_masked_model(made.model, made.structure, site_plan(made.structure, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 83))
def test_pruning_is_zeroing_at_the_sites_in_many_decoders(seed: int) -> None:
    made = decoder("llama", **random_decoder(seed))
    for plan in range(5):
        assert_equals_the_masked_model(made.model, made.structure, site_plan(made.structure, plan))
    decoder.cache_clear()


@every_decoder
def test_keeping_everything_changes_nothing(family: str, changes: dict[str, Any]) -> None:
    made = decoder(family, **changes)
    units = {name: made.structure.groups[name].units for name in free_groups(made.structure)}
    whole = Plan({name: Cut(n, (tuple(range(n)),)) for name, n in units.items()})
    dense = logits(made.model, IDS)
    assert torch.equal(logits(made.graph, IDS), dense)
    for plan in (Plan(), whole):
        pruned = prune_graph(resolve(made.structure, plan))
        assert torch.equal(logits(pruned, IDS), dense)
        module = prune_module(made.model, resolve(made.structure, plan), pruned)
        assert torch.equal(logits(module.module, IDS), dense)
        assert (module.shapes, module.attributes, module.added) == ({}, {}, {})


def test_tensors_that_lose_nothing_are_shared() -> None:
    made = decoder()
    (channels,) = next(s.groups for s in made.structure.sites if s.kind == "channels")
    pruned = prune_graph(resolve(made.structure, Plan({channels: Cut(20, ((0, 3),))})))
    dense = dict(made.graph.named_parameters())
    own = {name for name, p in pruned.named_parameters() if p is not dense[name]}
    assert own == {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_surgery_leaves_its_input_alone() -> None:
    made = decoder("gpt2")
    weights = {n: (p, p.clone()) for n, p in made.graph.named_parameters()}
    code, described, links = str(made.graph.graph), made.structure.to_dict(), len(made.structure.analysis.axes.links)
    shapes = {n.name: str(n.meta.get("val")) for n in made.graph.graph.nodes}
    attributes = {(p, k): v for p, m in made.model.named_modules() for k, v in vars(m).items() if isinstance(v, int)}
    resolved = resolve(made.structure, site_plan(made.structure, 3, share=1.0))
    prune_module(made.model, resolved, prune_graph(resolved))
    assert str(made.graph.graph) == code
    assert made.structure.to_dict() == described
    assert len(made.structure.analysis.axes.links) == links
    assert {n.name: str(n.meta.get("val")) for n in made.graph.graph.nodes} == shapes
    for name, parameter in made.graph.named_parameters():
        assert parameter is weights[name][0]
        assert torch.equal(parameter, weights[name][1])
    now = {(p, k): v for p, m in made.model.named_modules() for k, v in vars(m).items() if isinstance(v, int)}
    assert now == attributes


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_shapes_in_the_metadata_are_those_of_a_run(family: str) -> None:
    made = decoder(family)
    pruned = prune_graph(resolve(made.structure, site_plan(made.structure, 1, share=1.0)))
    (ids,) = pruned.graph.find_nodes(op="placeholder")
    here = dict(zip((n.node.expr for n in ids.meta["val"].shape), IDS.shape, strict=True))

    class Compare(fx.Interpreter):
        seen = 0

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "output":
                return value
            for one, example in zip(as_list(value), as_list(n.meta.get("val")), strict=False):
                if isinstance(one, Tensor):
                    assert list(one.shape) == [number(s, here) for s in example.shape], n
                    assert one.dtype == example.dtype
                    self.seen += 1
            return value

    compare = Compare(pruned)
    with torch.no_grad():
        compare.run(IDS)
    assert compare.seen > 50


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def number(size: Any, symbols: Mapping[sympy.Symbol, int]) -> int:
    return size if isinstance(size, int) else int(size.node.expr.subs(symbols))


# -- inside heads, and the residual stream ----------------------------------------------------------------------------


def test_positions_inside_value_heads_can_go_in_the_graph() -> None:
    made = decoder()
    name = "model.layers.1.self_attn.v_proj.weight[0].1"
    plan = Plan({name: Cut(4, ((0, 3),))})
    with zeroed(made.model, made.structure, plan):
        close(logits(prune_graph(resolve(made.structure, plan)), IDS), logits(made.model, IDS))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rotary_pairs_can_go_in_the_graph(attention: str) -> None:
    made = decoder(attention=attention)
    name = next(n for n, g in made.structure.groups.items() if "inv_freq" in str(g.occurrences))
    plan = Plan({name: Cut(2, ((1,),))})
    masked = copy.deepcopy(made.model)
    with torch.no_grad():
        for layer in masked.model.layers:
            layer.self_attn.q_proj.weight.view(6, 2, 2, 24)[:, :, 0] = 0
    close(logits(prune_graph(resolve(made.structure, plan)), IDS), logits(masked, IDS))


def test_a_narrower_residual_stream_is_a_narrower_model() -> None:
    made = decoder()
    (residual,) = [g for g in made.structure.groups.values() if g.kind == "residual"]
    keep = [0, 2, 3, 5, 7, 8, 12, 13, 17, 20, 22, 23]
    plan = Plan({residual.name: Cut(24, (tuple(keep),))})
    narrow = LlamaForCausalLM(LlamaConfig(**{**made.model.config.to_diff_dict(), "hidden_size": 12})).double().eval()
    weights = {}
    for name, tensor in made.model.state_dict().items():
        for dim in range(tensor.ndim):
            if tensor.shape[dim] == 24 and not (dim == 0 and "q_proj" in name) and not (dim == 1 and "o_proj" in name):
                tensor = tensor.index_select(dim, torch.tensor(keep))
        weights[name] = tensor
    narrow.load_state_dict(weights)
    resolved = resolve(made.structure, plan)
    pruned = prune_graph(resolved)
    close(logits(pruned, IDS), logits(narrow, IDS))
    close(masked_logits(resolved, IDS), logits(narrow, IDS))
    close(logits(prune_module(made.model, resolved, pruned).module, IDS), logits(narrow, IDS))


def test_every_free_group_of_a_decoder_can_be_cut_exactly_in_the_graph() -> None:
    structure = decoder("gpt_neox").structure
    for name in free_groups(structure):
        units = structure.groups[name].units
        resolved = resolve(structure, Plan({name: Cut(units, (tuple(range(1, units)),))}))
        close(logits(prune_graph(resolved), IDS), masked_logits(resolved, IDS))


# -- the module -------------------------------------------------------------------------------------------------------


def uneven_plan(structure: Structure) -> Plan:
    """Different numbers of heads and channels in the two layers."""
    cuts = {}
    for i, site in enumerate(structure.sites):
        units = structure.groups[site.groups[-1]].units
        rows = structure.groups[site.groups[0]].units if len(site.groups) == 2 else 1
        keep = tuple(range(i % 2, units, 1 + i // 2)) if units > 2 else (1,)
        cuts[site.groups[-1]] = Cut(units, (keep,) * rows, site.groups[0] if rows > 1 else None)
    return Plan(cuts)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"attention": "eager"}), ("gpt2", {}), ("gpt_neox", {}), ("phi3", {})],
)
def test_generation_with_a_cache_equals_generation_without(family: str, changes: dict[str, Any]) -> None:
    made = decoder(family, **changes)
    module = assert_equals_the_masked_model(made.model, made.structure, uneven_plan(made.structure)).module
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = module.generate(IDS, use_cache=True, **options)
    assert with_cache.shape == (3, 13)
    assert torch.equal(with_cache, module.generate(IDS, use_cache=False, **options))
    ids = IDS
    for _ in range(6):
        ids = torch.cat([ids, logits(module, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(with_cache, ids)


@pytest.mark.parametrize(("changes", "padded"), [({}, slice(0, 3)), ({"attention": "eager"}, slice(4, 7))])
def test_padding_is_masked_as_before(changes: dict[str, Any], padded: slice) -> None:
    made = decoder(**changes)
    plan = uneven_plan(made.structure)
    resolved = resolve(made.structure, plan)
    module = prune_module(made.model, resolved, prune_graph(resolved)).module
    mask = torch.ones_like(IDS)
    mask[0, padded] = 0
    options = {"input_ids": IDS, "attention_mask": mask, "use_cache": False}
    with zeroed(made.model, made.structure, plan), torch.no_grad():
        expected = made.model(**options).logits
    with torch.no_grad():
        close(module(**options).logits[mask.bool()], expected[mask.bool()])
    assert not torch.equal(expected[0], logits(module, IDS)[0])


def test_attributes_that_hold_old_sizes_are_found() -> None:
    made = decoder()
    module = assert_equals_the_masked_model(made.model, made.structure, uneven_plan(made.structure))
    assert module.difference <= 1e-9
    attention = module.module.model.layers[0].self_attn
    assert attention.num_key_value_groups == 1
    assert made.model.model.layers[0].self_attn.num_key_value_groups == 2
    assert module.attributes["model.layers.0.self_attn"]["num_key_value_groups"] == 1
    for name, shape in module.shapes.items():
        assert list(tensor_at(module.module, name).shape) == shape
        assert list(tensor_at(made.model, name).shape) == module.original_shapes[name] != shape
    for linear in (m for m in module.module.modules() if isinstance(m, nn.Linear)):
        assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)


@pytest.mark.parametrize("read", [False, True])
def test_the_number_of_a_layer_is_not_taken_for_a_width(read: bool) -> None:
    """Of three layers the last has the number 2, as many as it has heads; no other number could be a width."""

    class Reading(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            assert self.layer_idx < 3
            return super().forward(*args, **kwargs)

    model = make(num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2)
    for layer in model.model.layers if read else ():
        layer.self_attn.__class__ = Reading
    structure = infer(trace(model))
    names = [g.name for g in structure.groups.values() if g.kind == "heads"]
    resolved = resolve(structure, Plan({name: Cut(2, ((1,),)) for name in names}))
    pruned = prune_module(model, resolved, prune_graph(resolved)).module
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1, 2]
    with torch.no_grad():
        cache = pruned(IDS[:, :5], use_cache=True).past_key_values
        close(pruned(IDS[:, 5:], past_key_values=cache).logits, logits(pruned, IDS)[:, 5:])


def test_a_width_that_stays_is_not_taken_for_one_that_goes() -> None:
    # 6 heads of 4 and the residual stream are both 24 wide; the layers say 24 and do not read it
    made = decoder()
    resolved = resolve(made.structure, uneven_plan(made.structure))
    module = prune_module(made.model, resolved, prune_graph(resolved)).module
    assert [layer.hidden_size for layer in module.model.layers] == [24, 24]


def test_a_module_that_cannot_be_pruned_says_so_and_leaves_the_graph() -> None:
    made = decoder()
    name = "model.layers.1.self_attn.v_proj.weight[0].1"
    resolved = resolve(made.structure, Plan({name: Cut(4, ((0, 3),))}))
    pruned = prune_graph(resolved)
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM: the module .* does not agree with the pruned graph"):
        prune_module(made.model, resolved, pruned)
    close(logits(pruned, IDS), masked_logits(resolved, IDS))


def test_a_model_in_training_mode_is_pruned_and_stays_so() -> None:
    model = make("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    result = slimgraph.prune(model, IDS, 0.1, recipe="magnitude", round_to=1)
    assert result.module_failure is None
    assert result.model is not None
    assert model.training
    assert result.model.training


def test_agreement_is_the_relative_difference_of_logits() -> None:
    made = decoder()
    assert agreement(made.model, made.graph, IDS) == 0
    other = copy.deepcopy(made.model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    assert agreement(other, made.graph, IDS) == pytest.approx(0.5)


# -- refits -----------------------------------------------------------------------------------------------------------


class Multiplied(nn.Module):
    """A feed-forward block whose output projection is a bare product."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 6)
        self.down = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).relu() @ self.down


def refits_for(structure: Structure, plan: Plan, *, bias: bool) -> dict[str, Refit]:
    resolved = resolve(structure, plan)
    made = {}
    for i, site in enumerate(structure.sites):
        weight = resolved.select(site.parameter, tensor_at(structure.analysis.graph_module, site.parameter))
        shape = (weight.shape[site.out_dim], weight.shape[site.in_dim])
        generator = torch.Generator().manual_seed(i)
        new = torch.randn(shape, dtype=torch.float64, generator=generator)
        made[site.name] = Refit(new, torch.randn(shape[0], dtype=torch.float64, generator=generator) if bias else None)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt2", {}), ("llama", random_decoder(1))])
def test_a_refitted_site_has_the_new_projection(family: str, changes: dict[str, Any], bias: bool) -> None:
    made = decoder(family, **changes)
    plan = site_plan(made.structure, 2, share=1.0)
    refits = refits_for(made.structure, plan, bias=bias)
    resolved = resolve(made.structure, plan)
    pruned = prune_graph(resolved, refits)
    kept = Kept(made.structure, plan)

    reference = copy.deepcopy(made.model)
    for site in made.structure.sites:
        owner = reference.get_submodule(site.parameter.rpartition(".")[0])
        columns = kept.positions(made.structure.analysis.sources[site.parameter][site.in_dim])
        whole = torch.zeros(owner.weight.shape, dtype=torch.float64).transpose(0, 1 - site.in_dim)
        whole[:, columns] = refits[site.name].weight
        owner.weight = nn.Parameter(whole.transpose(0, 1 - site.in_dim))
        if refits[site.name].bias is not None:
            owner.bias = nn.Parameter(refits[site.name].bias)
    close(logits(pruned, IDS), logits(reference, IDS))

    module = prune_module(made.model, resolved, pruned, refits)
    close(logits(module.module, IDS), logits(reference, IDS))
    gained = {f"{s.parameter.rpartition('.')[0]}.bias" for s in made.structure.sites if s.bias is None and bias}
    assert module.added.keys() == gained
    assert {n for n, _ in pruned.named_parameters()} - {n for n, _ in made.graph.named_parameters()} == gained


def test_a_bare_product_gains_a_bias_in_the_graph() -> None:
    torch.manual_seed(0)
    model = Toy(Multiplied())
    graph = trace(model)
    structure = infer(graph)
    (site,) = structure.sites
    assert (site.in_dim, site.bias) == (0, None)
    plan = Plan({site.groups[0]: Cut(6, ((1, 2, 5),))})
    refits = refits_for(structure, plan, bias=True)
    pruned = prune_graph(resolve(structure, plan), refits)
    with torch.no_grad():
        x = model.embedding(IDS)
        hidden = model.layers[0].up(x).relu()[..., [1, 2, 5]]
        refit = refits[site.name]
        expected = model.out(x + hidden @ refit.weight.T + refit.bias)
    close(logits(pruned, IDS), expected)
    assert infer(pruned).sites[0].channels == 3


def test_a_refit_of_the_wrong_shape_is_refused() -> None:
    made = decoder()
    site = made.structure.sites[1]
    plan = Plan({site.groups[0]: Cut(20, ((0, 1),))})
    with pytest.raises(GraphError, match=r"a refit of shape \(24, 3\), expected \(24, 2\)$"):
        prune_graph(resolve(made.structure, plan), {site.name: Refit(torch.zeros(24, 3), None)})


# -- graphs that are written in other ways ----------------------------------------------------------------------------


class MergedAttention(nn.Module):
    """Attention that merges batch and heads into one dimension, with sizes that it asks the input for."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.o = nn.Linear(12, 8)
        self.heads, self.width = 3, 4

    def split(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = x.view(batch, length, self.heads, self.width).transpose(1, 2)
        return split.reshape(batch * self.heads, length, self.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        joined = mixed.view(batch, self.heads, length, self.width).transpose(1, 2).reshape(batch, length, -1)
        return self.o(joined)


def test_heads_that_are_merged_with_the_batch_can_go() -> None:
    torch.manual_seed(0)
    model = Toy(MergedAttention(), FeedForward())
    structure = infer(trace(model))
    assert [s.kind for s in structure.sites] == ["heads", "channels"]
    plan = Plan({structure.sites[0].groups[0]: Cut(3, ((0, 2),)), structure.sites[1].groups[0]: Cut(6, ((1,),))})
    module = prune_module(model, resolve(structure, plan), prune_graph(resolve(structure, plan)))
    with zeroed(model, structure, plan), torch.no_grad():
        expected = model(IDS)
    close(logits(prune_graph(resolve(structure, plan)), IDS), expected)
    with torch.no_grad():
        close(module.module(IDS), expected)
    assert module.attributes["layers.0"]["heads"] == 2


# -- the plan again, and checkpoints ----------------------------------------------------------------------------------


def test_a_plan_replayed_by_a_pass_gives_the_same_graph() -> None:
    made = decoder()
    plan = site_plan(made.structure, 5, share=1.0)
    direct = prune_graph(resolve(made.structure, plan))
    graph_module = attach(own_graph(made), State())
    replayed = ApplyPlan(plan.to_dict())(graph_module)
    assert replayed.modified
    assert state_of(replayed.graph_module).plan == plan
    assert str(replayed.graph_module.graph) == str(direct.graph)
    weights = dict(direct.named_parameters())
    for name, parameter in replayed.graph_module.named_parameters():
        assert torch.equal(parameter, weights.pop(name))
    assert not weights


def test_a_pruned_graph_can_be_pruned_again() -> None:
    made = decoder()
    once = prune_graph(resolve(made.structure, site_plan(made.structure, 6, share=1.0)))
    structure = infer(once)
    resolved = resolve(structure, site_plan(structure, 7, share=1.0))
    close(logits(prune_graph(resolved), IDS), masked_logits(resolved, IDS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A checkpoint of a model that was pruned with all the trimmings, and its logits."""
    model = make(attention_bias=True)
    result = slimgraph.prune(model, tokens(8, 12, seed=1), 0.2, round_to=1)
    assert result.model is not None
    directory = tmp_path_factory.mktemp("saved") / "model"
    result.save(directory)
    close(logits(result.graph, IDS), logits(result.model, IDS))
    return directory, logits(result.model, IDS)


def test_a_checkpoint_gives_the_same_logits(saved: tuple[Path, Tensor]) -> None:
    directory, expected = saved
    assert torch.equal(logits(slimgraph.load(directory), IDS), expected)


def test_a_checkpoint_gives_the_same_logits_in_a_new_process(saved: tuple[Path, Tensor], tmp_path: Path) -> None:
    directory, expected = saved
    torch.save(IDS, tmp_path / "ids.pt")
    script = (
        "import sys, torch, slimgraph\n"
        "model = slimgraph.load(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    torch.save(model(input_ids=torch.load(sys.argv[2]), use_cache=False).logits, sys.argv[3])\n"
    )
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, directory, tmp_path / "ids.pt", out], check=True)
    assert torch.equal(torch.load(out), expected)


# -- small parts ------------------------------------------------------------------------------------------------------


def test_assign_makes_modules_on_the_way_and_keeps_kinds() -> None:
    root = nn.Module()
    assign(root, "a.b.weight", nn.Parameter(torch.ones(2)))
    assign(root, "a.steps", torch.arange(3))
    assert [n for n, _ in root.named_parameters()] == ["a.b.weight"]
    assert [n for n, _ in root.named_buffers()] == ["a.steps"]


def test_shapes_that_do_not_fit_any_more_are_refused_by_node() -> None:
    graph_module = trace(Toy(FeedForward()))
    assign(graph_module, "layers.0.down.weight", nn.Parameter(torch.zeros(8, 5, dtype=torch.float64)))
    with pytest.raises(GraphError, match=r"^linear_1: aten\.linear\.default does not fit its inputs any more"):
        refresh_shapes(graph_module)
