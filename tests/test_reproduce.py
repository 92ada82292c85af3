"""The script of the reproduction table on a tiny model: cells, going on after a stop, tables."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from slimgraph.tasks import PAPER_METRICS

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


KINDS = ("reproduction", "ablations", "accuracy", "summary", "changed", "alone", "calibration")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import reproduce

        yield reproduce
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def ideas(script: ModuleType) -> ModuleType:
    import accuracy

    return accuracy


@pytest.fixture
def arguments(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the old cat sits under a tree and the dog runs .\n" * 60)
    (tmp_path / "results.md").write_text("".join(f"<!-- {kind}: begin -->\n<!-- {kind}: end -->\n" for kind in KINDS))
    given = {"model": f"tiny={tmp_path / 'model'}", "calibration": text, "text": f"story={text}", "tokens": 64}
    given |= {"results": tmp_path / "cells", "samples": 4, "seq-len": 16, "out": tmp_path / "results.md"}
    return ["reproduce.py", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


def start(script: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> list[str]:
    """Run the script, its cells in this process; returns the cells that were worked out."""
    worked: list[str] = []

    def in_this_process(command: list[str], **_: Any) -> Any:
        worked.append(json.loads(command[-1])["method"])
        monkeypatch.setattr(sys, "argv", command[1:])
        script.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    return worked


def test_cells_are_worked_out_once_and_end_in_a_table(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], tmp_path: Path
) -> None:
    few = [*arguments, "--shares", "0.2", "--seeds", "0"]
    assert start(script, monkeypatch, [*few, "--methods", "dense"]) == ["dense"]
    assert start(script, monkeypatch, [*few, "--methods", "dense", "SlimLLM"]) == ["SlimLLM"]
    assert start(script, monkeypatch, [*few, "--methods", "dense", "SlimLLM"]) == []
    cells = [json.loads(file.read_text()) for file in (tmp_path / "cells").glob("tiny*.json")]
    sizes = {cell["method"]: cell["parameters"] for cell in cells}
    assert sizes["SlimLLM"] < sizes["dense"]
    assert all(cell["perplexity"]["story"]["tokens"] == 60 and cell["peak_bytes"] > 2**20 for cell in cells)
    table = (tmp_path / "results.md").read_text()
    rows = [line.split("|")[3].strip() for line in table.splitlines() if line.startswith(("| 0%", "| 20%"))]
    assert rows == ["dense", "SlimLLM"]
    assert "story: " not in table  # of one method there is no order
    with pytest.raises(SystemExit, match="other settings"):
        start(script, monkeypatch, [*few, "--samples", "3"])


def test_every_method_and_ablation_is_a_recipe(script: ModuleType) -> None:
    for makers in (script.METHODS, script.ABLATIONS):
        recipes = [make(0.1, 0.2, 30) for make in makers.values()]
        assert all(len(recipe.passes) >= 5 for recipe in recipes)
    assert len({r.to_yaml() for r in recipes}) == len(script.ABLATIONS)
    published = script.slimllm(0.1, 0.2, 32).passes[3]
    assert (published.layers, published.alpha) == (26, 10.0)
    published = script.slimllm(0.1, 0.5, 32).passes[3]
    assert (published.layers, published.alpha) == (30, 7.0)


def test_a_rank_that_is_not_the_papers_is_said(script: ModuleType) -> None:
    pruner, tuned = "LLM-Pruner (Taylor)", script.TUNED

    def verdict(text: str, **values: float) -> str:
        names = {"pruner": pruner, "slimllm": "SlimLLM", "tuned": tuned, "flap": "FLAP"}
        rows = {(0.2, names[n]): [{"perplexity": {text: {"value": v}}}] for n, v in values.items()}
        (line,) = script.ranking(rows, [text])
        return str(line).partition(f", {text}: ")[2]

    order = f"{tuned} < FLAP < SlimLLM < {pruner}"
    here = f"{order}; in the paper, as here: {tuned} < SlimLLM < {pruner}"
    assert verdict("wikitext2", pruner=3.0, slimllm=2.0, flap=1.5, tuned=1.0) == here
    there = f"{order}; in the paper, NOT as here: SlimLLM < {tuned} < {pruner}"
    assert verdict("ptb", pruner=3.0, slimllm=2.0, flap=1.5, tuned=1.0) == there
    assert verdict("essays", pruner=3.0, slimllm=2.0, flap=1.5, tuned=1.0) == order  # of which the paper says nothing
    assert verdict("ptb", slimllm=2.0, flap=1.5) == "FLAP < SlimLLM"


def test_a_table_names_the_command_that_made_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """It has every option that the script asks for, and reads as the options that were given."""
    given = [*arguments, "--seeds", "0", "1", "--limit", "7", "--task-folder", "somewhere/tasks", "--ablations"]
    monkeypatch.setattr(sys, "argv", given)
    options = script.parse()
    (command,) = re.findall(
        r"Made by `python benchmarks/(.*?)`", script.describe(options, "reproduce.py", " --ablations")
    )
    monkeypatch.setattr(sys, "argv", command.split())
    again = script.parse()
    assert (again.seeds, again.tokens, again.limit, again.of, again.ablations) == ([0, 1], 64, 7, "layers", True)
    assert (again.results.name, again.task_folder.name) == ("cells", "tasks")


def test_a_table_says_of_what_its_numbers_are(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", "0", "1"])
    whole = script.describe(script.parse(), "reproduce.py")
    assert "deviation over the calibration seeds" in whole
    assert "Tasks by lm-eval" in whole
    monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", "0"])
    part = script.describe(script.parse(), "reproduce.py", scored=None, cost="Seconds.")
    assert "± is the standard error over windows. Weights" in part
    assert "float32. Seconds.\nMade by" in part


def test_ideas_are_laid_beside_the_published_method(
    script: ModuleType, ideas: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], tmp_path: Path
) -> None:
    few = [*arguments, "--shares", "0.2", "--seeds", "0"]
    assert start(script, monkeypatch, [*few, "--methods", "SlimLLM"]) == ["SlimLLM"]
    both = [*few, "--ideas", "SlimLLM", "Slimgraph"]
    assert start(ideas, monkeypatch, both) == ["dense", "Slimgraph"]  # SlimLLM is shared with the reproduction
    rows = [
        line.split("|")[1:-1]
        for line in (tmp_path / "results.md").read_text().splitlines()
        if line.startswith("| 20% |")
    ]
    table = {row[1].strip(): [word.strip() for word in row[2:]] for row in rows[-2:]}
    assert table["SlimLLM"][1] == "1.00"
    assert float(table["Slimgraph"][1]) != 1.0


def test_gaps_are_paired_by_seed(ideas: ModuleType, tmp_path: Path) -> None:
    """An idea without the third seed is held against the published method's first two; one without any has no row."""
    options = SimpleNamespace(
        model=[("m", "m")], shares=[0.2, 0.5], seeds=[0, 1, 2], text=[("t", "t.txt")], results=tmp_path, samples=32
    )

    def keep(share: float, name: str, seed: int, log_perplexity: float) -> None:
        cell = ideas.cell("m", share, name, seed)
        row = {"seed": seed, "perplexity": {"t": {"value": math.exp(log_perplexity)}}}
        (tmp_path / cell.file).write_text(json.dumps(row))

    (tmp_path / ideas.Cell("m", 0.0, "dense", 0).file).write_text('{"perplexity": {"t": {"value": 1.0}}}')
    for seed, (published, own) in enumerate([(1.0, 0.25), (3.0, 1.75), (100.0, None)]):
        keep(0.2, "SlimLLM", seed, published)
        if own is not None:
            keep(0.2, "Slimgraph", seed, own)
    keep(0.2, "Slimgraph, 128 written", 2, 30.0)
    keep(0.5, "Slimgraph, 64 written", 0, 1.0)  # nothing to hold it against
    keep(0.2, "SlimLLM, 512 given", 1, 2.0)
    keep(0.2, "Slimgraph, 512 given", 1, 0.4)
    keep(0.2, "Slimgraph, 512 given", 2, 50.0)
    assert ideas.gap_table(options, "changed", ideas.CHANGED).splitlines() == [
        "| changed | m, 20% | m, 50% | seeds |",
        "|---|--:|--:|--:|",
        "| nothing | 0.50 | - | 2 |",
        "| 128 written | 0.30 | - | 1 |",
    ]
    assert ideas.summary(options).splitlines() == [
        "| model | share | windows given | gap, t | drop of the tasks | without boolq | seeds | with tasks |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        "| m | 20% | 32 | 0.50 (0.25 to 0.58) | - | - | 2 | 0 |",
        "| m | 20% | 512 | 0.20 | - | - | 1 | 0 |",
    ]


