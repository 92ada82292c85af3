"""Full least squares against its definition, what it is fitted to, and the dense model that runs beside."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from decoders import decoder, logits, make, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import RawSite, cases, random_site
from torch import Tensor, nn

import slimgraph
from slimgraph import recover
from slimgraph.errors import CalibrationError, NumericsError, RecipeError
from slimgraph.evidence import Evidence, Twin
from slimgraph.execute import Observer, run
from slimgraph.groups import Structure
from slimgraph.moments import Norms
from slimgraph.passes import CosineAllocation, LeastSquares, Magnitude, Sweep, UniformAllocation
from slimgraph.recipe import Recipe
from slimgraph.shards import Shards
from slimgraph.streaming import prune_checkpoint
from slimgraph.surgery import Refit
from slimgraph.sweep import Decision, sweep
from slimgraph.units import Units, units_of

IDS = tokens(6, 9, seed=3)
fast = settings(max_examples=20, deadline=None)

# -- references -------------------------------------------------------------------------------------------------------


def with_twin(site: RawSite, seed: int = 0, *, stream: bool = True, parts: int = 1) -> tuple[Evidence, Twin]:
    """Evidence whose dense model holds something else than the pruned one; the twin in one piece."""
    generator = torch.Generator().manual_seed(seed)
    inputs = site.x + 0.3 * torch.randn(site.x.shape, dtype=torch.float64, generator=generator) + 0.1
    shape = (2, len(site.x), len(site.weight))
    pruned, dense = torch.randn(shape, dtype=torch.float64, generator=generator) + 3
    whole = Twin([inputs], ([pruned], [dense]) if stream else None)
    sizes = [len(site.x) - 7 * (parts - 1)] + [7] * (parts - 1)
    split = Twin(inputs.split(sizes), (pruned.split(sizes), dense.split(sizes)) if stream else None)
    return dataclasses.replace(site.evidence(), inputs=site.x.split(sizes), twin=split), whole


def targets_of(site: RawSite, twin: Twin, target: str) -> Tensor:
    """(tokens, out) by definition, without bias."""
    if target == "local" or (target == "stream" and twin.stream is None):
        return site.x @ site.weight.T
    y = twin.inputs[0] @ site.weight.T
    if target == "stream" and twin.stream is not None:
        pruned, dense = twin.stream
        assert dense is not None
        y = y + dense[0] - pruned[0]
    return y


def bias_of(site: RawSite) -> Tensor:
    return torch.zeros(len(site.weight), dtype=torch.float64) if site.bias is None else site.bias


def ridge(site: RawSite, channels: Tensor, target: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """Rows for the tokens, and more rows for the prior, whose target is what the regression makes of them."""
    x, start = site.x[:, channels], site.weight[:, channels]
    slopes = [torch.cov(torch.stack([x @ w, t])) for w, t in zip(start, target.T, strict=True)]
    start = torch.stack([s[0, 1] / s[0, 0] * w for s, w in zip(slopes, start, strict=True)])
    strength = (prior * x.var(0, correction=0).mean()).sqrt()
    rows = torch.cat([x - x.mean(0), strength * torch.eye(len(channels), dtype=torch.float64)])
    wanted = torch.cat([target - target.mean(0), strength * start.T])
    weight = torch.linalg.lstsq(rows, wanted).solution.T
    return weight, target.mean(0) - weight @ x.mean(0) + bias_of(site)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


TARGETS = ["local", "dense", "stream"]

# -- the fit ----------------------------------------------------------------------------------------------------------


@fast
@given(case=cases(40, 80), target=st.sampled_from(TARGETS))
def test_without_a_prior_it_is_the_least_squares_fit_with_intercept(case: tuple[RawSite, Tensor], target: str) -> None:
    site, channels = case
    evidence, twin = with_twin(site)
    weight, bias = recover.least_squares(evidence, channels, target=target, prior=0.0)
    x = torch.cat([site.x[:, channels], torch.ones(len(site.x), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(x, targets_of(site, twin, target)).solution.T
    close(weight, expected[:, :-1], 1e-6)
    close(bias, expected[:, -1] + bias_of(site), 1e-6)


@fast
@given(case=cases(40, 80), target=st.sampled_from(TARGETS), prior=st.sampled_from([0.5, 30.0, 4096.0]))
def test_with_a_prior_it_is_a_ridge_towards_the_regression(
    case: tuple[RawSite, Tensor], target: str, prior: float
) -> None:
    site, channels = case
    evidence, twin = with_twin(site)
    weight, bias = recover.least_squares(evidence, channels, target=target, prior=prior)
    expected_weight, expected_bias = ridge(site, channels, targets_of(site, twin, target), prior)
    close(weight, expected_weight, 1e-7)
    close(bias, expected_bias, 1e-7)


@fast
@given(case=cases(40, 80), target=st.sampled_from(["dense", "stream"]), correction=st.sampled_from([0.5, 30.0, 4096.0]))
def test_a_correction_is_a_ridge_towards_the_local_fit(
    case: tuple[RawSite, Tensor], target: str, correction: float
) -> None:
    site, channels = case
    evidence, twin = with_twin(site)
    weight, bias = recover.least_squares(evidence, channels, target=target, prior=30.0, correction=correction)
    start, _ = ridge(site, channels, targets_of(site, twin, "local"), 30.0)
    x, t = site.x[:, channels], targets_of(site, twin, target)
    strength = (correction * x.var(0, correction=0).mean()).sqrt()
    rows = torch.cat([x - x.mean(0), strength * torch.eye(len(channels), dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([t - t.mean(0), strength * start.T])).solution.T
    close(weight, expected, 1e-7)
    close(bias, t.mean(0) - expected @ x.mean(0) + bias_of(site), 1e-7)


def test_an_infinite_correction_leaves_the_local_weight_and_a_correction_of_nothing_the_target() -> None:
    site, channels = random_site(3), torch.tensor([0, 2, 5, 7])
    evidence, twin = with_twin(site)
    local, _ = recover.least_squares(evidence, channels, prior=5.0)
    weight, bias = recover.least_squares(evidence, channels, target="stream", prior=5.0, correction=math.inf)
    close(weight, local)
    fitted = site.x[:, channels] @ weight.T + bias
    close(fitted.mean(0), targets_of(site, twin, "stream").mean(0) + bias_of(site))
    without = recover.least_squares(evidence, channels, target="stream", prior=5.0, correction=0.0)
    for a, b in zip(without, recover.least_squares(evidence, channels, target="stream", prior=0.0), strict=True):
        close(a, b, 1e-6)


@fast
@given(case=cases(40, 80))
def test_with_an_infinite_prior_it_is_the_regression(case: tuple[RawSite, Tensor]) -> None:
    site, channels = case
    found = recover.least_squares(site.evidence(), channels, prior=math.inf)
    for a, b in zip(found, recover.regression(site.evidence(), channels), strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("prior", [0.0, 10.0, 4096.0, math.inf])
@pytest.mark.parametrize("bias", [True, False])
def test_keeping_everything_changes_nothing(prior: float, bias: bool) -> None:
    site = random_site(0, loose=1, bias=bias)
    weight, found = recover.least_squares(site.evidence(), torch.arange(site.x.shape[1]), prior=prior)
    close(weight, site.weight, 1e-12)
    close(found, bias_of(site), 1e-10)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fewer_tokens_than_channels_give_numbers_or_an_error(count: int) -> None:
    site = random_site(0, tokens=count)
    try:
        weight, bias = recover.least_squares(site.evidence(), torch.arange(9), prior=0.0)
    except NumericsError as error:
        assert "not positive definite" in str(error)  # noqa: PT017  # either is right
        return
    assert weight.isfinite().all()
    fitted = site.x[:, :9] @ weight.T + bias
    close(fitted, site.x @ site.weight.T + bias_of(site), 1e-3)  # fewer tokens than weights: met exactly


@pytest.mark.parametrize("prior", [0.0, 4096.0, math.inf])
def test_channels_that_do_not_vary_leave_the_mean_to_the_bias(prior: float) -> None:
    site = random_site(0)
    channels = torch.tensor([0, 3, 5])
    site.x[:, channels] = torch.tensor([0.5, 2.0, -4.0], dtype=torch.float64)
    weight, bias = recover.least_squares(site.evidence(), channels, prior=prior)
    expected_weight, expected_bias = recover.bias_only(site.evidence(), channels)
    close(weight, expected_weight, 1e-12)
    close(bias, expected_bias, 1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_batches_add_up(target: str) -> None:
    site, channels = random_site(3), torch.tensor([0, 2, 5, 7])
    one, _ = with_twin(site, parts=1)
    several, _ = with_twin(site, parts=4)
    for a, b in zip(one.crossed(target).__dict__.values(), several.crossed(target).__dict__.values(), strict=True):
        close(a, b)
    found = [recover.least_squares(e, channels, target=target, prior=5.0) for e in (one, several)]
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


@pytest.mark.parametrize("flat", [True, False])
def test_a_part_of_the_samples_has_the_same_rows_of_everything(flat: bool) -> None:
    site = random_site(3)
    evidence, twin = with_twin(site)
    assert twin.stream is not None
    assert twin.stream[1] is not None
    shape = (60, -1) if flat else (6, 10, -1)  # some models multiply rows of all samples at once
    inputs, dense = (x.reshape(*shape[:-1], x.shape[-1]) for x in (site.x, twin.inputs[0]))
    stream = [[v.reshape(6, 10, v.shape[-1])] for v in (twin.stream[0][0], twin.stream[1][0])]
    whole = dataclasses.replace(evidence, inputs=[inputs], twin=Twin([dense], (stream[0], stream[1])))
    rows = torch.arange(60)[1::2] if flat else torch.arange(60).view(6, 10)[1::2].flatten()
    one = RawSite(site.x[rows], site.weight, site.bias, site.units, site.blocks)
    beside = Twin([twin.inputs[0][rows]], ([twin.stream[0][0][rows]], [twin.stream[1][0][rows]]))
    found = whole.every(2, 1).crossed("stream")
    expected = targets_of(one, beside, "stream")
    close(found.mean, expected.mean(0))
    close(found.scatter, (expected - expected.mean(0)).T @ (one.x - one.x.mean(0)))


@pytest.mark.parametrize("target", TARGETS)
def test_processes_add_up(target: str) -> None:
    """Two processes that hold the same tokens: every sum is twice that of one."""
    site, channels = random_site(3), torch.tensor([0, 2, 5, 7])
    evidence, twin = with_twin(site)
    shared = dataclasses.replace(evidence, combine=lambda sums: 2 * sums)
    assert twin.stream is not None
    assert twin.stream[1] is not None
    both = Twin([*twin.inputs] * 2, ([*twin.stream[0]] * 2, [*twin.stream[1]] * 2))
    alone = dataclasses.replace(evidence, inputs=[site.x] * 2, twin=both)
    for a, b in zip(shared.crossed(target).__dict__.values(), alone.crossed(target).__dict__.values(), strict=True):
        close(a, b)
    found = [recover.least_squares(e, channels, target=target, prior=5.0) for e in (shared, alone)]
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


# -- targets ----------------------------------------------------------------------------------------------------------


@fast
@given(case=cases(40, 80), target=st.sampled_from(TARGETS), stream=st.booleans())
def test_crossed_moments_are_those_of_the_target(case: tuple[RawSite, Tensor], target: str, stream: bool) -> None:
    site, _ = case
    evidence, twin = with_twin(site, stream=stream, parts=3)
    t = targets_of(site, twin, target)
    found, centred = evidence.crossed(target), t - t.mean(0)
    close(found.mean, t.mean(0))
    close(found.scatter, centred.T @ (site.x - site.x.mean(0)))
    close(found.squares, centred.square().sum(0))
    some = torch.tensor([3, 0])  # in the order asked for
    part = evidence.crossed(target, some)
    close(part.scatter, found.scatter[:, some])
    close(part.mean, found.mean)
    close(part.squares, found.squares)


@pytest.mark.parametrize(("target", "twin"), [("wide", True), ("dense", False), ("stream", False)])
def test_a_target_that_there_is_not_is_refused(target: str, twin: bool) -> None:
    site = random_site(0)
    evidence = with_twin(site)[0] if twin else site.evidence()
    message = (
        f"site: the target is '{target}'; expected one of local, dense, stream, all but the first in a sweep beside "
        "the dense model"
    )
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)}$"):
        evidence.crossed(target)


# -- the dense model beside the pruned one ----------------------------------------------------------------------------


def values_of(graph: Any, name: str, ids: Tensor = IDS) -> Tensor:
    seen: list[Tensor] = []
    run(graph, [ids], observers=[Observer(name, (name,), seen.append)])
    return seen[0]


def sites_of(structure: Structure) -> list[Units]:
    return [units_of(structure, s) for s in structure.prunable_sites()]


def held(evidence: Evidence) -> dict[str, Tensor]:
    """What the evidence shows, copied while it is there."""
    assert evidence.twin is not None
    found = {"inputs": torch.cat(list(evidence.inputs)), "dense": torch.cat(list(evidence.twin.inputs))}
    if evidence.twin.stream is not None:
        pruned, dense = evidence.twin.stream
        assert dense is not None
        found |= {"stream": torch.cat(list(pruned)), "dense stream": torch.cat(list(dense))}
    return found | {f"norms {i}": s.input_norms for i, s in enumerate(evidence.sources)}


def cut_first(seen: dict[str, dict[str, Tensor]], first: str | None) -> Any:
    def decide(units: Units, evidence: Evidence) -> Decision | None:
        seen[units.site.name] = held(evidence)
        if units.site.name != first:
            return None
        kept = torch.arange(0, len(units.blocks), units.block_size)  # one of each block
        channels = evidence.kept_channels(kept)
        return Decision(kept, channels, Refit(2 * evidence.weight[:, channels], None))

    return decide


FAMILIES = ["llama", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_cuts_both_models_hold_the_same(family: str) -> None:
    structure = decoder(family).structure
    seen: dict[str, dict[str, Tensor]] = {}
    assert sweep(structure, IDS.split(2), sites_of(structure), cut_first(seen, None), twin=True) == {}
    assert len(seen) == 4
    for values in seen.values():
        assert values["inputs"].equal(values["dense"])
        if "stream" in values:
            assert values["stream"].equal(values["dense stream"])


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_cut_the_twin_is_the_dense_model(family: str) -> None:
    made = decoder(family)
    units = sites_of(made.structure)
    first, later = units[0].site, [u.site for u in units[1:]]
    seen: dict[str, dict[str, Tensor]] = {}
    decisions = sweep(made.structure, IDS.split(2), units, cut_first(seen, first.name), twin=True)
    alone: dict[str, Tensor] = {}
    norms: dict[str, list[Tensor]] = {}

    def look(u: Units, evidence: Evidence) -> Decision | None:
        alone[u.site.name] = torch.cat(list(evidence.inputs))
        norms[u.site.name] = [s.input_norms for s in evidence.sources]
        return decisions.get(u.site.name)

    sweep(made.structure, IDS.split(2), units, look)
    for site in later:
        close(seen[site.name]["dense"], values_of(made.graph, site.reads))
        close(seen[site.name]["inputs"], alone[site.name])
        for i, expected in enumerate(norms[site.name]):
            close(seen[site.name][f"norms {i}"], expected)
        node = made.structure.joined(site)
        assert ("stream" in seen[site.name]) == (node is not None)
        if node is not None:
            close(seen[site.name]["dense stream"], values_of(made.graph, node))
    last = seen[later[-1].name]
    assert not torch.allclose(last["dense"], last["inputs"])
    dense = Norms.of(values_of(made.graph, later[-1].origins[0].reads)).norms
    assert not torch.allclose(last["norms 0"], dense)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_target_and_stream_add_up_to_what_the_dense_model_has(family: str) -> None:
    made = decoder(family)
    first, second = sites_of(made.structure)[:2]
    _, after = made.structure.boundaries()[0]
    sums: list[Tensor] = []

    def decide(units: Units, evidence: Evidence) -> Decision | None:
        if units.site.name == first.site.name:
            return cut_first({}, first.site.name)(units, evidence)
        assert evidence.twin is not None
        assert evidence.twin.stream is not None
        bias = 0.0 if evidence.bias is None else evidence.bias
        sums.append(evidence.crossed("stream").mean + bias + evidence.twin.stream[0][0].flatten(0, -2).mean(0))
        return None

    sweep(made.structure, [IDS], [first, second], decide, twin=True)
    close(sums[0], values_of(made.graph, after).flatten(0, -2).mean(0))


def test_the_residual_value_is_named_where_the_output_is_simply_added_to_it() -> None:
    for family in ("llama", "gpt2"):
        made = decoder(family)
        nodes = {n.name: n for n in made.graph.graph.nodes}
        boundaries = made.structure.boundaries()
        for attention, feed_forward in zip(*[iter(made.structure.prunable_sites())] * 2, strict=True):
            assert attention.layer is not None
            before, after = boundaries[attention.layer]
            assert made.structure.joined(attention) == before
            middle = made.structure.joined(feed_forward)
            assert middle is not None
            assert before in {n.name for n in nodes[middle].all_input_nodes}
            assert middle in {n.name for n in nodes[after].all_input_nodes}


def test_beside_a_parallel_part_an_output_is_not_simply_added_to_the_stream() -> None:
    """The sum of both parts is only a summand: what the stream lost is not what the other part lost."""
    structure = decoder("gpt_neox").structure
    assert [structure.joined(s) for s in structure.prunable_sites()] == [None] * 4


def test_a_norm_behind_the_block_comes_before_the_sum() -> None:
    structure = decoder("gemma3").structure
    assert [structure.joined(s) for s in structure.prunable_sites()] == [None] * 4


def test_a_stopped_run_beside_the_dense_model_goes_on_to_the_same_files(tmp_path: Any, monkeypatch: Any) -> None:
    class Killed(BaseException):
        pass

    make(num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    recipe = Recipe((Magnitude(), LeastSquares("stream"), UniformAllocation(ratio=0.2, round_to=4), Sweep()))

    def pruned(out: str, **options: Any) -> None:
        prune_checkpoint(
            tmp_path / "dense", tmp_path / out, IDS, recipe=recipe, dtype=torch.float64, batch=4, **options
        )

    pruned("whole")
    layer_done = Shards.layer_done

    def stop(self: Shards, layer: int, parking: Any) -> None:
        layer_done(self, layer, parking)
        if layer == 1:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "layer_done", stop)
        with pytest.raises(Killed):
            pruned("parts")
    pruned("parts", resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes()


# -- the pass ---------------------------------------------------------------------------------------------------------


def mean_square(model: nn.Module, dense: nn.Module) -> float:
    return float((logits(model, IDS) - logits(dense, IDS)).square().mean())


def test_it_comes_closer_to_the_dense_model_than_the_regression() -> None:
    dense = make("llama", num_hidden_layers=3)
    errors = {}
    for name, recovery in [("regression", LeastSquares(prior=math.inf)), ("stream", LeastSquares(prior=1.0))]:
        allocation = CosineAllocation(ratio=0.15, round_to=1)
        model = slimgraph.prune(dense, IDS, recipe=Recipe((Magnitude(), recovery, allocation, Sweep()))).model
        assert model is not None
        errors[name] = mean_square(model, dense)
    assert errors["stream"] < 0.7 * errors["regression"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "x"}, "least_squares: target is 'x'; expected one of local, dense, stream"),
        ({"prior": -1}, "least_squares: prior is -1; expected a number of tokens, at least 0"),
        ({"prior": math.nan}, "least_squares: prior is nan; expected a number of tokens, at least 0"),
        (
            {"target": "dense", "correction": -1},
            "least_squares: correction is -1; expected a number of tokens, at least 0",
        ),
        (
            {"correction": 5.0},
            "least_squares: correction is 5.0 with the target local; expected null, or dense or stream",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}(, or null)?$"):
        LeastSquares(**fields)


def test_only_the_local_target_does_without_the_dense_model() -> None:
    assert [LeastSquares(target=t).needs_twin() for t in TARGETS] == [None, "dense", "stream"]


# -- a prior from held-out samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_prior_is_the_one_that_predicts_held_out_samples_best(seed: int) -> None:
    site = random_site(seed, tokens=96, out=5)
    x = site.x.view(12, 8, -1)
    evidence = dataclasses.replace(site.evidence(), inputs=[x])
    channels = torch.arange(site.x.shape[1] - 2)

    def error(prior: float) -> float:
        total = 0.0
        for fitted, left_out in ((0, 1), (1, 0)):
            weight, _ = recover.least_squares(evidence.every(2, fitted), channels, prior=prior)
            rows = x[left_out::2].flatten(0, 1)
            missed = rows @ site.weight.T - rows[:, channels] @ weight.T
            total += float((missed - missed.mean(0)).square().sum())
        return total

    assert recover.held_out_prior(evidence, channels) == min(recover.PRIORS, key=error)
    found = recover.least_squares(evidence, channels, prior=None)
    expected = recover.least_squares(evidence, channels, prior=min(recover.PRIORS, key=error))
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs)


def test_every_other_sample_is_counted_over_all_micro_batches() -> None:
    site = random_site(0, tokens=30, out=3)
    samples = site.x.view(5, 6, -1)
    whole = dataclasses.replace(site.evidence(), inputs=[samples])
    for sizes in ([1] * 5, [2, 1, 2], [3, 2], [4, 1]):
        parts = dataclasses.replace(whole, inputs=list(samples.split(sizes)))
        for first in (0, 1):
            close(torch.cat(list(parts.every(2, first).inputs)), samples[first::2])
        assert recover.held_out_prior(parts, torch.arange(3)) == recover.held_out_prior(whole, torch.arange(3))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_samples_are_held_out_whole_however_a_site_reads_them(family: str) -> None:
    """Some projections read all tokens of a micro-batch as rows of one matrix."""
    made = decoder(family)
    site = sites_of(made.structure)[0]
    seen: list[list[Tensor]] = []

    def look(units: Units, evidence: Evidence) -> None:
        shape = (-1, IDS.shape[1], evidence.weight.shape[1])
        seen.append([torch.cat([x.view(shape) for x in part.inputs]) for part in (evidence, evidence.every(2, 1))])
        with pytest.raises(CalibrationError, match=f"{len(IDS)} calibration samples cannot be split in 99"):
            evidence.every(99, 98)

    sweep(made.structure, IDS.split(4), [site], look)
    ((whole, odd),) = seen
    close(odd, whole[1::2])


def test_one_sample_cannot_be_held_out() -> None:
    site = random_site(0, tokens=24, out=3)
    evidence = dataclasses.replace(site.evidence(), inputs=[site.x[None]])
    with pytest.raises(CalibrationError, match="1 calibration samples cannot be split in 2"):
        recover.held_out_prior(evidence, torch.arange(3))


def test_without_a_stream_the_correction_is_none() -> None:
    site, channels = random_site(3), torch.tensor([0, 2, 5, 7])
    evidence, _ = with_twin(site, stream=False)
    found = recover.least_squares(evidence, channels, target="stream", prior=5.0, correction=7.0)
    for a, b in zip(found, recover.least_squares(site.evidence(), channels, prior=5.0), strict=True):
        close(a, b)


def test_a_model_whose_outputs_go_through_a_norm_first_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's blocks: the stream's target is the local one everywhere, and the dense model need not run beside."""
    model = make("gemma3", num_hidden_layers=2)
    beside: list[bool] = []
    monkeypatch.setattr(
        "slimgraph.passes.pruning.sweep", lambda *a, twin, **k: beside.append(twin) or sweep(*a, twin=twin, **k)
    )
    pruned = []
    for fit in (LeastSquares(), LeastSquares("stream", correction=7.0), LeastSquares("dense", correction=7.0)):
        recipe = Recipe((Magnitude(), fit, UniformAllocation(ratio=0.1, round_to=1), Sweep()))
        pruned.append(slimgraph.prune(model, IDS, recipe=recipe).model)
    assert beside == [False, False, True]
    local, stream, dense = (m(IDS).logits for m in pruned)
    close(local, stream)
    assert not torch.allclose(local, dense)
