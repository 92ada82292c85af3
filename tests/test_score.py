from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import RawSite, random_site, sites
from torch import Tensor

from slimgraph import score
from slimgraph.errors import CalibrationError, NumericsError, PlanError
from slimgraph.evidence import Evidence
from slimgraph.moments import Moments

fast = settings(max_examples=25, deadline=None)

SCORES: dict[str, Callable[[Evidence], Tensor]] = {
    "pearson_similarity": score.pearson_similarity,
    "feature_space": score.feature_space,
    "wanda": score.wanda,
    "magnitude": score.magnitude,
}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# --- closed forms equal the definitions ------------------------------------------------------------------------------


@fast
@given(site=sites())
@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_the_definition_on_activations(name: str, site: RawSite) -> None:
    scores = SCORES[name](site.evidence())
    assert scores.shape == (len(site.blocks),)
    assert scores.dtype == torch.float64
    close(scores, getattr(reference, name)(site))


@fast
@given(site=sites(), data=st.data())
def test_search_equals_swapping_on_activations(site: RawSite, data: st.DataObject) -> None:
    block_size = int((site.blocks == 0).sum())
    keep = data.draw(st.integers(1, block_size))
    evidence = site.evidence()
    assert score.pearson_select(evidence, keep, search=False).tolist() == reference.pearson_start(site, keep)
    kept, best = reference.pearson_search(site, keep)
    selected = score.pearson_select(evidence, keep)
    assert selected.dtype == torch.int64
    assert math.isclose(reference.correlation(site.output(selected.tolist()), site.dense), best, rel_tol=1e-9)
    if keep > 1 or site.weight.shape[0] > 1:  # else different swaps may tie exactly
        assert selected.tolist() == kept


def test_search_makes_several_swaps_in_a_row() -> None:
    # running sums over many accepted swaps still agree with the activations
    swaps = []
    for seed in range(12):
        site = random_site(seed, blocks=1, block_size=10, width=2, out=8, loose=1)
        kept, _ = reference.pearson_search(site, 5)
        assert score.pearson_select(site.evidence(), 5).tolist() == kept
        swaps.append(len(set(kept) - set(reference.pearson_start(site, 5))))
    assert max(swaps) >= 2


def test_search_never_does_worse_than_its_start() -> None:
    for seed in range(10):
        site = random_site(seed, blocks=1, block_size=6)
        start = score.pearson_select(site.evidence(), 3, search=False).tolist()
        found = score.pearson_select(site.evidence(), 3).tolist()
        best = max(reference.correlation(site.output(list(kept)), site.dense) for kept in combinations(range(6), 3))
        before, after = (reference.correlation(site.output(kept), site.dense) for kept in (start, found))
        assert before <= after <= best + 1e-12


@fast
@given(site=sites(), data=st.data())
def test_every_block_keeps_the_same_number(site: RawSite, data: st.DataObject) -> None:
    block_size = int((site.blocks == 0).sum())
    keep = data.draw(st.integers(1, block_size))
    for search in (False, True):
        kept = score.pearson_select(site.evidence(), keep, search=search)
        assert torch.bincount(site.blocks[kept]).tolist() == [keep] * (int(site.blocks.max()) + 1)
        assert kept.tolist() == sorted(set(kept.tolist()))


# --- degenerate sites ------------------------------------------------------------------------------------------------


def test_an_output_channel_that_does_not_vary_counts_zero() -> None:
    site = random_site(0, out=4)
    site.weight[2] = 0
    close(score.pearson_similarity(site.evidence()), reference.pearson_similarity(site))
    assert float(score.pearson_similarity(site.evidence()).max()) <= 3


def test_nothing_is_similar_without_the_only_unit() -> None:
    site = random_site(0, blocks=1, block_size=1, width=6)
    assert score.pearson_similarity(site.evidence()).tolist() == [0.0]
    assert score.pearson_select(site.evidence(), 1).tolist() == [0]


def test_a_rest_that_cancels_out_counts_zero() -> None:
    # the other two units contribute the opposite of each other, but for rounding: nothing is left without the first
    for seed in range(10):
        site = random_site(seed, blocks=1, block_size=3, width=1, out=8)
        second, third = (int((site.units == unit).nonzero()) for unit in (1, 2))
        site.x[:, third] = site.x[:, second] * 3
        site.weight[:, third] = site.weight[:, second] / -3
        assert float(score.pearson_similarity(site.evidence())[0]) == 0.0


