from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_folders() -> dict[str, Path]:
    """Folder of every package in the tree, by the name it is imported as."""
    own = {"slimgraph": ROOT / "slimgraph", "slimgraph.passes": ROOT / "passes"}
    found = {}
    for name, folder in own.items():
        for init in folder.rglob("__init__.py"):
            inner = init.parent.relative_to(folder).parts
            if folder.name == "slimgraph" and inner[:1] == ("passes",):
                continue  # the link to the folder beside it
            found[".".join((name, *inner))] = init.parent
    return found


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(package_folders())


def test_every_module_is_in_a_package() -> None:
    folders = set(package_folders().values())
    modules = [*(ROOT / "slimgraph").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    strays = [module for module in modules if module.parent.resolve() not in folders]
    assert strays == []


def test_passes_are_one_folder_under_one_name() -> None:
    link = ROOT / "slimgraph" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")
    import slimgraph.passes

    assert Path(slimgraph.passes.__file__).resolve().parent == ROOT / "passes"


def test_types_are_shipped(project: dict[str, Any]) -> None:
    assert (ROOT / "slimgraph" / "py.typed").exists()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["slimgraph"]


def test_the_licence_is_there(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_constraints_stay_within_the_requirements(project: dict[str, Any]) -> None:
    from packaging.requirements import Requirement

    wanted = {each.name: each for each in map(Requirement, project["project"]["dependencies"])}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        (version,) = [specifier.version for specifier in pin.specifier]
        assert pin.name not in wanted or wanted[pin.name].specifier.contains(version), pin.name


@pytest.mark.slow
def test_wheel_and_source_hold_every_module(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(".venv", ".git", "*.egg-info", "build", "dist", "__pycache__", ".*_cache", "models")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skip)
    build = "import setuptools.build_meta as b; b.build_sdist('out'); b.build_wheel('out')"
    (tree / "out").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)

    modules = {
        f"{name.replace('.', '/')}/{module.name}"
        for name, folder in package_folders().items()
        for module in folder.glob("*.py")
    }
    (wheel,) = (tree / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    page = {f"slimgraph/debug/page/{each.name}" for each in (ROOT / "slimgraph" / "debug" / "page").iterdir()}
    assert page
    assert modules | page | {"slimgraph/py.typed"} <= shipped
    assert {name.split("/")[0] for name in shipped if "dist-info" not in name} == {"slimgraph"}
    assert any(name.endswith("/LICENSE") for name in shipped)

    (source,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.replace("slimgraph/passes/", "passes/") for name in modules} <= held
