"""The reproduction table of docs/results.md, in the order of SlimLLM's Table 1, and the paper's ablations.

    python benchmarks/reproduce.py --model NAME=DIR [--model NAME=DIR] --calibration FILE --text wikitext2=FILE \
        --text ptb=FILE --task-folder DIR --records FILE --results DIR

The script can be stopped and started at any time, see `cells.py`; `--table` only writes the tables from what is there.
`--limit` and `--tokens` make it affordable.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from cells import (
    DENSE,
    TITLES,
    TUNED,
    Cell,
    Maker,
    average_cell,
    describe,
    drive,
    parser,
    perplexity_cell,
    read,
    slimllm,
    task_cell,
)
from results import write_between_markers

from slimgraph.passes import BiasOnly, FeatureSpace, NoRecovery, Pearson
from slimgraph.recipe import method
from slimgraph.tasks import PAPER_METRICS

METHODS: dict[str, Maker] = {
    "magnitude": lambda ratio, _, __: method("magnitude", ratio),
    "Wanda-sp": lambda ratio, _, __: method("wanda", ratio),
    "FLAP": lambda ratio, _, __: method("flap", ratio),
    "LLM-Pruner (Taylor)": lambda ratio, _, __: method("taylor", ratio),
    "SlimLLM, no recovery": lambda *given: slimllm(*given, recovery=NoRecovery()),
    "SlimLLM": lambda *given: slimllm(*given),
    TUNED: lambda *given: slimllm(*given),
}
ABLATIONS: dict[str, Maker] = {
    "SlimLLM": lambda *given: slimllm(*given),
    "heads: no greedy search": lambda *given: slimllm(*given, heads=Pearson(search=False)),
    "channels: no directions": lambda *given: slimllm(*given, channels=FeatureSpace(directions=False)),
    "channels: no activations": lambda *given: slimllm(*given, channels=FeatureSpace(activations=False)),
    "channels: no source projections": lambda *given: slimllm(*given, channels=FeatureSpace(sources=False)),
    "channels: lowest 1 % kept": lambda *given: slimllm(*given, channels=FeatureSpace(keep_lowest=0.01)),
    "recovery: bias only": lambda *given: slimllm(*given, recovery=BiasOnly()),
    "recovery: none": lambda *given: slimllm(*given, recovery=NoRecovery()),
    "alpha 0": lambda *given: slimllm(*given, alpha=0.0),
    "alpha 5": lambda *given: slimllm(*given, alpha=5.0),
    "alpha 15": lambda *given: slimllm(*given, alpha=15.0),
    "alpha 20": lambda *given: slimllm(*given, alpha=20.0),
    "all layers": lambda *given: slimllm(*given, cut=1.0),
}
PAPER = {  # perplexities of LLaMA-7B in SlimLLM's Table 1
    (0.2, "wikitext2"): {"LLM-Pruner (Taylor)": 19.09, "SlimLLM": 15.95, TUNED: 15.55},
    (0.2, "ptb"): {"LLM-Pruner (Taylor)": 34.21, "SlimLLM": 26.09, TUNED: 26.66},
    (0.5, "wikitext2"): {"LLM-Pruner (Taylor)": 112.44, "SlimLLM": 37.89, TUNED: 26.71},
    (0.5, "ptb"): {"LLM-Pruner (Taylor)": 255.38, "SlimLLM": 67.68, TUNED: 42.19},
}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """In the order in which they tell most: all methods with the first seed before other seeds."""
    if options.ablations:
        for model, _ in options.model:
            for share in options.shares:
                found = (Cell(model, share, name, options.seeds[0], "ablation", scored=False) for name in ABLATIONS)
                yield from found
        return
    for seed in options.seeds:
        for model, _ in options.model:
            if seed == options.seeds[0] and (not options.methods or DENSE in options.methods):
                yield Cell(model, 0.0, DENSE, seed)
            for share in options.shares:
                chosen = [name for name in METHODS if not options.methods or name in options.methods]
                made = [name for name in chosen if name != TUNED or options.records]
                yield from (Cell(model, share, name, seed, scored=seed == options.seeds[0]) for name in made)


def write_tables(options: argparse.Namespace) -> None:
    kind = "ablations" if options.ablations else "reproduction"
    how = describe(options, "reproduce.py")
    if options.ablations:
        cost = "Seconds and peak memory of pruning."
        how = describe(options, "reproduce.py", " --ablations", scored=None, cost=cost)
    text = "\n\n".join([how, *(table(options, model) for model, _ in options.model)])
    markers = (f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->")
    write_between_markers(options.out, text, *markers)


def table(options: argparse.Namespace, model: str) -> str:
    texts = [name for name, _ in options.text]
    tasks = [] if options.ablations else TITLES
    average = [] if options.ablations else ["average"]
    columns = ["share", "removed of all", "method", *texts, *tasks, *average, "seconds", "peak GB", "seeds"]
    lines = [f"`{model}`", "", f"| {' | '.join(columns)} |", f"|---|--:|---|{'--:|' * (len(columns) - 3)}"]
    found = [read(options.results / cell.file) for cell in cells(options) if cell.model == model]
    rows: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for each in found:
        if "perplexity" in each:
            rows.setdefault((each["share"], each["method"]), []).append(each)
    order = list(ABLATIONS if options.ablations else [DENSE, *METHODS])
    for (share, name), seeds in sorted(rows.items(), key=lambda row: (row[0][0], order.index(row[0][1]))):
        first = seeds[0]
        scores = [task_cell(first, task) for task in PAPER_METRICS] if tasks else []
        mean = [average_cell([first])] if average else []
        numbers = [perplexity_cell([s["perplexity"][t] for s in seeds]) for t in texts]
        cost = [f"{first['seconds']:.0f}", f"{first['peak_bytes'] / 1e9:.2f}", str(len(seeds))]
        shown = [f"{share:.0%}", f"{first['removed']:.1%}", name, *numbers, *scores, *mean, *cost]
        lines.append(f"| {' | '.join(shown)} |")
    remarks = [] if options.ablations else ranking(rows, texts)
    return "\n".join([*lines, *(["", *remarks] if remarks else [])])


def ranking(rows: dict[tuple[float, str], list[dict[str, Any]]], texts: Sequence[str]) -> list[str]:
    """Order by perplexity, and beside it the order of those methods that the paper lists, too."""
    lines = []
    for share in sorted({s for s, _ in rows if s}):
        for text in texts:
            means = {
                name: statistics.mean(s["perplexity"][text]["value"] for s in seeds)
                for (at, name), seeds in rows.items()
                if at == share
            }
            if len(means) > 1:
                order = " < ".join(sorted(means, key=means.__getitem__))
                lines.append(f"- {share:.0%}, {text}: {order}{beside_the_paper(means, PAPER.get((share, text), {}))}")
    return lines


def beside_the_paper(means: dict[str, float], paper: dict[str, float]) -> str:
    """What the paper's order is, and whether it is the one of `means`; nothing where it lists fewer than two."""
    theirs = sorted(means.keys() & paper.keys(), key=paper.__getitem__)
    if len(theirs) < 2:
        return ""
    ours = sorted(theirs, key=means.__getitem__)
    return f"; in the paper, {'as here' if ours == theirs else 'NOT as here'}: {' < '.join(theirs)}"


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", choices=[DENSE, *METHODS], help="only these")
    options.add_argument("--ablations", action="store_true", help="the ablations instead of the methods")
    return options.parse_args()


def main() -> None:
    options = parse()
    drive(
        options,
        __file__,
        cells(options),
        lambda cell: ABLATIONS if cell.kind else METHODS,
        lambda: write_tables(options),
    )


if __name__ == "__main__":
    main()
