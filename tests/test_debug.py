"""Difference, invariants, exports and the report of a pruned checkpoint."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from transformers import LlamaForCausalLM

import slimgraph
from slimgraph import cli
from slimgraph.debug.diff import Difference, diff
from slimgraph.debug.export import node_data, to_dot, to_graphml
from slimgraph.debug.layergraph import draw_layer
from slimgraph.debug.page import html_report
from slimgraph.debug.verify import Verification, verify
from slimgraph.errors import CheckpointError, GraphError, ModelError, NumericsError
from slimgraph.pipeline import Result, prune, run_passes
from slimgraph.state import State, attach
from slimgraph.trace import trace

IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
RECIPE = slimgraph.method("wanda", 0.25, recovery="regression", round_to=4)


@dataclass
class Made:
    dense: Path
    pruned: Path
    result: Result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., LlamaForCausalLM]) -> Made:
    place = tmp_path_factory.mktemp("debug")
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(place / "dense")
    result = prune(model, IDS, recipe=RECIPE, keep_scores=True, verify=True)
    result.save(place / "pruned")
    return Made(place / "dense", place / "pruned", result)


@pytest.fixture(scope="module")
def difference(made: Made) -> Difference:
    return diff(made.dense, made.pruned)


# ---- difference ----


def test_the_difference_is_the_plan(made: Made, difference: Difference) -> None:
    cuts = made.result.plan.cuts
    assert {g.group for g in difference.groups} == set(cuts)
    for group in difference.groups:
        cut = cuts[group.group]
        for gone, stays in zip(group.removed, cut.keep, strict=True):
            assert sorted([*gone, *stays]) == list(range(cut.units))
        assert group.share == pytest.approx(1 - cut.kept / cut.units)


def test_the_difference_is_that_of_the_modules(made: Made, difference: Difference) -> None:
    before = dict(slimgraph.load(made.dense).named_parameters())
    after = dict(slimgraph.load(made.pruned).named_parameters())
    assert difference.parameters_before == sum(p.numel() for p in before.values())
    assert difference.parameters_after == sum(p.numel() for p in after.values())
    changed = {p.name: (p.before, p.after) for p in difference.parameters}
    for name, tensor in after.items():
        old = tuple(before[name].shape) if name in before else None
        assert changed.get(name, (old, old)) == (old, tuple(tensor.shape))
    assert {p.name for p in difference.biases} == after.keys() - before.keys()
    assert sum(each.parameters[1] for each in difference.layers) == sum(
        p.numel() for name, p in after.items() if ".layers." in name
    )
    held = {(a.module, a.attribute): (a.before, a.after) for a in difference.attributes}
    up = after["model.layers.0.mlp.up_proj.weight"]
    assert held["model.layers.0.mlp.up_proj", "out_features"] == (48, up.shape[0])


def test_a_pruned_checkpoint_alone_says_the_same(made: Made, difference: Difference) -> None:
    alone = diff(None, made.pruned)
    assert {**alone.to_dict(), "dense": ""} == {**difference.to_dict(), "dense": ""}
    json.dumps(alone.to_dict())


def test_the_difference_in_words(difference: Difference) -> None:
    text, page = repr(difference), difference.to_markdown()
    for word in ("heads", "channels", "-> ", "o_proj.bias", "out_features"):
        assert word in text
        assert word in page
    assert "<table>" in difference._repr_html_()
    rows = [line for line in page.splitlines() if line.startswith("| model.layers.0.mlp.up_proj.weight |")]
    assert rows[0].split("|")[2].strip() == "48 × 32"


def test_sizes_in_the_graph(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    found = diff(tiny_llama(), tiny_llama(head_dim=4))
    views = {v.node: (v.before, v.after) for v in found.views if v.operator == "aten.view.default"}
    assert ("[*, *, -1, 8]", "[*, *, -1, 4]") in views.values()


def test_other_models_are_no_pair(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(ModelError, match="expected a model and one pruned from it"):
        diff(_Other(), tiny_llama())


class _Other(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids)


# ---- invariants ----


def test_a_sound_checkpoint_passes(made: Made) -> None:
    found = verify(made.pruned, against=made.dense)
    assert [(c.name, c.detail) for c in found.checks if not c.passed] == []
    assert found.ok
    assert "0 failed" in repr(found)
    assert "masked equivalence" in found._repr_html_()


def damaged(made: Made, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(made.pruned, place)
    weights = load_file(place / "model.safetensors")
    change(weights)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


def failing(found: Verification) -> dict[str, str]:
    return {c.name: c.detail for c in found.failures}


def test_what_is_wrong_is_found(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def swap(weights: dict[str, Any]) -> None:
        weights[name][[0, 1]] = weights[name][[1, 0]].clone()

    place = damaged(made, tmp_path / "swapped", swap)
    failures = failing(verify(place, against=made.dense))
    assert failures.keys() == {"slices", "masked equivalence"}
    assert name in failures["slices"]
    assert name in failures["masked equivalence"]

    place = damaged(made, tmp_path / "short", lambda weights: weights.update({name: weights[name][:-1].clone()}))
    failures = failing(verify(place))
    assert failures.keys() == {"files", "loads"}
    assert cli._run(["verify", str(place)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_not_a_number_and_a_wrong_attribute(made: Made, tmp_path: Path) -> None:
    def spoil(weights: dict[str, Any]) -> None:
        weights["model.norm.weight"][0] = torch.nan

    place = damaged(made, tmp_path / "nan", spoil)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"]["plan"]["model.layers.0.mlp.down_proj.weight[1]"]["keep"][0].pop()
    (place / "config.json").write_text(json.dumps(config))
    failures = failing(verify(place))
    assert "model.norm.weight" in failures["finite"]
    assert "the plan in the manifest leads to" in failures["plan"]


def test_a_model_that_does_not_run_fails_the_checks(made: Made, tmp_path: Path) -> None:
    place = damaged(made, tmp_path / "wrong", lambda weights: None)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"]["attributes"]["model.layers.0.self_attn"] = {"head_dim": 5}
    (place / "config.json").write_text(json.dumps(config))
    assert failing(verify(place))["cache"].startswith("RuntimeError: ")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        verify(tmp_path / "nothing")


# ---- after each pass ----


@dataclass(frozen=True)
class Break:
    """A pass that changes a weight that no plan says anything about."""

    value: float
    name = "break_it"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        with torch.no_grad():
            graph_module.get_parameter("model.layers.0.self_attn.v_proj.weight")[0] = self.value
        return PassResult(graph_module, True)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3.0, GraphError, r"v_proj\.weight is not the slice .* \[pass break_it, after wanda_sp, .*sweep, _owning\]"),
        (math.nan, NumericsError, r"v_proj\.weight holds NaN .* \[pass break_it"),
    ],
)
def test_the_pass_that_broke_it_is_named(
    tiny_llama: Callable[..., LlamaForCausalLM], value: float, error: type[Exception], message: str
) -> None:
    *before, last = RECIPE.passes
    graph = attach(trace(tiny_llama()), State(batches=[IDS]))
    # A copy of the weights, so that what the pass breaks is not the dense model as well.
    with pytest.raises(error, match=message):
        run_passes(graph, [*before, _owning, Break(value), last], verify=True)


def _owning(graph_module: fx.GraphModule) -> PassResult:
    weight = graph_module.get_parameter("model.layers.0.self_attn.v_proj.weight")
    graph_module.get_submodule("model.layers.0.self_attn.v_proj").weight = torch.nn.Parameter(weight.detach().clone())
    return PassResult(graph_module, True)


# ---- other tools ----


def test_graphml_and_dot(made: Made) -> None:
    structure = made.result.structure
    read = nx.parse_graphml(to_graphml(structure))
    expected = structure.to_networkx()
    assert dict(read.nodes(data=True)) == dict(expected.nodes(data=True))
    assert {frozenset(edge) for edge in read.edges} == {frozenset(edge) for edge in expected.edges}
    assert all(read.edges[edge]["site"] == data["site"] for *edge, data in expected.edges(data=True))
    dot = to_dot(structure)
    assert dot.count(" -- ") == structure.to_networkx().number_of_edges()
    assert dot.count('penwidth="3"') == sum(len(s.groups) for s in structure.sites)


def test_node_data_for_model_explorer(made: Made) -> None:
    data = node_data(made.result.structure)
    names = {n.name for n in made.result.structure.analysis.graph_module.graph.nodes}
    (graph,) = data.values()
    assert graph["results"].keys() <= names
    (down,) = {s.reads for s in made.result.structure.sites if s.layer == 0 and s.kind == "channels"}
    assert graph["results"][down] == {"value": 48}
    theirs = pytest.importorskip("model_explorer.node_data_builder", reason="Model Explorer is not installed")
    rebuilt = theirs.ModelNodeData(
        {
            name: theirs.GraphNodeData(
                results={k: theirs.NodeDataResult(**v) for k, v in each["results"].items()},
                name=each["name"],
                gradient=[theirs.GradientItem(**g) for g in each["gradient"]],
            )
            for name, each in data.items()
        }
    )
    (written,) = json.loads(rebuilt.to_json_string()).values()
    assert {k: v for k, v in written.items() if k in graph} == graph


# ---- the report ----

BISECTION = {
    "kl": 0.5,
    "dense_loss": 3.0,
    "pruned_loss": 3.5,
    "tokens": 64,
    "faults": [],
    "costliest_layer": 1,
    "layers": [{"layer": i, "error": 0.1 * i, "gain": 0.2 * i} for i in range(2)],
    "sites": [{"layer": i, "kind": "heads", "own": 0.3} for i in range(2)],
}


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page")
    (place / "bisect.json").write_text(json.dumps(BISECTION))
    (place / "wikitext.json").write_text(json.dumps({"value": 12.5, "tokens": 100, "text": "<b>wiki</b>"}))
    scores = {site: each.tolist() for site, each in (made.result.scores or {}).items()}
    assert scores.keys() == {s.name for s in made.result.structure.sites if {*s.groups} & made.result.plan.cuts.keys()}
    found = html_report(
        made.pruned, bisection=place / "bisect.json", evaluations=[place / "wikitext.json"], scores=scores
    )
    (place / "out.html").write_text(found.html(), encoding="utf-8")
    assert [f.suffix for f in found.plots(place / "plots")] == [".png", ".svg"] * 3
    return place / "out.html"


def test_the_page_is_whole_and_loads_nothing(page: Path, made: Made) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*""", text) == []
    assert "http://" not in text
    assert "https://" not in text
    assert "&lt;b&gt;wiki&lt;/b&gt;" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(svg)
    cells = json.loads(re.findall(r'<script id="cells" type="application/json">(.*?)</script>', text, re.S)[0])
    for cell in cells:
        assert sum(len(row) for row in cell.get("rows", [])) == cell["units"] - cell["kept"]
        if cell["kind"] == "channels":
            gone = {i for row in cell["rows"] for i in row}
            ranked = sorted(range(cell["units"]), key=cell["scores"].__getitem__)
            assert gone == set(ranked[: len(gone)])  # what scored lowest went


