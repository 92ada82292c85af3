"""How many units each site keeps, so that the model loses what was asked for: a share of its parameters, as a rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from slimgraph.errors import PlanError
from slimgraph.groups import Structure
from slimgraph.units import Units, parameter_count

__all__ = ["Budget", "Goal", "Skip", "at_factor", "check_narrowest", "keep_at", "solve", "solve_curves", "solve_ranked"]

_CLOSE = 0.01  # of what should go; widths are whole numbers
_ROUNDING = 1e-9  # likewise, of sums
_STEPS = 60  # bisection steps; the widths are whole numbers long before
_NOTHING = 1e-12  # of the largest weight; what is less would not lose a unit before all others have lost theirs


@dataclass(frozen=True)
class Budget:
    """Units kept per block at each site, and what that comes to.

    Attributes:
        keep: site name -> units kept in each block.
        unit_ratios: layer -> share of units that was asked for there; 1 where the whole layer goes.
        parameters_before, parameters_after: of the whole model, in parameters, added biases counted.
        skipped: module paths of layers that go as a whole; what `keep` says of their sites does not matter.
    """

    keep: Mapping[str, int]
    unit_ratios: Mapping[int, float]
    parameters_before: int
    parameters_after: int
    skipped: tuple[str, ...] = ()

    @property
    def removed(self) -> float:
        """Share of all parameters that goes."""
        return 1 - self.parameters_after / self.parameters_before


@dataclass(frozen=True)
class Goal:
    """What a budget is solved for.

    Attributes:
        structure: the groups of the model.
        sites: units of every site that may be cut.
        weights: layer -> how strongly it is cut relative to the others, >= 0; layers not named are left alone.
        sizes: parameter name -> number of elements, for every parameter that counts.
        added: site name -> parameters that recovery adds there once the site is cut.
        round_to: kept channels are a multiple of this, at sites that have more.
    """

    structure: Structure
    sites: Sequence[Units]
    weights: Mapping[int, float]
    sizes: Mapping[str, int]
    added: Mapping[str, int]
    round_to: int = 8


@dataclass(frozen=True)
class Skip:
    """A whole layer that may be skipped.

    Attributes:
        layer: its index.
        harm: of skipping it, in what the curves of sites are in.
        saves: how much of the resource goes with it.
        parameters: how many parameters go with it.
    """

    layer: int
    harm: float
    saves: float
    parameters: int


def keep_at(units: Units, ratio: float, round_to: int) -> int:
    """Units kept in each block when a share of them goes: rounded, at least one (or one rounding step).

    Args:
        units: the site's units.
        ratio: share to remove, clipped to 0..1.
        round_to: multiple that channels are rounded to, at sites that have more; heads never are.
    """
    n = units.block_size
    step = 1 if units.site.kind == "heads" or n <= round_to else round_to
    if ratio <= 0:
        return n
    exact = n * (1 - min(ratio, 1.0))
    return min(n, max(step, int(exact / step + 0.5) * step))


def solve(goal: Goal, ratio: float) -> Budget:
    """Unit counts that remove `ratio` of all parameters, as closely as whole units allow.

    All layers share one factor: layer l loses the share factor * weights[l] of its units. The factor is found by
    bisection; what rounding leaves is made up site by site.

    Raises:
        PlanError: the ratio is not between 0 and 1, nothing may be cut, or the ratio cannot be reached.
    """
    before, wanted = _wanted(goal, ratio)
    most = max(goal.weights.values())
    goal = replace(goal, weights={layer: w if w > _NOTHING * most else 0.0 for layer, w in goal.weights.items()})
    low, high = 0.0, 1 / min(w for w in goal.weights.values() if w > 0)
    _check_reachable(goal, _keep(goal, high), ratio)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _after(goal, _keep(goal, middle)) > wanted:
            low = middle
        else:
            high = middle
    keep = _make_up(goal, _keep(goal, low), _keep(goal, high), wanted)
    ratios = {layer: min(1.0, high * w) for layer, w in goal.weights.items()}
    return Budget(keep, ratios, before, _after(goal, keep))


def solve_ranked(goal: Goal, scores: Mapping[str, Tensor], ratio: float) -> Budget:
    """Unit counts that remove `ratio` of all parameters when units of all sites go in the order of one ranking.

    The threshold on the scores is found by bisection; what rounding leaves is made up site by site. Where a site has
    several blocks, each keeps the mean over them, so that they stay equally large.

    Args:
        goal: what is solved for; layers of weight 0 are left alone, other weights do not matter.
        scores: site name -> (units,), comparable between sites; what scores lowest goes first.
        ratio: share of all parameters that goes.

    Raises:
        PlanError: as for `solve`.
    """
    before, wanted = _wanted(goal, ratio)
    cut = [u for u in goal.sites if goal.weights.get(_layer(u), 0.0) > 0]
    ranking = sorted({float(s) for u in cut for s in scores[u.site.name]})

    def keep(gone: int) -> dict[str, int]:
        """What stays when everything below the score of that rank goes."""
        widths = {u.site.name: u.block_size for u in goal.sites}
        for u in cut:
            mine = scores[u.site.name]
            below = 1.0 if gone == len(ranking) else float((mine < ranking[gone]).double().mean())
            widths[u.site.name] = keep_at(u, below, goal.round_to)
        return widths

    low, high = 0, len(ranking)
    _check_reachable(goal, keep(high), ratio)
    while high - low > 1:
        middle = (low + high) // 2
        if _after(goal, keep(middle)) > wanted:
            low = middle
        else:
            high = middle
    kept = _make_up(goal, keep(low), keep(high), wanted)
    return Budget(kept, _shares(cut, kept), before, _after(goal, kept))


def solve_curves(
    goal: Goal,
    curves: Mapping[str, Mapping[int, float]],
    ratio: float,
    left: Callable[[Mapping[str, int]], float] | None = None,
    skips: Mapping[str, Skip] | None = None,
) -> Budget:
    """Unit counts that remove `ratio` of a resource at the least total harm, as closely as whole units allow.

    A knapsack in which every site has one of several widths. On the lower convex hull of each site's curve the steps
    are taken in the order of harm per what they save, which is best for every total that they come to; the last one is
    cut short where the curve has a width in between. That a whole layer goes is one more step, after those of its
    sites that are cheaper; it is left out if it saves more than is still to go.

    Args:
        goal: what is solved for; its weights do not matter.
        curves: site name -> units kept per block -> harm, the whole width among them.
        ratio: share of the resource that goes.
        left: units kept per block at each site -> what is left of the resource, a sum over sites; the parameters of the
            whole model by default.
        skips: module path of a layer -> what it does to skip it; none by default.

    Raises:
        PlanError: as for `solve`.
    """
    _wanted(goal, ratio)
    skips = skips or {}
    before, saved = _saved(goal, curves, left)
    needed = ratio * before
    layers = {path: _Layer(skip, _sites(goal, skip.layer)) for path, skip in skips.items()}
    keep, skipped = _share_out(curves, saved, layers, needed, before)
    gone = sum(skips[path].parameters for path in skipped)
    shares = _shares(goal.sites, keep) | {skips[path].layer: 1.0 for path in skipped}
    return Budget(keep, shares, sum(goal.sizes.values()), _after(goal, keep) - gone, skipped)


def check_narrowest(
    goal: Goal,
    narrowest: Mapping[str, int],
    ratio: float,
    left: Callable[[Mapping[str, int]], float] | None = None,
) -> None:
    """Refuse what `solve_curves` could not reach without skipping layers, before any harm is measured.

    Args:
        goal: what is solved for.
        narrowest: site name -> fewest units that it may keep per block.
        ratio: share of the resource that goes.
        left: as for `solve_curves`.

    Raises:
        PlanError: as for `solve`.
    """
    _wanted(goal, ratio)
    before, saved = _saved(goal, {name: (width,) for name, width in narrowest.items()}, left)
    _check_enough(saved, {}, ratio * before, before)


def _saved(
    goal: Goal, widths: Mapping[str, Iterable[int]], left: Callable[[Mapping[str, int]], float] | None
) -> tuple[float, dict[str, dict[int, float]]]:
    """The resource before, and site name -> units kept per block -> how much less of it there is then."""
    of = left or (lambda keep: _after(goal, keep))
    whole = {u.site.name: u.block_size for u in goal.sites}
    before = of(whole)
    return before, {name: {keep: before - of({**whole, name: keep}) for keep in widths[name]} for name in whole}


@dataclass(frozen=True)
class _Layer:
    """A layer that may go, and the names of its sites."""

    skip: Skip
    sites: Sequence[str]


_Step = tuple[float, str, int]  # harm per what is saved, site, width after it; or the path of a layer that goes, 0


def _share_out(
    curves: Mapping[str, Mapping[int, float]],
    saved: Mapping[str, Mapping[int, float]],
    layers: Mapping[str, _Layer],
    needed: float,
    before: float,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Width of each site and layers that go, by the steps in their order; sites of those layers count as whole."""
    _check_enough(saved, layers, needed, before)
    whole = {name: max(curves[name]) for name in curves}
    steps = {name: list(_hull_steps(name, saved[name], curves[name])) for name in whole}
    for path, layer in layers.items():
        mine = sorted(step for name in layer.sites for step in steps[name])
        for name in layer.sites:
            steps[name] = []
        steps[path] = _with_skip(path, layer.skip, mine, whole, saved, curves)
    keep, removed, skipped = dict(whole), 0.0, []
    for _, name, width in sorted(step for found in steps.values() for step in found):
        room = needed - removed
        if room <= _ROUNDING * needed:
            break
        if name in layers:
            more = layers[name].skip.saves - sum(saved[site][keep[site]] for site in layers[name].sites)
            if more > room + _ROUNDING * needed:  # a layer cannot be cut short, and its sites may have to do without it
                return _share_out(curves, saved, {p: a for p, a in layers.items() if p != name}, needed, before)
            keep |= {site: whole[site] for site in layers[name].sites}
            skipped.append(name)
            removed += more
            continue
        room += saved[name][keep[name]]
        between = [w for w in curves[name] if width <= w <= keep[name]]
        width = min(between, key=lambda w: abs(saved[name][w] - room)) if saved[name][width] > room else width
        removed += saved[name][width] - saved[name][keep[name]]
        keep[name] = width
    return keep, tuple(skipped)


