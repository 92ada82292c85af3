"""What each idea of Slimgraph's own method buys over SlimLLM, alone and together: a table of docs/results.md.

    python benchmarks/accuracy.py --model NAME=DIR --calibration FILE --text wikitext2=FILE --text ptb=FILE \
        --task-folder DIR --results DIR

Same number of parameters, same calibration tokens in every row of a share. Cells are kept as those of `reproduce.py`
are, and SlimLLM's own are shared with it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cells import (
    DENSE,
    Cell,
    Maker,
    average,
    average_cell,
    describe,
    drive,
    has_tasks,
    parser,
    perplexity_cell,
    read,
    slimllm,
)
from results import write_between_markers

from slimgraph.passes import (
    Elimination,
    FeatureSpace,
    FluctuationAllocation,
    HarmAllocation,
    LeastSquares,
    Pass,
    Pearson,
    Regression,
    SelfCalibration,
    Sweep,
    UniformAllocation,
    Verify,
)
from slimgraph.recipe import Recipe, method

BASELINE, OWN = "SlimLLM", "Slimgraph"
LOCAL = LeastSquares("local")
WEAK = LeastSquares("stream", 409.6)
STREAM, CORRECTED = LeastSquares("stream"), LeastSquares("stream", correction=8192.0)


def by_harm(ratio: float, *_: Any) -> Recipe:
    """SlimLLM with widths by harm."""
    return Recipe((Pearson(), FeatureSpace(), Regression(), HarmAllocation(ratio=ratio), Sweep(), Verify()))


def eliminated(swaps: int) -> Maker:
    """SlimLLM's widths, units by backward elimination, and the full fit that it goes with."""
    return lambda *given: Recipe((Elimination(swaps=swaps), *slimllm(*given, recovery=LOCAL).passes[2:]))


def written(samples: int, recovery: Pass) -> Maker:
    """SlimLLM with another recovery, on samples that the model writes beside all given ones."""
    return lambda *given: Recipe((SelfCalibration(samples, None), *slimllm(*given, recovery=recovery).passes))


def own(name: str, change: Callable[..., Pass | None]) -> Maker:
    """Slimgraph with the pass of this name changed, or left out where the change is None."""

    def make(*given: Any) -> Recipe:
        passes = method("slimgraph", given[0]).passes
        changed = [change(p, *given) if p.name == name else p for p in passes]
        return Recipe(tuple(p for p in changed if p is not None))

    return make


def in_two_rounds(ratio: float, *_: Any) -> Recipe:
    """Slimgraph that takes half of what is to go, and from what is left the rest."""
    *first, sweep, verify = method("slimgraph", ratio / 2).passes
    *_, again, _, _ = method("slimgraph", (ratio / 2) / (1 - ratio / 2)).passes
    return Recipe((*first, sweep, again, sweep, verify))


IDEAS: dict[str, Maker] = {
    BASELINE: lambda *given: slimllm(*given),
    "full fit, local target": lambda *given: slimllm(*given, recovery=LOCAL),
    "full fit, dense target": lambda *given: slimllm(*given, recovery=LeastSquares("dense")),
    "full fit, dense target and stream": lambda *given: slimllm(*given, recovery=STREAM),
    "full fit, dense target and stream, weak prior (410 tokens)": lambda *given: slimllm(*given, recovery=WEAK),
    "full fit, local target, then the stream": lambda *given: slimllm(*given, recovery=CORRECTED),
    "regression, dense target and stream": lambda *given: slimllm(*given, recovery=LeastSquares("stream", math.inf)),
    "full fit, local target, elimination": eliminated(0),
    "full fit, local target, elimination and 64 swaps": eliminated(64),
    "widths by harm": by_harm,
    "32 written": written(32, Regression()),
    "32 written, full fit, local target": written(32, LOCAL),
    f"{OWN}, nothing written": own("self_calibration", lambda *_: None),
    f"{OWN}, 64 written": own("self_calibration", lambda p, *_: replace(p, samples=64)),
    f"{OWN}, 128 written": own("self_calibration", lambda p, *_: replace(p, samples=128)),
    f"{OWN}, SlimLLM's regression": own("least_squares", lambda *_: Regression()),
    f"{OWN}, then the stream": own("least_squares", lambda *_: CORRECTED),
    f"{OWN}, SlimLLM's widths": own("harm_allocation", lambda _, *given: slimllm(*given).passes[3]),
    f"{OWN}, FLAP's widths": own("harm_allocation", lambda _, ratio, *__: FluctuationAllocation(ratio=ratio)),
    f"{OWN}, all layers alike": own("harm_allocation", lambda _, ratio, *__: UniformAllocation(ratio=ratio)),
    f"{OWN}, harm's power 1.5": own("harm_allocation", lambda p, *_: replace(p, power=1.5)),
    f"{OWN}, single harms": own("harm_allocation", lambda p, *_: replace(p, together=False)),
    f"{OWN}, last heads cut": own("harm_allocation", lambda p, *_: replace(p, spare_last_heads=0.0)),
    f"{OWN}, in two rounds": in_two_rounds,
    f"{OWN}, whole layers too": own("harm_allocation", lambda p, *_: replace(p, depth=True)),
    f"{OWN}, sweep in float32": own("sweep", lambda *_: Sweep()),
    OWN: lambda ratio, *_: method("slimgraph", ratio),
}
WHOLE = (BASELINE, OWN)
SKEWED = "boolq"  # about two of three of its answers are yes: models that can no longer tell get a third, or two, right
PRODUCTS = f", but for the products that {OWN}'s recipe takes in bfloat16 where the processor is faster by it"
COST = "Seconds of pruning."
MORE = ", 512 given"


