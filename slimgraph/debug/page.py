"""The report: one page that shows what pruning did to a checkpoint, with everything it needs inside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from torch import fx

from slimgraph import checkpoint
from slimgraph.debug.charts import Series, bars, lines, write_plots
from slimgraph.debug.diff import Difference, GroupChange, diff
from slimgraph.debug.layergraph import LayerGraph, draw_layer
from slimgraph.debug.opened import open_model, original
from slimgraph.debug.print import kinds_of_layers
from slimgraph.errors import CheckpointError
from slimgraph.groups import Structure
from slimgraph.manifest import Manifest
from slimgraph.weightfiles import weight_files

__all__ = ["Cell", "Cost", "Report", "html_report"]


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: number of them, tied ones once.
        size: bytes of the weights, at the precision of the checkpoint.
        multiplications: multiply-adds per token in projections; attention's own products come on top.
    """

    parameters: int
    size: int
    multiplications: int


@dataclass(frozen=True)
class Cell:
    """A place of the heat map: a layer and a kind of unit.

    Attributes:
        layer, kind: which.
        units, kept: before and after.
        rows: removed unit indices, one row per unit of an enclosing group; empty where that is not known.
        row: units in each row.
        scores: of every unit, in the order of the rows; empty when they were not kept.
    """

    layer: int
    kind: str
    units: int
    kept: int
    rows: tuple[tuple[int, ...], ...] = ()
    row: int = 0
    scores: tuple[float, ...] = ()

    @property
    def removed(self) -> float:
        """Share of the units that went."""
        return 1 - self.kept / self.units