def _check_enough(
    saved: Mapping[str, Mapping[int, float]], layers: Mapping[str, _Layer], needed: float, before: float
) -> None:
    most = sum(max(widths.values()) for widths in saved.values())
    most += sum(max(0.0, a.skip.saves - sum(max(saved[s].values()) for s in a.sites)) for a in layers.values())
    if most < needed * (1 - _CLOSE):
        raise PlanError(
            f"ratio {needed / before:g} cannot be reached: with every site at its narrowest width"
            f"{' and every layer skipped that is not too large' if layers else ''}, {most / before:.4f} goes. "
            f"Ask for at most {_rounded_down(most / before)}, for narrower `widths` in a recipe, or for another method"
        )


def _with_skip(
    path: str,
    skip: Skip,
    steps: list[_Step],
    whole: Mapping[str, int],
    saved: Mapping[str, Mapping[int, float]],
    curves: Mapping[str, Mapping[int, float]],
) -> list[_Step]:
    """The steps of a layer's sites, and that all of it goes in place of those that cost more than it does."""
    if skip.saves <= sum(max(saved[name].values()) for name in {name for _, name, _ in steps}):
        return steps  # nothing is won by it
    while True:
        keep = {**whole, **{name: width for _, name, width in steps}}
        at = {name for _, name, _ in steps}
        more = skip.saves - sum(saved[name][keep[name]] for name in at)
        harm = skip.harm - sum(curves[name][keep[name]] for name in at)
        if not steps or harm / more > steps[-1][0]:
            return [*steps, (harm / more, path, 0)]
        steps = steps[:-1]