def curve_maker(samples: int) -> Maker:
    """The full fit, on so many samples that the model writes beside the given ones."""
    return written(samples, LOCAL) if samples else IDEAS["full fit, local target"]


def all_used(samples: int) -> Maker:
    """Slimgraph that writes so many samples beside all given ones."""
    return own("self_calibration", lambda p, *_: replace(p, samples=samples, given=None))


CURVE: dict[str, tuple[int, Maker]] = {
    **{f"{given} given": (given, curve_maker(0)) for given in (32, 64, 128, 512, 2048)},
    **{f"{given} given, {n} written": (given, curve_maker(n)) for given, n in [(32, 32), (32, 96), (128, 128)]},
    **{f"{whole}{MORE}": (512, IDEAS[whole]) for whole in WHOLE},
    **{f"{OWN}{MORE} and used, {n} written": (512, all_used(n)) for n in (192, 512)},
}
"""Name of a row -> windows given, and what is done with them."""
ALONE = tuple(name for name in IDEAS if not name.startswith((BASELINE, OWN)))
CHANGED = (OWN, *(name for name in IDEAS if name.startswith(f"{OWN}, ")))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Seed by seed, the whole methods first; or how much text it takes."""
    chosen = [name for name in (CURVE if options.curve else IDEAS) if not options.ideas or name in options.ideas]
    if options.curve:
        for seed, (model, share), name in itertools.product(options.seeds, settings(options), chosen):
            scored = name.endswith(MORE) and seed in task_seeds(options)
            yield replace(cell(model, share, name, seed), scored=scored)
        return
    yield from (Cell(model, 0.0, DENSE, options.seeds[0]) for model, _ in options.model)
    whole, parts = [n for n in chosen if n in WHOLE], [n for n in chosen if n not in WHOLE]
    for seed in options.seeds:
        for names in (whole, parts):
            for model, _ in options.model:
                for share in options.shares:
                    scored = names is whole and seed in task_seeds(options)
                    yield from (replace(cell(model, share, name, seed), scored=scored) for name in names)


def task_seeds(options: argparse.Namespace) -> list[int]:
    """With which the whole methods do the tasks."""
    return options.task_seeds or options.seeds[:1]


def task_options(options: argparse.Namespace) -> str:
    return f" --task-seeds {' '.join(map(str, options.task_seeds))}" if options.task_seeds else ""


def cell(model: str, share: float, name: str, seed: int) -> Cell:
    """SlimLLM's is the one of the reproduction."""
    if name in CURVE:
        return Cell(model, share, name, seed, "curve", scored=False, samples=CURVE[name][0])
    return Cell(model, share, name, seed, "" if name == BASELINE else "idea")


