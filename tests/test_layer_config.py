"""Widths of layers under the configuration's own names, proved by building the class."""

import torch

import slimgraph


def test_widths_that_differ_are_named_and_a_coincidence_is_not(tiny_llama):
    model = tiny_llama(eos_token_id=48, intermediate_size=48)  # the token id has the value of a width
    ids = torch.randint(0, 40, (6, 16), generator=torch.Generator().manual_seed(0))
    result = slimgraph.prune(model, ids, ratio=0.15, round_to=4)
    widths = result.manifest().per_layer_config
    assert widths
    for layer, entries in widths.items():
        rows = result.manifest().shapes[f"model.layers.{layer}.mlp.up_proj.weight"][0]
        assert entries["intermediate_size"] == rows < 48
        assert "eos_token_id" not in entries


def test_a_layer_that_is_left_alone_has_no_entry(tiny_llama):
    model = tiny_llama()
    structure = slimgraph.infer(slimgraph.trace(model))
    site = next(s for s in structure.prunable_sites() if s.kind == "channels" and s.layer == 0)
    n = structure.groups[site.groups[0]].units
    from slimgraph.layer_config import layer_widths
    from slimgraph.plan import resolve

    resolved = resolve(structure, slimgraph.Plan({site.groups[0]: slimgraph.Cut(n, (tuple(range(n - 8)),))}))
    shapes = {k: list(resolved.shape(k)) for k in resolved.selections}
    assert layer_widths(model, resolved, shapes) == {0: {"intermediate_size": n - 8}}