def _rounded_down(ratio: float) -> str:
    """To four digits, so that what is printed can be asked for."""
    return f"{math.floor(1e4 * ratio) / 1e4:.4f}"


def _sites(goal: Goal, layer: int) -> list[str]:
    return [u.site.name for u in goal.sites if u.site.layer == layer]


def _hull_steps(name: str, saved: Mapping[int, float], curve: Mapping[int, float]) -> Iterator[_Step]:
    """Steps of the lower convex hull of harm over what is saved, but for those that save nothing."""
    hull: list[int] = []
    for width in sorted(curve, reverse=True):
        while len(hull) > 1 and _slope(saved, curve, hull[-2], hull[-1]) >= _slope(saved, curve, hull[-1], width):
            hull.pop()
        hull.append(width)
    for first, second in itertools.pairwise(hull):
        if saved[second] > saved[first]:
            yield _slope(saved, curve, first, second), name, second


def _slope(saved: Mapping[int, float], curve: Mapping[int, float], first: int, second: int) -> float:
    more = saved[second] - saved[first]
    return (curve[second] - curve[first]) / more if more > 0 else math.inf


def at_factor(goal: Goal, factor: float) -> Budget:
    """The budget where layer l loses the share factor * weights[l] of its units: SlimLLM's own ratio.

    Where that is more than all of a layer, the others lose more, so that the mean share over layers is the same.
    """
    factor = _below_one(sorted(goal.weights.values(), reverse=True), factor)
    keep = _keep(goal, factor)
    ratios = {layer: min(1.0, factor * w) for layer, w in goal.weights.items()}
    return Budget(keep, ratios, sum(goal.sizes.values()), _after(goal, keep))


