"""A model that was pruned, saved and pruned again: what its checkpoint says against the first and the one between."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from decoders import MANY_HEADS, logits, make, tokens

import slimgraph
from slimgraph import hf
from slimgraph.debug.bisect import bisect
from slimgraph.debug.diff import diff
from slimgraph.debug.page import html_report
from slimgraph.debug.verify import verify
from slimgraph.errors import PlanError
from slimgraph.manifest import Manifest
from slimgraph.pipeline import Result
from slimgraph.plan import Plan, resolve
from slimgraph.recipe import method
from slimgraph.streaming import prune_checkpoint
from slimgraph.surgery import prune_graph

IDS = tokens(6, 9, seed=3)
FIRST = method("slimllm", 0.2, heads="balanced", round_to=1)
SECOND = method("slimllm", 0.2, heads="kv", round_to=1)


@dataclass
class Chain:
    """A dense model, the one between, and the last one."""

    dense: Path
    between: Path
    last: Path
    first: Result
    second: Result

    @property
    def manifest(self) -> Manifest:
        found = slimgraph.load(self.last).config.quantization_config.manifest
        assert isinstance(found, Manifest)
        return found


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    place = tmp_path_factory.mktemp("chain")
    dense, between, last = place / "dense", place / "between", place / "last"
    make("llama", **MANY_HEADS).save_pretrained(dense)
    first = slimgraph.prune(slimgraph.load(dense), IDS, recipe=FIRST)
    first.save(between)
    second = slimgraph.prune(slimgraph.load(between), IDS, recipe=SECOND)
    second.save(last)
    return Chain(dense, between, last, first, second)


def test_heads_were_chosen_differently_in_both_steps(chain: Chain) -> None:
    assert any(cut.within for cut in chain.first.plan.cuts.values())
    assert not any(cut.within for cut in chain.second.plan.cuts.values())
    assert chain.first.plan.cuts.keys() & chain.second.plan.cuts.keys()


def test_the_plan_is_both_in_one(chain: Chain) -> None:
    said = Plan.from_dict(chain.manifest.plan)
    assert said == chain.first.plan.then(chain.second.plan)
    resolved = resolve(chain.first.structure, said)
    graph = dict(prune_graph(resolved).named_parameters())
    last = dict(slimgraph.load(chain.last).named_parameters())
    assert {name: p.shape for name, p in last.items() if name in graph} == {name: p.shape for name, p in graph.items()}


def test_a_streamed_step_says_the_same(chain: Chain, tmp_path: Path) -> None:
    prune_checkpoint(chain.between, tmp_path / "last", IDS, recipe=SECOND, dtype=torch.float64)
    found = slimgraph.load(tmp_path / "last").config.quantization_config.manifest
    assert found.plan == chain.manifest.plan
    assert found.recipe["notes"]["earlier"] == chain.manifest.recipe["notes"]["earlier"]


def test_the_earlier_recipe_is_among_the_notes(chain: Chain) -> None:
    recipe = chain.manifest.recipe
    assert recipe["passes"] == chain.second.recipe["passes"]
    assert recipe["notes"]["earlier"] == chain.first.recipe


@pytest.mark.parametrize("against", ["dense", "between"])
def test_every_check_passes_against_both(chain: Chain, against: str) -> None:
    found = verify(chain.last, against=getattr(chain, against))
    assert [(c.name, c.detail) for c in found.checks if c.passed is not True] == []


def test_a_difference_counts_from_the_model_it_is_to(chain: Chain) -> None:
    whole, step = diff(chain.dense, chain.last), diff(chain.between, chain.last)
    assert not whole.notes
    assert not step.notes
    assert {g.group: g.removed for g in step.groups} == {
        name: tuple(tuple(sorted(set(range(cut.units)) - set(row))) for row in cut.keep)
        for name, cut in chain.second.plan.cuts.items()
    }
    assert {g.group for g in whole.groups} == chain.first.plan.cuts.keys() | chain.second.plan.cuts.keys()


@pytest.mark.parametrize("against", ["dense", "between"])
def test_errors_are_those_of_the_refitted_sites(chain: Chain, against: str) -> None:
    found = bisect(getattr(chain, against), chain.last, IDS.flatten(), seq_len=9, restore=False, dtype=torch.float64)
    assert found.planned
    assert not found.faults


def test_the_report_is_of_both_steps(chain: Chain) -> None:
    report = html_report(chain.last)
    said = Plan.from_dict(chain.manifest.plan)
    assert {g.group: g.kept for g in report.difference.groups} == {
        name: cut.kept * len(cut.keep) for name, cut in said.cuts.items()
    }
    assert "earlier" in report.html()


def test_a_model_that_it_was_not_made_from(chain: Chain, tmp_path: Path) -> None:
    other = slimgraph.prune(slimgraph.load(chain.dense), IDS, recipe=method("random", 0.3, round_to=1))
    other.save(tmp_path / "other")
    failed = {c.name: c.detail for c in verify(chain.last, against=tmp_path / "other").failures}
    assert failed.keys() == {"slices", "masked equivalence"}
    with pytest.raises(PlanError, match="the earlier plan"):
        bisect(tmp_path / "other", chain.last, IDS.flatten(), seq_len=9)


def test_results_in_memory_are_pruned_again_and_save_themselves(tmp_path: Path) -> None:
    dense = make("llama", **MANY_HEADS)
    first = slimgraph.prune(dense, IDS, recipe=FIRST)
    second = slimgraph.prune(first.model, IDS, recipe=SECOND)
    assert [hf.manifest_of(each) is None for each in (dense, first.model, second.model)] == [True, False, False]
    for name, result in (("first", first), ("second", second)):
        result.model.save_pretrained(tmp_path / name)
        loaded = slimgraph.load(tmp_path / name)
        assert logits(loaded, IDS).equal(logits(result.model, IDS))
        assert hf.manifest_of(loaded) == result.manifest()
    assert Plan.from_dict(second.manifest().plan) == first.plan.then(second.plan)
