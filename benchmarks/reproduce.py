"""The reproduction table of docs/results.md, in the order of SlimLLM's Table 1, and the paper's ablations.

    python benchmarks/reproduce.py --model NAME=DIR [--model NAME=DIR] --calibration FILE --text wikitext2=FILE \
        --text ptb=FILE --task-folder DIR --records FILE --results DIR

Every cell (a model, a share, a method, a seed) is worked out in a process of its own, so that its peak memory is its
own, and is kept as a JSON file in the results folder. Whatever is there already is not done again: the script can be
stopped and started at any time, and `--table` only writes the tables from what is there. `--limit` and `--tokens` make
it affordable; a results folder holds results of one setting only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from results import write_between_markers
from torch import nn

import slimgraph
from slimgraph.passes import (
    BiasOnly,
    CosineAllocation,
    FeatureSpace,
    NoRecovery,
    Pass,
    Pearson,
    Regression,
    Sweep,
    Verify,
)
from slimgraph.perplexity import perplexity
from slimgraph.pretrained import load_model, load_tokenizer
from slimgraph.recipe import Recipe, method
from slimgraph.tasks import PAPER_METRICS, LoadedTasks, evaluate_tasks, load_tasks
from slimgraph.text import calibration_tokens, read_tokens, start_tokens

DENSE, TUNED = "dense", "SlimLLM + LoRA"
PUBLISHED = {0.2: (26 / 32, 10.0), 0.5: (30 / 32, 7.0)}  # share of the parameters -> share of the layers, alpha


def slimllm(
    ratio: float,
    share: float,
    layers: int,
    *,
    heads: Pass | None = None,
    channels: Pass | None = None,
    recovery: Pass | None = None,
    alpha: float | None = None,
    cut: float | None = None,
) -> Recipe:
    """The published method with the published layers and alpha, or with something in its place."""
    nearest = min(PUBLISHED, key=lambda known: abs(known - share))
    of_layers, published_alpha = PUBLISHED[nearest]
    allocation = CosineAllocation(
        ratio=ratio,
        layers=max(1, round((of_layers if cut is None else cut) * layers)),
        alpha=published_alpha if alpha is None else alpha,
    )
    scores = (heads or Pearson(), channels or FeatureSpace())
    return Recipe((*scores, recovery or Regression(), allocation, Sweep(), Verify()))


Maker = Callable[[float, float, int], Recipe]
"""Ratio of all parameters, share that was asked for, number of layers -> recipe."""

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
TITLES = ["BoolQ", "PIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA"]


@dataclass(frozen=True)
class Cell:
    model: str
    share: float
    method: str
    seed: int
    ablation: bool = False

    @property
    def file(self) -> str:
        words = "".join(c if c.isalnum() else "-" for c in self.method.lower())
        kind = "ablation-" if self.ablation else ""
        return f"{kind}{self.model}-{self.share:g}-{words}-{self.seed}.json"


# ---- one cell, in a process of its own ----


class Work:
    """Works out one cell, and writes down whatever it has as soon as it has it."""

    def __init__(self, cell: Cell, options: argparse.Namespace) -> None:
        self.cell, self.options = cell, options
        self.file = options.results / cell.file
        self.source = dict(options.model)[cell.model]
        self.tokenizer = load_tokenizer(self.source)
        self.found: dict[str, Any] = asdict(cell) | {"finished": False}
        if self.file.exists():
            self.found |= json.loads(self.file.read_text(encoding="utf-8"))

    def run(self) -> None:
        model = load_model(self.source, device=self.options.device)
        total = sum(p.numel() for p in model.parameters())
        begun = time.perf_counter()
        if self.cell.method != DENSE:
            model = self._pruned(model, total)
        seconds, peak = time.perf_counter() - begun, peak_memory(self.options.device)
        if "perplexity" not in self.found:
            after = sum(p.numel() for p in model.parameters())
            self.keep(parameters=after, removed=1 - after / total, seconds=seconds, peak_bytes=peak)
            self.keep(perplexity=self._perplexities(model))
        if not self.cell.ablation and self.cell.seed == self.options.seeds[0] and self.options.task_folder:
            self._tasks(model)
        self.keep(finished=True)

    def _pruned(self, model: nn.Module, total: int) -> nn.Module:
        ids = calibration_tokens(
            self.options.calibration,
            self.tokenizer,
            samples=self.options.samples,
            seq_len=self.options.seq_len,
            seed=self.cell.seed,
        )
        structure = slimgraph.infer(slimgraph.trace(load_model(self.source, meta=True)))
        inside = in_layers(model, structure.layers)
        ratio = self.cell.share * (inside / total if self.options.of == "layers" else 1.0)
        makers = ABLATIONS if self.cell.ablation else METHODS
        recipe = makers[self.cell.method](ratio, self.cell.share, len(structure.layers))
        result = slimgraph.prune(model, ids.to(self.options.device), recipe=recipe)
        if result.model is None:
            raise SystemExit(f"{self.cell}: {result.module_failure}")
        self.keep(stages=result.seconds)
        return self._tuned(result) if self.cell.method == TUNED else result.model

    def _tuned(self, result: Any) -> nn.Module:
        from slimgraph.finetune import FinetuneSettings, finetune

        settings = FinetuneSettings(records=self.options.most_records, seed=self.cell.seed, save_steps=0)
        with tempfile.TemporaryDirectory() as folder:
            tuned = finetune(
                result, self.options.records, Path(folder) / "tuned", tokenizer=self.tokenizer, settings=settings
            )
        self.keep(finetune=tuned.to_dict())
        model: nn.Module = tuned.model
        return model

    def _perplexities(self, model: nn.Module) -> dict[str, Any]:
        start = start_tokens(self.tokenizer)
        found = {}
        for name, text in self.options.text:
            ids = read_tokens(text, self.tokenizer, limit=self.options.tokens, special=not start)
            found[name] = asdict(perplexity(model, ids, seq_len=self.options.seq_len, start=start))
        return found

    def _tasks(self, model: nn.Module) -> None:
        """One task at a time, so that little is lost when it is cut off."""
        loaded = load_tasks(["paper"], include_path=self.options.task_folder)
        model = model.to(getattr(torch, self.options.task_dtype))
        for (name, entry), known in zip(loaded.entries.items(), PAPER_METRICS, strict=True):
            done = self.found.setdefault("tasks", {})
            if known in done:
                continue
            one = LoadedTasks({name: entry}, loaded.manager)
            (score,) = evaluate_tasks(model, self.tokenizer, one, limit=self.options.limit).scores
            done[known] = asdict(score)
            self.keep()

    def keep(self, **values: Any) -> None:
        self.found |= values
        partial_file = self.file.with_suffix(".partial")
        partial_file.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        partial_file.replace(self.file)


def in_layers(model: nn.Module, layers: Sequence[str]) -> int:
    """Parameters of the decoder layers."""
    return sum(p.numel() for path in layers for p in model.get_submodule(path).parameters())


def peak_memory(device: str) -> int:
    """In bytes: of the device, or of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- all cells ----


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """In the order in which they tell most: all methods with the first seed before other seeds."""
    if options.ablations:
        for model, _ in options.model:
            for share in options.shares:
                yield from (Cell(model, share, name, options.seeds[0], ablation=True) for name in ABLATIONS)
        return
    for seed in options.seeds:
        for model, _ in options.model:
            if seed == options.seeds[0] and (not options.methods or DENSE in options.methods):
                yield Cell(model, 0.0, DENSE, seed)
            for share in options.shares:
                chosen = [name for name in METHODS if not options.methods or name in options.methods]
                yield from (Cell(model, share, name, seed) for name in chosen if name != TUNED or options.records)