def test_frozen_axes_are_hatched(made: Made) -> None:
    structure = made.result.structure
    name = "model.layers.0.mlp.down_proj.weight[1]"
    plain = draw_layer(structure, 0, "a layer", {})
    frozen = replace(structure.groups[name], frozen="for a reason")
    hatched = draw_layer(replace(structure, groups={**structure.groups, name: frozen}), 0, "a layer", {})
    assert "hatch" not in plain.svg
    assert hatched.svg.count('class="hatch"') == 3  # gate, up and down
    assert "frozen: for a reason" in hatched.svg
    assert plain.svg.count('class="box site"') == 2
    assert {key.group for key in plain.keys} >= {name}


def test_what_cannot_be_reported(made: Made, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was not pruned by slimgraph"):
        html_report(made.dense)
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        html_report(made.pruned, bisection=tmp_path / "b.json")


def _chromium() -> str | None:
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


@pytest.mark.slow
@pytest.mark.skipif(_chromium() is None, reason="there is no Chromium here")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(page: Path, width: int, scheme: Any) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    complaints: list[str] = []
    with sync_api.sync_playwright() as driver:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=_chromium(), args=options)
        view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        view.on("console", lambda message: complaints.append(message.text))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.on(
            "request", lambda asked: None if asked.url.startswith(("file:", "data:")) else complaints.append(asked.url)
        )
        view.goto(page.as_uri())

        assert view.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
        tip = view.locator("#tip")
        assert not tip.is_visible()
        view.locator(".piece").first.hover()
        assert "units" in tip.inner_text()
        view.locator("#search").fill("down_proj layers.1")
        shown = view.locator("#table tbody tr:visible")
        assert {each.split("\t")[0] for each in shown.all_inner_texts()} == {
            "model.layers.1.mlp.down_proj.weight",
            "model.layers.1.mlp.down_proj.bias",
        }
        view.locator("#search").fill("nothing of the kind")
        assert view.locator("#nothing").is_visible()

        cell = view.locator("[data-cell]").last
        cell.focus()
        view.keyboard.press("Enter")
        assert cell.get_attribute("aria-pressed") == "true"
        assert "Layer 1, channels" in view.locator("#units-title").inner_text()
        view.keyboard.press("ArrowLeft")
        assert "layer 0" in tip.inner_text()
        colour = "getComputedStyle(document.body).backgroundColor"
        before = view.evaluate(colour)
        view.locator("#theme").click()
        assert view.evaluate(colour) != before
        browser.close()
    assert complaints == []