@dataclass(frozen=True, repr=False)
class Report:
    """Everything on the page; `html` makes it.

    Attributes:
        name: of the checkpoint.
        model: name of its class.
        difference: what pruning changed.
        before, after: costs.
        cells: of the heat map, layer by layer.
        drawings: one for each kind of layer.
        recipe: what made it, as YAML; `notes` are the settings in it.
        bisection: of `slimgraph bisect --json`, or None.
        evaluations: name -> what was measured.
    """

    name: str
    model: str
    difference: Difference
    before: Cost
    after: Cost
    cells: tuple[Cell, ...]
    drawings: tuple[LayerGraph, ...]
    recipe: str
    notes: Mapping[str, Any]
    bisection: Mapping[str, Any] | None
    evaluations: Mapping[str, Mapping[str, Any]]

    def __repr__(self) -> str:
        before, after = self.before, self.after
        share = 1 - after.parameters / before.parameters
        return f"Report({self.name}: {before.parameters:,} -> {after.parameters:,} parameters, {share:.1%} removed)"

    def html(self) -> str:
        """The page: one document that loads nothing."""
        environment = Environment(
            loader=PackageLoader("slimgraph.debug", "page"),
            autoescape=select_autoescape(["html.j2", "html"], default_for_string=True, default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.globals["zip"] = zip
        page = environment.get_template("report.html.j2")
        kinds = list(dict.fromkeys(c.kind for c in self.cells))
        rows = {kind: {c.layer: c for c in self.cells if c.kind == kind} for kind in kinds}
        layers = self.difference.layers
        return page.render(
            report=self,
            rows=rows,
            worst=max((c.removed for c in self.cells), default=0.0) or 1.0,
            units=json.dumps([_units(c) for c in self.cells], separators=(",", ":")),
            size_chart=bars(
                [each.parameters[0] for each in layers],
                [each.parameters[1] for each in layers],
                "parameters of each layer, before and after",
            ),
            errors=self._errors(),
            error_chart=lines(self._errors(), "relative error along depth") if self.bisection else None,
            gain_chart=lines(self._gains(), "gain from restoring a layer") if self._gains() else None,
        )

    def plots(self, directory: Path) -> list[Path]:
        """Draw the charts as files, PNG and SVG; see `slimgraph.debug.charts.write_plots` for errors."""
        kinds = dict.fromkeys(c.kind for c in self.cells)
        share = {kind: _by_layer(self.cells, kind, len(self.difference.layers)) for kind in kinds}
        plots: dict[str, tuple[str, Series]] = {"kept_share": ("share of the units that stays", share)}
        if self.bisection:
            plots["error_by_depth"] = ("relative error", self._errors())
        if self._gains():
            plots["gain_by_layer"] = ("KL gained by restoring the layer", self._gains())
        return write_plots(directory, plots)

    def _errors(self) -> Series:
        layers, sites = (self.bisection or {}).get("layers", []), (self.bisection or {}).get("sites", [])
        series: dict[str, list[float | None]] = {"residual stream, accumulated": [b["error"] for b in layers]}
        for kind in dict.fromkeys(s["kind"] for s in sites):
            of = {s["layer"]: s["own"] for s in sites if s["kind"] == kind}
            series[f"{kind}, own"] = [of.get(b["layer"]) for b in layers]
        return series

    def _gains(self) -> Series:
        layers = (self.bisection or {}).get("layers", [])
        gains = [b["gain"] for b in layers]
        return {"KL gained": gains} if any(g is not None for g in gains) else {}


def html_report(
    directory: str | Path,
    *,
    bisection: str | Path | Mapping[str, Any] | None = None,
    evaluations: Sequence[str | Path] = (),
    scores: str | Path | Mapping[str, Sequence[float]] | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Gather everything about a pruned checkpoint. Reads no weights.

    Args:
        directory: of the checkpoint.
        bisection: what `slimgraph bisect --json` wrote, or its file.
        evaluations: JSON files of measurements, such as `slimgraph eval --json` writes.
        scores: site -> score of every unit, or the file of it that `slimgraph prune --scores` wrote.
        trust_remote_code: let the checkpoint bring its own modeling code.

    Raises:
        CheckpointError: there is no checkpoint, it was not pruned, or a JSON file cannot be read.
    """
    path = Path(directory)
    manifest = checkpoint.load_manifest(path)
    if manifest is None:
        raise CheckpointError(f"{path} was not pruned by slimgraph; expected a pruned checkpoint: there is no report")
    after = open_model(path, values=False, trust_remote_code=trust_remote_code)
    before = open_model(original(after.model), values=False)
    found = diff(before, after)
    bytes_after = sum(file.stat().st_size for file in weight_files(path))
    per_parameter = bytes_after / found.parameters_after
    groups = {g.group: g for g in found.groups}
    kept = {name: g.kept // max(1, len(g.removed)) for name, g in groups.items()}
    return Report(
        name=path.resolve().name,
        model=type(after.model).__name__,
        difference=found,
        before=Cost(
            found.parameters_before, round(found.parameters_before * per_parameter), _multiplications(before.structure)
        ),
        after=Cost(found.parameters_after, bytes_after, _multiplications(after.structure)),
        cells=tuple(_cells(before.structure, groups, _json(scores) if scores is not None else {})),
        drawings=tuple(
            draw_layer(before.structure, layer, title, kept) for title, layer in kinds_of_layers(before.structure)
        ),
        recipe=_recipe(manifest),
        notes=manifest.recipe.get("notes", {}),
        bisection=None if bisection is None else _checked_bisection(_json(bisection)),
        evaluations={Path(file).stem: _flat(_json(file)) for file in evaluations},
    )


# ---- what is on the page ----


def _cells(
    structure: Structure, groups: Mapping[str, GroupChange], scores: Mapping[str, Sequence[float]]
) -> list[Cell]:
    found: list[Cell] = []
    for site in structure.prunable_sites():
        assert site.layer is not None
        inner = [structure.group(name) for name in site.groups]
        kinds = ["kv groups", "heads"] if len(inner) == 2 else [site.kind]
        for kind, group in zip(kinds, inner, strict=True):
            outer = inner[0].units if kind == "heads" and len(inner) == 2 else 1
            own = tuple(float(s) for s in scores.get(site.name, ()))
            change = groups.get(group.name)
            if change is None:
                units = group.units * outer
                found.append(Cell(site.layer, kind, units, units, ((),), units, own if len(own) == units else ()))
                continue
            whole = change.units * outer if change.within is None else change.units
            stays = change.kept * outer if change.within is None else change.kept
            row = change.units // max(1, len(change.removed))
            rows = change.removed * outer if change.within is None and outer > 1 else change.removed
            found.append(Cell(site.layer, kind, whole, stays, rows, row, own if len(own) == whole else ()))
    return found


def _units(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in asdict(cell).items() if value or key in ("layer", "kept")}


def _by_layer(cells: Sequence[Cell], kind: str, layers: int) -> list[float | None]:
    of = {c.layer: 1 - c.removed for c in cells if c.kind == kind}
    return [of.get(layer) for layer in range(layers)]


def _multiplications(structure: Structure) -> int:
    """Elements of every weight that a value is multiplied with, once for each time."""
    total = 0
    for c in structure.analysis.contractions:
        for node in (c.left, c.right):
            source = _source(node)
            if source is not None:
                total += math.prod(int(n) for n in source.meta["val"].shape)
    return total


def _source(node: fx.Node) -> fx.Node | None:
    """The parameter behind a node that only moves it about."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else None


def _recipe(manifest: Manifest) -> str:
    passes = {key: value for key, value in manifest.recipe.items() if key != "notes"}
    return yaml.safe_dump(passes, sort_keys=False, allow_unicode=True).strip()


def _checked_bisection(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not {"layers", "sites", "kl"} <= data.keys():
        raise CheckpointError("the bisection lacks layers, sites or kl; give what `slimgraph bisect --json FILE` wrote")
    return data


def _json(source: str | Path | Mapping[str, Any]) -> Any:
    if isinstance(source, Mapping):
        return source
    try:
        data = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} cannot be read ({error}); expected a JSON file that slimgraph wrote"
        ) from error
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{source} holds a {type(data).__name__}; expected a JSON object that slimgraph wrote")
    return data


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers and words of nested objects under joined names; lists are left out."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key} · ")
        elif isinstance(value, (int, float, str)):
            found[prefix + key] = value
    return found