def work_out(options: argparse.Namespace) -> None:
    for cell in cells(options):
        if read(options.results / cell.file).get("finished"):
            continue
        begun = time.perf_counter()
        again = [sys.executable, __file__, *sys.argv[1:], "--cell", json.dumps(asdict(cell))]
        done = subprocess.run(again, check=False)
        state = "done" if done.returncode == 0 else f"failed ({done.returncode})"
        print(f"{cell.file}: {state}, {time.perf_counter() - begun:.0f} s", flush=True)
        write_tables(options)


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


# ---- tables ----


def write_tables(options: argparse.Namespace) -> None:
    kind = "ablations" if options.ablations else "reproduction"
    text = "\n\n".join([describe(options), *(table(options, model) for model, _ in options.model)])
    markers = (f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->")
    write_between_markers(options.out, text, *markers)


def table(options: argparse.Namespace, model: str) -> str:
    texts = [name for name, _ in options.text]
    tasks = [] if options.ablations else TITLES
    average = [] if options.ablations else ["average"]
    columns = ["share", "removed of all", "method", *texts, *tasks, *average, "seconds", "peak GB"]
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
        mean = [average_cell(first)] if average else []
        numbers = [perplexity_cell([s["perplexity"][t] for s in seeds]) for t in texts]
        cost = [f"{first['seconds']:.0f}", f"{first['peak_bytes'] / 1e9:.2f}"]
        shown = [f"{share:.0%}", f"{first['removed']:.1%}", name, *numbers, *scores, *mean, *cost]
        lines.append(f"| {' | '.join(shown)} |")
    remarks = [] if options.ablations else ranking(rows, texts)
    return "\n".join([*lines, *(["", *remarks] if remarks else [])])


def perplexity_cell(seeds: Sequence[Mapping[str, Any]]) -> str:
    values = [s["value"] for s in seeds]
    spread = statistics.stdev(values) if len(values) > 1 else seeds[0]["standard_error"]
    digits = 2 if statistics.mean(values) < 1000 else 0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def counted(task: Mapping[str, Any]) -> tuple[float, float]:
    return 100 * task["metrics"][task["counted"]], 100 * task["errors"].get(task["counted"], math.nan)


def task_cell(cell: Mapping[str, Any], task: str) -> str:
    found = cell.get("tasks", {}).get(task)
    return "-" if found is None else f"{counted(found)[0]:.1f}"


def average_cell(cell: Mapping[str, Any]) -> str:
    found = [counted(t) for t in cell.get("tasks", {}).values()]
    if len(found) < len(PAPER_METRICS):
        return "-"
    error = math.sqrt(sum(e * e for _, e in found)) / len(found)
    return f"{sum(v for v, _ in found) / len(found):.2f} ± {error:.2f}"


def ranking(rows: Mapping[tuple[float, str], list[dict[str, Any]]], texts: Sequence[str]) -> list[str]:
    """Order by perplexity, and where it is not the paper's: LLM-Pruner, then SlimLLM, then SlimLLM with LoRA."""
    lines = []
    expected = ["LLM-Pruner (Taylor)", "SlimLLM", TUNED]
    for share in sorted({s for s, _ in rows if s}):
        for text in texts:
            means = {
                name: statistics.mean(s["perplexity"][text]["value"] for s in seeds)
                for (at, name), seeds in rows.items()
                if at == share
            }
            if len(means) < 2:
                continue
            best_first = sorted(means, key=means.__getitem__)
            measured = [name for name in reversed(best_first) if name in expected]
            wanted = [name for name in expected if name in means]
            verdict = (
                "" if len(wanted) < 2 else f"; {'as in the paper' if measured == wanted else 'NOT as in the paper'}"
            )
            lines.append(f"- {share:.0%}, {text}, best first: {', '.join(best_first)}{verdict}")
    return lines


def describe(options: argparse.Namespace) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("slimgraph", "torch", "transformers", "lm-eval")
    )
    models = " ".join(f"--model {name}={Path(path).name}" for name, path in options.model)
    texts = " ".join(f"--text {name}={Path(path).name}" for name, path in options.text)
    tokens = "" if options.tokens is None else f" --tokens {options.tokens}"
    limit = "" if options.limit is None else f" --limit {options.limit}"
    folder = "" if options.task_folder is None else f" --task-folder {options.task_folder.name}"
    records = "" if options.records is None else f" --records {options.records.name}"
    more = f"{folder}{records}" + ("" if options.most_records is None else f" --most-records {options.most_records}")
    command = (
        f"python benchmarks/reproduce.py {models} --calibration {options.calibration.name} {texts}"
        f"{more}{tokens}{limit} "
        f"--seeds {' '.join(map(str, options.seeds))} --of {options.of}{' --ablations' if options.ablations else ''}"
    )
    share = "the decoder layers' parameters" if options.of == "layers" else "all parameters"
    return (
        f"Shares are of {share}. Calibration: {options.samples} windows of {options.seq_len} tokens of "
        f"`{options.calibration.name}`, the same for all methods. Perplexity in windows of {options.seq_len}; ± is the "
        "standard deviation over the calibration seeds, and for a single run the standard error over windows. Tasks by "
        f"lm-eval, zero-shot, {'all examples' if options.limit is None else f'the first {options.limit} examples'}, in "
        f"percent ({', '.join(f'{t}: {m}' for t, m in PAPER_METRICS.items())}), with the first seed, the model in "
        f"{options.task_dtype}. Everything else is float32. Seconds and peak "
        f"memory of pruning, and of fine-tuning where there is some.\nMade by `{command}` with {versions}, Python "
        f"{platform.python_version()}, on {os.cpu_count()} CPU cores that other work shared: the seconds are rough."
    )


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a results folder is for: with other settings its cells would not belong together."""
    names = ("of", "tokens", "limit", "task_dtype", "samples", "seq_len", "most_records")
    return {name: getattr(options, name) for name in names} | {"calibration": options.calibration.name}


def named(value: str) -> tuple[str, str]:
    name, found, path = value.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{value!r}: expected NAME=PATH")
    return name, path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=named, action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=named, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--task-folder", type=Path, help="task files of lm-eval; none, no tasks")
    parser.add_argument("--records", type=Path, help="instruction records; none, no fine-tuning")
    parser.add_argument("--most-records", type=int, help="use only the first so many records")
    parser.add_argument("--results", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--of", choices=("layers", "all"), default="layers", help="what the shares are of")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=[DENSE, *METHODS], help="only these")
    parser.add_argument("--tokens", type=int, help="only the first so many of each text")
    parser.add_argument("--limit", type=int, help="only the first so many examples of each task")
    parser.add_argument("--task-dtype", choices=("float32", "bfloat16"), default="float32", help="in tasks")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ablations", action="store_true", help="the ablations instead of the methods")
    parser.add_argument("--table", action="store_true", help="only write the tables from what is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "results.md")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.cell is not None:
        Work(Cell(**options.cell), options).run()
        return
    options.results.mkdir(parents=True, exist_ok=True)
    noted = options.results / "settings.json"
    if noted.exists() and read(noted) != settings(options):
        raise SystemExit(f"{options.results} holds results of other settings: {read(noted)}; take another folder")
    noted.write_text(json.dumps(settings(options), indent=1), encoding="utf-8")
    if not options.table:
        work_out(options)
    write_tables(options)


if __name__ == "__main__":
    main()