def test_an_idea_is_alone_or_a_change_of_the_whole(ideas: ModuleType) -> None:
    assert sorted([*ideas.ALONE, *ideas.CHANGED, "SlimLLM"]) == sorted(ideas.IDEAS)


def test_more_calibration_is_more_windows(
    ideas: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], tmp_path: Path
) -> None:
    curve = {"4 given": (4, 0), "6 given": (6, 0), "4 given, 3 written": (4, 3)}
    monkeypatch.setattr(ideas, "CURVE", {name: (given, ideas.curve_maker(n)) for name, (given, n) in curve.items()})
    few = [*arguments, "--shares", "0.2", "--seeds", "0", "--curve"]
    assert start(ideas, monkeypatch, few) == list(curve)
    lines = (tmp_path / "results.md").read_text().splitlines()
    found = [[word.strip() for word in line.split("|")[2:5]] for line in lines if line.startswith("| 20% |")]
    assert [row[:2] for row in found] == [["4 given", "64"], ["6 given", "96"], ["4 given, 3 written", "64"]]
    assert len({row[2] for row in found}) == 3


def test_with_more_windows_the_whole_methods_do_the_tasks(ideas: ModuleType) -> None:
    names = ["32 given", "SlimLLM, 512 given", "Slimgraph, 512 given", "Slimgraph, 512 given and used, 512 written"]
    options = SimpleNamespace(
        model=[("m", "m")], shares=[0.2], seeds=[0, 1, 2], ideas=names, curve=True, task_seeds=[1, 2]
    )
    cells = list(ideas.cells(options))
    assert [(cell.seed, cell.method) for cell in cells] == list(itertools.product(options.seeds, names))
    scored = [(cell.seed, cell.method) for cell in cells if cell.scored]
    assert scored == list(itertools.product(options.task_seeds, names[1:3]))


