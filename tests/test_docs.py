from __future__ import annotations

import doctest
import re
import runpy
from pathlib import Path

import pytest

import slimgraph

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_tells_the_truth() -> None:
    assert doctest.testfile(str(ROOT / "README.md"), module_relative=False).failed == 0


@pytest.mark.parametrize("name", ["slimllm", "slimgraph"])
def test_the_example_recipe_is_the_preset(name: str) -> None:
    recipe = slimgraph.Recipe.from_file(ROOT / "examples" / f"{name}.yaml")
    assert recipe == slimgraph.method(name, 0.2)


def test_a_pass_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_importance.py"), run_name="__main__")
    seen = capsys.readouterr().out
    assert "LlamaForCausalLM: " in seen
    assert "- variance:" in seen


def test_the_fault_of_the_example_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "debugging" / "find_the_fault.py"), run_name="__main__")
    seen = capsys.readouterr().out
    assert "nothing: where pruning is not meant to change a value" in seen
    assert "is the fault: model.layers.1.mlp.up_proj, layer 1." in seen
    assert "Its rows [3, 4] are not the rows" in seen


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    file = ROOT / page
    links = re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)", file.read_text(encoding="utf-8"))
    lost = [target for target, _ in links if not (file.parent / target).exists()]
    lost += [f"{target}#{part}" for target, part in links if part and part not in headings(file.parent / target)]
    assert lost == []


def headings(page: Path) -> list[str]:
    """As a page's links spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
