"""One cell of a table of results: a model, a share, a method and a seed, worked out in a process of its own.

Its peak memory is then its own, and it is kept as a JSON file in the results folder: whatever is there already is not
done again, and a script can be stopped and started at any time. A results folder holds results of one setting only.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimgraph
from slimgraph.passes import CosineAllocation, FeatureSpace, Pass, Pearson, Regression, Sweep, Verify
from slimgraph.perplexity import perplexity
from slimgraph.pretrained import load_model, load_tokenizer
from slimgraph.recipe import Recipe
from slimgraph.tasks import PAPER_METRICS, LoadedTasks, evaluate_tasks, load_tasks
from slimgraph.text import calibration_tokens, read_tokens, start_tokens

DENSE, TUNED = "dense", "SlimLLM + LoRA"
PUBLISHED = {0.2: (26 / 32, 10.0), 0.5: (30 / 32, 7.0)}  # share of the parameters -> share of the layers, alpha
TITLES = ["BoolQ", "PIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA"]

Maker = Callable[[float, float, int], Recipe]
"""Ratio of all parameters, share that was asked for, number of layers -> recipe."""


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


@dataclass(frozen=True)
class Cell:
    """What is measured, and under which heading: "" for methods as they are published, or a word like "ablation".

    With another number of samples than the options say, the method's name should say so.
    """

    model: str
    share: float
    method: str
    seed: int
    kind: str = ""
    scored: bool = True
    samples: int | None = None

    @property
    def file(self) -> str:
        """Name of the file that keeps it."""
        words = "".join(c if c.isalnum() else "-" for c in self.method.lower())
        kind = f"{self.kind}-" if self.kind else ""
        return f"{kind}{self.model}-{self.share:g}-{words}-{self.seed}.json"


class Work:
    """Works out one cell with one of the makers of recipes, and writes down whatever it has as soon as it has it."""

    def __init__(self, cell: Cell, options: argparse.Namespace, makers: Mapping[str, Maker]) -> None:
        self.cell, self.options, self.makers = cell, options, makers
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
        if self.cell.scored and self.options.task_folder:
            self._tasks(model)
        self.keep(finished=True)

    def _pruned(self, model: nn.Module, total: int) -> nn.Module:
        ids = calibration_tokens(
            self.options.calibration,
            self.tokenizer,
            samples=self.cell.samples or self.options.samples,
            seq_len=self.options.seq_len,
            seed=self.cell.seed,
        )
        structure = slimgraph.infer(slimgraph.trace(load_model(self.source, meta=True)))
        inside = in_layers(model, structure.layers)
        ratio = self.cell.share * (inside / total if self.options.of == "layers" else 1.0)
        recipe = seeded(self.makers[self.cell.method](ratio, self.cell.share, len(structure.layers)), self.cell.seed)
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


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with this seed in every pass that has one."""
    return Recipe(tuple(replace(p, seed=seed) if hasattr(p, "seed") else p for p in recipe.passes))


def in_layers(model: nn.Module, layers: Sequence[str]) -> int:
    """Parameters of the decoder layers."""
    return sum(p.numel() for path in layers for p in model.get_submodule(path).parameters())


def peak_memory(device: str) -> int:
    """In bytes: of the device, or of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work_out(cells: Iterable[Cell], options: argparse.Namespace, script: str, then: Callable[[], None]) -> None:
    """Have the script itself work out every cell that is not there yet, each in a process of its own."""
    for cell in cells:
        if is_finished(cell, options):
            continue
        begun = time.perf_counter()
        again = [sys.executable, script, *sys.argv[1:], "--cell", json.dumps(asdict(cell))]
        done = subprocess.run(again, check=False)
        state = "done" if done.returncode == 0 else f"failed ({done.returncode})"
        print(f"{cell.file}: {state}, {time.perf_counter() - begun:.0f} s", flush=True)
        then()


def is_finished(cell: Cell, options: argparse.Namespace) -> bool:
    """Whether nothing is left to do: a cell that was done without tasks lacks them once it is to have them."""
    found = read(options.results / cell.file)
    lacks_tasks = cell.scored and options.task_folder and not has_tasks(found)
    return bool(found.get("finished")) and not lacks_tasks


def has_tasks(cell: Mapping[str, Any]) -> bool:
    """Whether all of the paper's tasks were measured."""
    return len(cell.get("tasks", {})) == len(PAPER_METRICS)


def drive(
    options: argparse.Namespace,
    script: str,
    cells: Iterable[Cell],
    makers: Callable[[Cell], Mapping[str, Maker]],
    write: Callable[[], None],
) -> None:
    """What every script does: be the process of one cell, or have all cells worked out and write the tables."""
    if options.cell is not None:
        one = Cell(**options.cell)
        Work(one, options, makers(one)).run()
        return
    claim(options)
    if not options.table:
        work_out(cells, options, script, write)
    write()


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def claim(options: argparse.Namespace) -> None:
    """Make the results folder, or see that what is in it was measured alike."""
    options.results.mkdir(parents=True, exist_ok=True)
    noted = options.results / "settings.json"
    if noted.exists() and read(noted) != settings(options):
        raise SystemExit(f"{options.results} holds results of other settings: {read(noted)}; take another folder")
    noted.write_text(json.dumps(settings(options), indent=1), encoding="utf-8")