def write_curve(options: argparse.Namespace) -> None:
    tables = [curve_table(options, model) for model, _ in options.model]
    windows = "as many windows as the rows say"
    more = f"{task_options(options)} --curve"
    how = describe(options, "accuracy.py", more, windows=windows, scored=None, products=PRODUCTS, cost=COST)
    write_part(options, "calibration", "\n\n".join([how, *tables]))


def curve_table(options: argparse.Namespace, model: str) -> str:
    """Perplexities and seconds by the number of calibration tokens."""
    texts = [name for name, _ in options.text]
    columns = ["share", "windows", "tokens given", *texts, "seconds", "seeds"]
    lines = [f"`{model}`", "", f"| {' | '.join(columns)} |", f"|--:|---|{'--:|' * (len(columns) - 2)}"]
    for share in options.shares:
        for name, (given, _) in CURVE.items():
            if seeds := rows(options, model, share, name):
                values = [perplexity_cell([s["perplexity"][t] for s in seeds]) for t in texts]
                cost = [f"{seeds[0]['seconds']:.0f}", str(len(seeds))]
                shown = [f"{share:.0%}", name, f"{given * options.seq_len:,}", *values, *cost]
                lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def write_table(options: argparse.Namespace) -> None:
    tables = [table(options, model) for model, _ in options.model]
    of = task_seeds(options)
    seeds = "the first seed" if len(of) == 1 else f"seeds {', '.join(map(str, of))} as far as measured"
    how = describe(options, "accuracy.py", task_options(options), scored=seeds, products=PRODUCTS, cost=COST)
    write_part(options, "accuracy", "\n\n".join([how, *tables]))
    write_part(options, "summary", summary(options))
    write_part(options, "changed", gap_table(options, f"{OWN}, changed", CHANGED))
    write_part(options, "alone", gap_table(options, f"{BASELINE} and", ALONE))


def write_part(options: argparse.Namespace, part: str, text: str) -> None:
    write_between_markers(options.out, text, f"<!-- {part}: begin -->", f"<!-- {part}: end -->")


def gap_table(options: argparse.Namespace, title: str, names: Sequence[str]) -> str:
    """Of each idea the gaps on all texts, all models and shares side by side."""
    columns = [title, *(f"{model}, {share:.0%}" for model, share in settings(options)), "seeds"]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 1)}"]
    for name in names:
        found = [gaps(options, *setting, name) for setting in settings(options)]
        counts = sorted({len(rows(options, *setting, name)) for setting in settings(options)} - {0})
        if any(found):
            shown = "nothing" if name == OWN else name.removeprefix(f"{OWN}, ")
            values = [" / ".join(f"{value:.2f}" for value in each) or "-" for each in found]
            lines.append(f"| {' | '.join([shown, *values, ' or '.join(map(str, counts))])} |")
    return "\n".join(lines)


def settings(options: argparse.Namespace) -> list[tuple[str, float]]:
    return [(model, share) for model, _ in options.model for share in options.shares]


def table(options: argparse.Namespace, model: str) -> str:
    texts = [name for name, _ in options.text]
    columns = ["share", "method", *texts, *(f"{t}, gap" for t in texts)]
    columns += ["tasks", "drop", "parameters", "seconds", "seeds"]
    lines = [f"`{model}`", "", f"| {' | '.join(columns)} |", f"|--:|---|{'--:|' * (len(columns) - 2)}"]
    for share in options.shares:
        for name in IDEAS:
            if found := gaps(options, model, share, name):
                lines.append(line(options, model, share, name, found))
    return "\n".join(lines)


def line(options: argparse.Namespace, model: str, share: float, name: str, found: Sequence[float]) -> str:
    seeds = rows(options, model, share, name)
    values = [perplexity_cell([s["perplexity"][t] for s in seeds]) for t, _ in options.text]
    lost = drop(seeds, rows(options, model, share, BASELINE), dense_row(options, model))
    tasks = average_cell(seeds), share_cell(lost, [])
    cost = [f"{seeds[0]['parameters']:,}", f"{seeds[0]['seconds']:.0f}", str(len(seeds))]
    shown = [f"{share:.0%}", name, *values, *(f"{value:.2f}" for value in found), *tasks, *cost]
    return f"| {' | '.join(shown)} |"