def test_gaps_are_of_logarithms_and_drops_of_averages(ideas: ModuleType) -> None:
    def row(value: float, right: float, seed: int = 0) -> dict[str, Any]:
        tasks = {t: {"metrics": {"acc": right}, "counted": "acc", "errors": {}} for t in PAPER_METRICS}
        return {"seed": seed, "perplexity": {"t": {"value": value}}, "tasks": tasks}

    dense, pruned = row(math.e, 0.5), row(math.e**3, 0.4)
    assert ideas.gap(pruned, dense, "t") == pytest.approx(2.0)
    published = [row(1.0, 0.3), row(1.0, 0.1, seed=1), row(1.0, 0.0, seed=2)]
    assert ideas.drop([pruned], published, dense) == pytest.approx(0.5)
    assert ideas.drop([pruned, row(1.0, 0.2, seed=1)], published, dense) == pytest.approx(20 / 30)
    assert ideas.drop([{**pruned, "tasks": {}}], published, dense) is None
    lucky = {**pruned, "tasks": {**pruned["tasks"], "boolq": {"metrics": {"acc": 0.9}, "counted": "acc", "errors": {}}}}
    assert ideas.drop([lucky], published, dense) < ideas.drop([lucky], published, dense, "boolq") == pytest.approx(0.5)


def test_tasks_can_be_done_with_more_seeds(
    script: ModuleType, ideas: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], tmp_path: Path
) -> None:
    """Whole methods only, and a cell that was finished without them does them then."""
    import cells

    worked: list[tuple[str, int]] = []

    def tasks(self: Any, model: Any) -> None:
        worked.append((self.cell.method, self.cell.seed))
        self.keep(tasks={t: {"metrics": {"acc": 0.5}, "counted": "acc", "errors": {}} for t in PAPER_METRICS})

    monkeypatch.setattr(cells.Work, "_tasks", tasks)
    few = [*arguments, "--shares", "0.2", "--seeds", "0", "1", "--ideas", "SlimLLM"]
    assert len(start(ideas, monkeypatch, few)) == 3
    assert worked == []
    few += ["full fit, local target", "--task-folder", str(tmp_path)]
    part = few[-3]
    assert start(ideas, monkeypatch, few) == ["dense", "SlimLLM", part, part]
    assert worked == [("dense", 0), ("SlimLLM", 0)]
    assert start(ideas, monkeypatch, [*few, "--task-seeds", "0", "1"]) == ["SlimLLM"]
    assert worked[2:] == [("SlimLLM", 1)]
    assert "with seeds 0, 1 as far as measured" in (tmp_path / "results.md").read_text()


def test_every_idea_is_a_recipe(ideas: ModuleType) -> None:
    recipes = [make(0.1, 0.2, 30).to_yaml() for make in ideas.IDEAS.values()]
    assert len(set(recipes)) == len(ideas.IDEAS)


def test_a_cells_seed_is_that_of_its_passes(ideas: ModuleType) -> None:
    from cells import seeded

    recipe = seeded(ideas.IDEAS["Slimgraph"](0.1, 0.2, 30), 5)
    assert [p.seed for p in recipe.passes if hasattr(p, "seed")] == [5]
    assert len(recipe.passes) == len(ideas.IDEAS["Slimgraph"](0.1, 0.2, 30).passes)


def test_the_layers_share_of_the_parameters(script: ModuleType) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2, bias=False), "b": torch.nn.Linear(2, 2, bias=False)})
    import cells

    assert cells.in_layers(model, ["b"]) == 4