def test_a_unit_that_does_nothing_goes_first() -> None:
    for seed in range(30):
        site = random_site(seed, blocks=1, block_size=4, out=1)
        site.weight[:, site.units == 2] *= 1e-12
        similarity = score.pearson_similarity(site.evidence())
        assert int(similarity.argmax()) == 2
        assert float(similarity[2]) == pytest.approx(1.0, rel=1e-12)
        assert float(similarity[2]) <= 1.0
        assert 2 not in score.pearson_select(site.evidence(), 3).tolist()


def test_equal_units_are_not_swapped_for_rounding() -> None:
    # units 0 and 3, 1 and 4, 2 and 5 share a block and contribute the same, by other numbers
    for seed in range(10):
        site = random_site(seed, blocks=3, block_size=2, width=1)
        twins = [(int((site.units == unit).nonzero()), int((site.units == unit + 3).nonzero())) for unit in range(3)]
        for one, other in twins:
            site.x[:, other] = site.x[:, one] * 3
            site.weight[:, other] = site.weight[:, one] / 3
        start = score.pearson_select(site.evidence(), 1, search=False)
        assert score.pearson_select(site.evidence(), 1).tolist() == start.tolist()


def test_eigenvalues_rounded_below_zero_count_as_zero() -> None:
    scatter = torch.diag(torch.tensor([1.0, -1e-3], dtype=torch.float64))
    form = score._importance_form(Moments(4, torch.zeros(2, dtype=torch.float64), scatter), torch.float64)
    close(form.diagonal(), torch.tensor([2.0, 0.0], dtype=torch.float64).sigmoid().square() - 0.25)


def test_constant_output_has_no_directions() -> None:
    site = dataclasses.replace(random_site(0, sources=0), x=torch.ones(10, 12, dtype=torch.float64))
    evidence = site.evidence()
    close(score.feature_space(evidence), 0.5 * score.feature_space(evidence, directions=False))


def test_a_bias_changes_no_score() -> None:
    with_bias = random_site(3)
    without = dataclasses.replace(with_bias, bias=None)
    for function in SCORES.values():
        assert function(with_bias.evidence()).equal(function(without.evidence()))


@pytest.mark.parametrize("name", ["pearson_similarity", "feature_space", "wanda"])
def test_scores_need_tokens(name: str) -> None:
    evidence = dataclasses.replace(random_site(0).evidence(), inputs=[])
    with pytest.raises(CalibrationError, match="no tokens"):
        SCORES[name](evidence)


@pytest.mark.parametrize("name", SCORES)
def test_bad_weights_are_refused_by_name(name: str) -> None:
    site = random_site(0)
    site.weight[1, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.7"):
        SCORES[name](site.evidence("layers.7"))
    with pytest.raises(NumericsError, match=r"layers\.7"):
        score.pearson_select(site.evidence("layers.7"), 1)


@pytest.mark.parametrize("name", ["feature_space", "magnitude"])
def test_bad_sources_are_refused_by_name(name: str) -> None:
    site = random_site(0)
    site.sources[1].weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"layers\.7"):
        SCORES[name](site.evidence("layers.7"))


@pytest.mark.parametrize("name", ["pearson_similarity", "feature_space", "wanda"])
def test_bad_activations_are_refused_by_name(name: str) -> None:
    site = random_site(0)
    site.x[5, 1] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.7"):
        SCORES[name](site.evidence("layers.7"))


@pytest.mark.parametrize("name", SCORES)
def test_float32_precision_is_close_to_float64(name: str) -> None:
    site = random_site(2, tokens=200, out=16, blocks=2, block_size=6, width=4)
    short = dataclasses.replace(site.evidence(), precision=torch.float32)
    torch.testing.assert_close(SCORES[name](short), SCORES[name](site.evidence()), rtol=2e-6, atol=2e-6)
    assert score.pearson_select(short, 3).equal(score.pearson_select(site.evidence(), 3))