# ---- tables ----


def perplexity_cell(seeds: Sequence[Mapping[str, Any]]) -> str:
    values = [s["value"] for s in seeds]
    spread = statistics.stdev(values) if len(values) > 1 else seeds[0]["standard_error"]
    mean = statistics.mean(values)
    form = ".2f" if mean < 1000 else ".0f" if mean < 1e5 else ".1e"
    return f"{mean:{form}} ± {spread:{form}}"


def counted(task: Mapping[str, Any]) -> tuple[float, float]:
    return 100 * task["metrics"][task["counted"]], 100 * task["errors"].get(task["counted"], math.nan)


def task_cell(cell: Mapping[str, Any], task: str) -> str:
    found = cell.get("tasks", {}).get(task)
    return "-" if found is None else f"{counted(found)[0]:.1f}"


def average(cell: Mapping[str, Any], leave_out: str = "") -> float:
    """Mean of all tasks, or of all but one, in percent."""
    return statistics.mean(counted(task)[0] for name, task in cell["tasks"].items() if name != leave_out)


def average_cell(cells: Sequence[Mapping[str, Any]]) -> str:
    """Over the seeds with tasks; ± is the standard error over examples, which are the same for all seeds."""
    scored = [cell for cell in cells if has_tasks(cell)]
    if not scored:
        return "-"
    errors = [math.hypot(*(counted(t)[1] for t in cell["tasks"].values())) / len(cell["tasks"]) for cell in scored]
    return f"{statistics.mean(map(average, scored)):.2f} ± {statistics.mean(errors):.2f}"


def describe(
    options: argparse.Namespace,
    script: str,
    more_options: str = "",
    *,
    windows: str | None = None,
    scored: str | None = "the first seed",
    products: str = "",
    cost: str = "Seconds and peak memory of pruning, and of fine-tuning where there is some.",
) -> str:
    """How the cells of a table were measured, and with which command.

    Args:
        options: of the script.
        script: its file name.
        more_options: those that only this script has.
        windows: what to say where their number differs.
        scored: of which seeds tasks are; None where the table has none.
        products: what to say of products that are not float32.
        cost: what the columns of seconds and bytes are of.
    """
    share = "the decoder layers' parameters" if options.of == "layers" else "all parameters"
    spread = "the standard error over windows"
    if len(options.seeds) > 1:
        spread = f"the standard deviation over the calibration seeds, and for a single run {spread}"
    return (
        f"Shares are of {share}. Calibration: {windows or f'{options.samples} windows'} of {options.seq_len} tokens "
        f"of `{options.calibration.name}`{'' if windows else ', the same for all methods'}. Perplexity in windows of "
        f"{options.seq_len}; ± is {spread}. {'' if scored is None else _tasks_caption(options, scored)}"
        f"Weights and whatever is not said otherwise are float32{products}. {cost}\n"
        f"Made by `{_command(options, script, more_options)}` with {_versions()}, Python "
        f"{platform.python_version()}, on {os.cpu_count()} CPU cores that other work shared: the seconds are rough."
    )


def _tasks_caption(options: argparse.Namespace, scored: str) -> str:
    examples = "all examples" if options.limit is None else f"the first {options.limit} examples"
    metrics = ", ".join(f"{task}: {metric}" for task, metric in PAPER_METRICS.items())
    return f"Tasks by lm-eval, zero-shot, {examples}, in percent ({metrics}), with {scored}, in {options.task_dtype}. "


def _command(options: argparse.Namespace, script: str, more_options: str) -> str:
    """What was called, with the names of folders and files in place of where they lie."""
    words = [f"--model {name}={Path(path).name}" for name, path in options.model]
    words.append(f"--calibration {options.calibration.name}")
    words += [f"--text {name}={Path(path).name}" for name, path in options.text]
    words += [f"--task-folder {options.task_folder.name}"] if options.task_folder else []
    words += [f"--records {options.records.name}"] if options.records else []
    words += [f"--most-records {options.most_records}"] if options.most_records is not None else []
    words += [f"--tokens {options.tokens}"] if options.tokens is not None else []
    words += [f"--limit {options.limit} --task-dtype {options.task_dtype}"] if options.limit is not None else []
    words += [f"--seeds {' '.join(map(str, options.seeds))}", f"--of {options.of}"]
    words.append(f"--results {options.results.name}{more_options}")
    return f"python benchmarks/{script} {' '.join(words)}"


def _versions() -> str:
    names = ("slimgraph", "torch", "transformers", "lm-eval")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


# ---- options ----


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a results folder is for: with other settings its cells would not belong together."""
    names = ("of", "tokens", "limit", "task_dtype", "samples", "seq_len", "most_records")
    return {name: getattr(options, name) for name in names} | {"calibration": options.calibration.name}


def named(value: str) -> tuple[str, str]:
    name, found, path = value.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{value!r}: expected NAME=PATH")
    return name, path


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts of cells have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--tokens", type=int, help="only the first so many of each text")
    parser.add_argument("--limit", type=int, help="only the first so many examples of each task")
    parser.add_argument("--task-dtype", choices=("float32", "bfloat16"), default="float32", help="in tasks")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="only write the tables from what is there")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "results.md")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    return parser