def _below_one(weights: Sequence[float], factor: float) -> float:
    """The factor with which the shares factor * weight, none counted above 1, add up to what they would uncounted.

    Args:
        weights: of the layers, descending.
        factor: with which shares may be above 1.
    """
    missing, rest = factor * sum(weights), sum(weights)
    for weight in weights:
        if factor * weight <= 1:
            break
        missing, rest = missing - 1, rest - weight
        factor = missing / rest if rest > 0 and missing > 0 else 1 / weight
    return factor


def _wanted(goal: Goal, ratio: float) -> tuple[int, float]:
    """Parameters before, and how many should be left; refuses what cannot be meant."""
    if not 0 <= ratio < 1:
        raise PlanError(f"ratio is {ratio}; expected a share of all parameters, 0 <= ratio < 1")
    if max(goal.weights.values(), default=0.0) <= 0 or not goal.sites:
        raise PlanError(
            "no layer may be cut: no site was found that writes to the residual stream and has units of its own"
        )
    before = sum(goal.sizes.values())
    return before, before * (1 - ratio)


def _check_reachable(goal: Goal, fewest: Mapping[str, int], ratio: float) -> None:
    before = sum(goal.sizes.values())
    least = _after(goal, fewest)
    if least > before * (1 - ratio) + _tolerance(goal, before):
        reachable = 1 - least / before
        raise PlanError(
            f"ratio {ratio:g} cannot be reached: with every unit but the last removed from {len(goal.weights)} "
            f"layers, {reachable:.4f} of the {before:,} parameters go. Ask for at most {_rounded_down(reachable)}, "
            "or let more layers be cut"
        )


def _layer(units: Units) -> int:
    return units.site.layer if units.site.layer is not None else -1


def _shares(cut: Sequence[Units], keep: Mapping[str, int]) -> dict[int, float]:
    """Layer -> share of units that goes, averaged over its sites."""
    shares: dict[int, list[float]] = {}
    for u in cut:
        shares.setdefault(_layer(u), []).append(1 - keep[u.site.name] / u.block_size)
    return {layer: sum(found) / len(found) for layer, found in shares.items()}


def _keep(goal: Goal, factor: float) -> dict[str, int]:
    return {u.site.name: keep_at(u, factor * goal.weights.get(_layer(u), 0.0), goal.round_to) for u in goal.sites}


def _after(goal: Goal, keep: Mapping[str, int]) -> int:
    kept = {u.group: keep[u.site.name] for u in goal.sites if keep[u.site.name] != u.block_size}
    added = sum(goal.added.get(u.site.name, 0) for u in goal.sites if u.group in kept)
    return parameter_count(goal.structure, kept, goal.sizes) + added


def _make_up(goal: Goal, more: dict[str, int], fewer: dict[str, int], wanted: float) -> dict[str, int]:
    """Between two neighbouring roundings: take single sites' steps as long as that comes closer."""
    keep = dict(more)
    best = abs(_after(goal, keep) - wanted)
    for name in more:
        if more[name] == fewer[name]:
            continue
        tried = {**keep, name: fewer[name]}
        distance = abs(_after(goal, tried) - wanted)
        if distance < best:
            keep, best = tried, distance
    return keep


def _tolerance(goal: Goal, before: int) -> float:
    """Half a percentage point, or one unit per layer, whichever is larger."""
    full = {u.site.name: u.block_size for u in goal.sites}
    one_less = {u.site.name: max(1, u.block_size - 1) for u in goal.sites}
    return max(0.005 * before, _after(goal, full) - _after(goal, one_less))