@pytest.mark.parametrize("sizes", [[1] * 60, [59, 1], [20, 0, 40]])
@pytest.mark.parametrize("name", SCORES)
def test_scores_do_not_depend_on_the_batches(name: str, sizes: list[int]) -> None:
    site = random_site(4)
    parts = dataclasses.replace(site.evidence(), inputs=site.x.split(sizes))
    close(SCORES[name](parts), SCORES[name](site.evidence()))


# --- options and baselines -------------------------------------------------------------------------------------------


def test_feature_space_parts_can_be_switched_off() -> None:
    site = random_site(5, width=1)
    evidence = site.evidence()
    bare = dataclasses.replace(site, sources=())
    close(score.feature_space(evidence, sources=False), reference.feature_space(bare))

    plain = score.feature_space(evidence, directions=False, sources=False, activations=False)
    columns = [site.weight[:, site.units == unit].norm() for unit in range(len(site.blocks))]
    close(plain, torch.stack(columns))
    close(score.feature_space(evidence, directions=False, activations=False), reference.magnitude(site))

    weighed = score.feature_space(evidence, sources=False, activations=False)
    assert ((weighed >= plain / 2 - 1e-12) & (weighed <= plain + 1e-12)).all()
    norms = torch.stack([site.x[:, site.units == unit].norm() for unit in range(len(site.blocks))])
    close(score.feature_space(evidence, sources=False), weighed * norms)


def test_float32_weights_and_bfloat16_sources_give_float64_scores() -> None:
    site = random_site(5)
    evidence = site.evidence()
    sources = tuple(dataclasses.replace(s, weight=s.weight.bfloat16()) for s in evidence.sources)
    short = dataclasses.replace(evidence, weight=evidence.weight.float(), sources=sources)
    for function in SCORES.values():
        scores = function(short)
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores, function(evidence), rtol=1e-2, atol=0)


def test_random_scores_follow_the_seed() -> None:
    evidence = random_site(0).evidence()
    before = torch.get_rng_state()
    first = score.random_scores(evidence, 7)
    assert torch.get_rng_state().equal(before)
    assert first.shape == (6,)
    assert first.dtype == torch.float64
    assert first.equal(score.random_scores(evidence, 7))
    assert not first.equal(score.random_scores(evidence, 8))


# --- selection -------------------------------------------------------------------------------------------------------


@fast
@given(
    values=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    n_blocks=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
def test_select_top_equals_sorting_each_block(values: list[int], n_blocks: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, 12 // n_blocks))
    lowest = min(data.draw(st.integers(0, 3)), 12 // n_blocks)
    blocks = torch.arange(12) % n_blocks
    expected: list[int] = []
    for block in range(n_blocks):
        ranked = sorted(range(block, 12, n_blocks), key=lambda unit: (-values[unit], unit))
        low = min(lowest, keep)
        expected += ranked[: keep - low] + (ranked[-low:] if low else [])
    kept = score.select_top(torch.tensor(values, dtype=torch.float64), blocks, keep, lowest / (12 // n_blocks))
    assert kept.tolist() == sorted(expected)
    assert kept.dtype == torch.int64


def test_ties_go_to_the_lower_index() -> None:
    assert score.select_top(torch.ones(5), torch.zeros(5, dtype=torch.int64), 2).tolist() == [0, 1]


def test_keep_lowest_keeps_the_last_and_drops_the_next() -> None:
    scores = torch.arange(100.0)
    kept = score.select_top(scores, torch.zeros(100, dtype=torch.int64), 80, keep_lowest=0.01)
    assert kept.tolist() == [0, *range(21, 100)]


@pytest.mark.parametrize("keep", [0, -1, 4])
def test_impossible_counts_are_refused(keep: int) -> None:
    site = random_site(0)
    with pytest.raises(PlanError, match="smallest block has 3"):
        score.select_top(torch.arange(6.0), site.blocks, keep)
    with pytest.raises(PlanError, match="smallest block has 3"):
        score.pearson_select(site.evidence(), keep)


def test_bad_scores_and_shares_are_refused() -> None:
    blocks = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(NumericsError):
        score.select_top(torch.tensor([1.0, float("nan"), 2.0]), blocks, 1)
    with pytest.raises(PlanError, match="share"):
        score.select_top(torch.ones(3), blocks, 1, keep_lowest=1.5)
    with pytest.raises(PlanError, match="smallest block has 0"):
        score.select_top(torch.ones(0), torch.zeros(0, dtype=torch.int64), 1)