def summary(options: argparse.Namespace) -> str:
    """The whole method beside the published one: means over the seeds, and what single seeds lie between."""
    columns = ["model", "share", "windows given", *(f"gap, {t}" for t, _ in options.text)]
    columns += ["drop of the tasks", f"without {SKEWED}", "seeds", "with tasks"]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 1)}"]
    for more in ("", MORE):
        for setting in settings(options):
            lines += summary_line(options, *setting, f"{OWN}{more}", f"{BASELINE}{more}")
    return "\n".join(lines)


def summary_line(options: argparse.Namespace, model: str, share: float, own: str, against: str) -> list[str]:
    """None where nothing was measured."""
    found = gaps(options, model, share, own, against)
    if not found:
        return []
    ours, theirs = (rows(options, model, share, name) for name in (own, against))
    single = [one for row in ours if (one := gaps(options, model, share, own, against, [row["seed"]]))]
    values = [share_cell(mean, each) for mean, each in zip(found, zip(*single, strict=True), strict=True)]
    dense = dense_row(options, model)
    for leave_out in ("", SKEWED):
        drops = [one for row in ours if (one := drop([row], theirs, dense, leave_out)) is not None]
        values.append(share_cell(drop(ours, theirs, dense, leave_out), drops))
    windows = cell(model, share, own, options.seeds[0]).samples or options.samples
    return [f"| {' | '.join([model, f'{share:.0%}', str(windows), *values, str(len(single)), str(len(drops))])} |"]


def share_cell(mean: float | None, single: Sequence[float]) -> str:
    """A share of the published method's; of more than one seed with what they lie between."""
    if mean is None:
        return "-"
    between = f" ({min(single):.2f} to {max(single):.2f})" if len(single) > 1 else ""
    return f"{mean:.2f}{between}"


def rows(options: argparse.Namespace, model: str, share: float, name: str) -> list[dict[str, Any]]:
    """As far as measured."""
    read_ones = [read(options.results / cell(model, share, name, seed).file) for seed in options.seeds]
    return [row for row in read_ones if "perplexity" in row]


def dense_row(options: argparse.Namespace, model: str) -> dict[str, Any]:
    return read(options.results / Cell(model, 0.0, DENSE, options.seeds[0]).file)


def gaps(
    options: argparse.Namespace,
    model: str,
    share: float,
    name: str,
    against: str = BASELINE,
    seeds: Sequence[int] | None = None,
) -> list[float]:
    """Mean gap on each text, as a share of SlimLLM's with the same seeds, or these; none without such a seed."""
    dense = dense_row(options, model)
    ours = {row["seed"]: row for row in rows(options, model, share, name)}
    theirs = {row["seed"]: row for row in rows(options, model, share, against)}
    both = sorted(ours.keys() & theirs.keys() & set(seeds or options.seeds))
    if not both or not dense:
        return []
    means = [[statistics.mean(gap(of[s], dense, t) for s in both) for of in (ours, theirs)] for t, _ in options.text]
    return [own / published if published else math.nan for own, published in means]


def gap(row: Mapping[str, Any], dense: Mapping[str, Any], text: str) -> float:
    """Of the log-perplexities."""
    return math.log(row["perplexity"][text]["value"] / dense["perplexity"][text]["value"])


def drop(
    seeds: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Any],
    leave_out: str = "",
) -> float | None:
    """Of the average over all tasks or all but one, as a share of the published method's with the same seeds."""
    ours, theirs = ({row["seed"]: average(row, leave_out) for row in of if has_tasks(row)} for of in (seeds, baseline))
    both = ours.keys() & theirs.keys()
    if not both or not has_tasks(dense):
        return None
    own, published = (average(dense, leave_out) - statistics.mean(of[seed] for seed in both) for of in (ours, theirs))
    return own / published if published else None


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--ideas", nargs="+", choices=[*IDEAS, *CURVE], help="only these")
    options.add_argument("--task-seeds", nargs="+", type=int, help="with which the whole methods do tasks; the first")
    options.add_argument("--curve", action="store_true", help="the number of calibration tokens instead of the ideas")
    given = options.parse_args()
    curves = {name: maker for name, (_, maker) in CURVE.items()}
    makers, write = (curves, write_curve) if given.curve else (IDEAS, write_table)
    drive(given, __file__, cells(given), lambda _: makers, lambda: write(given))


if __name__ == "__main__":
    main()
