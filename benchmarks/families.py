"""Every family of decoders, every claim, by masked equivalence: the matrix in `docs/families.md`.

    python benchmarks/families.py                      # all families, writes docs/families.md
    python benchmarks/families.py --only llama,gpt2    # some families, prints only
    python benchmarks/families.py --quick              # the subset that the quick test suite runs

Tiny random models of each family, built from their `transformers` configuration classes with asymmetric sizes, in
float64. Per claim, random units are removed, different numbers in different layers, and the pruned graph must equal the
dense graph with these units masked; the pruned module must equal the graph, also after saving and loading in a new
process, and its generation with a cache must equal that without. Besides, the default method must prune it: that of
`slimgraph prune`, on few and short samples.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from family_configs import FAMILIES, QUICK, SLOW, build

CLAIMS = ("channels", "kv groups", "balanced heads", "expert channels", "experts", "residual")
AFTER = ("module", "reload", "cache")
METHOD = "default method"
HOLDS = ("exact", "same", "pruned", "-")
EXACT = 1e-9
RATIO, SAMPLES = 0.04, 4  # of all parameters, and windows that are given and written


def check_family(name: str, folder: str) -> dict[str, Any]:
    """All claims for one family; a cell is "exact", "-" (there is nothing of the kind), or what went wrong."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    row: dict[str, Any] = {"family": name}
    try:
        return _check_family(name, Path(folder), row)
    except Exception as error:
        row["fails"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        row["traceback"] = traceback.format_exc()
        return row


def _check_family(name: str, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    from slimgraph.groups import infer
    from slimgraph.masked import in_double
    from slimgraph.trace import trace

    model = build(name, "sdpa")
    row["class"] = type(model).__name__
    start = time.perf_counter()
    graph_module = trace(model, shape=(2, 9))
    row["trace s"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
    structure = infer(graph_module)
    row["analyse s"] = round(time.perf_counter() - start, 3)
    row["refusals"] = sorted({r.operator for r in structure.refusals})
    row["sites"] = len(structure.prunable_sites())
    row["sdpa = eager"] = _cell(lambda: _same_groups(name, structure))
    wide = infer(in_double(graph_module))
    plans = {claim: _plan(structure, claim, seed) for seed, claim in enumerate(CLAIMS)}
    for claim, plan in plans.items():
        row[claim] = _cell(lambda plan=plan: _graph_equals_mask(wide, plan)) if plan else "-"
    row[METHOD] = _cell(lambda: _pruned_by_default(model, structure))
    together = _together(plans)
    if not together:
        return row
    row["module"] = _cell(lambda: _module_equals_graph(model, structure, together, folder / name, row))
    if plans["residual"]:
        row["residual module"] = _cell(lambda: _module_equals_graph(model, structure, plans["residual"], None, row))
    return row


def _pruned_by_default(model: Any, structure: Any) -> str:
    """Whether the default method prunes it, as far as whole heads allow, and module and graph agree."""
    import slimgraph
    from slimgraph.generate import can_generate
    from slimgraph.passes import SelfCalibration
    from slimgraph.recipe import Recipe, default_method, method

    if not structure.prunable_sites():
        return "-"
    passes = method(default_method(can_generate(model)), RATIO, round_to=1).passes
    few = [replace(p, samples=SAMPLES) if isinstance(p, SelfCalibration) else p for p in passes]
    ids = torch.randint(3, 90, (SAMPLES, 16), generator=torch.Generator().manual_seed(2))
    result = slimgraph.prune(model, ids, recipe=Recipe(tuple(few)))
    if result.module_failure:
        return result.module_failure
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result.model))
    return "pruned" if after < before else f"{after:,} of {before:,} parameters are left"


def _cell(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _same_groups(name: str, structure: Any) -> str:
    from slimgraph.groups import infer
    from slimgraph.trace import trace

    eager = build(name, "eager")
    other = infer(trace(eager, shape=(2, 9)))
    describe = lambda s: {  # noqa: E731
        (
            g.units,
            g.kind,
            g.layer,
            g.frozen is None,
            tuple(sorted((o.source, o.dim) for o in g.occurrences if "." in o.source)),
        )
        for g in s.groups.values()
    }
    here, there = describe(structure), describe(other)
    return "same" if here == there else f"differ: {next(iter(here ^ there))}"


def _places(group: Any) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((o.source, o.dim) for o in group.occurrences if "." in o.source))


def _plan(structure: Any, claim: str, seed: int) -> dict[str, Any]:
    """Random cuts of every group of one kind, as many as possible but half of the units."""
    from slimgraph.plan import Cut

    draw = random.Random(seed)
    pairs = [s.groups for s in structure.sites if s.kind == "heads" and len(s.groups) == 2]
    inner = {p[1]: p[0] for p in pairs}
    stacked = {g for s in structure.sites if s.stacked for g in s.groups}
    cuts: dict[str, Any] = {}
    for group in structure.groups.values():
        wanted = {
            "channels": group.kind == "channels" and group.name not in stacked,
            "kv groups": group.kind == "heads" and group.name not in inner,
            "balanced heads": group.kind == "heads" and group.name in inner,
            "expert channels": group.name in stacked and group.kind == "channels",
            "experts": group.kind == "experts",
            "residual": group.kind == "residual",
        }[claim]
        if not wanted or group.frozen or group.units <= group.at_least:
            continue
        kept = draw.randint(max(group.at_least, (group.units + 1) // 2), group.units - 1)
        rows = structure.groups[inner[group.name]].units if claim == "balanced heads" else 1
        keep = tuple(tuple(sorted(draw.sample(range(group.units), kept))) for _ in range(rows))
        within = inner[group.name] if claim == "balanced heads" else None
        cut = Cut(group.units, keep, within)
        cuts[group.name] = cut if _allowed(structure, group.name, cut) else Cut(group.units, keep[:1])
    return cuts


def _allowed(structure: Any, name: str, cut: Any) -> bool:
    """Whether the choice may differ from block to block; where not, the same units are kept in all."""
    from slimgraph.errors import PlanError
    from slimgraph.plan import Plan, resolve

    try:
        resolve(structure, Plan({name: cut}))
    except PlanError:
        return False
    return True


def _together(plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All claims at once, but for the residual stream."""
    everything: dict[str, Any] = {}
    for claim, cuts in plans.items():
        if claim != "residual":
            everything.update(cuts)
    return everything


def _ids(structure: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 90, (2, 9), generator=generator)


def _graph_equals_mask(wide: Any, cuts: dict[str, Any]) -> str:
    from slimgraph.masked import masked_logits
    from slimgraph.plan import Plan, resolve
    from slimgraph.surgery import prune_graph

    resolved = resolve(wide, Plan(cuts))
    ids = _ids(wide)
    pruned = prune_graph(resolved)
    with torch.no_grad():
        found, expected, dense = pruned(ids), masked_logits(resolved, ids), wide.analysis.graph_module(ids)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if float((found - dense).abs().max()) == 0:
        return "no effect: removing these units changes nothing"
    return "exact" if difference <= EXACT else f"off by {difference:.1e}"


def _module_equals_graph(
    model: Any, structure: Any, cuts: dict[str, Any], folder: Path | None, row: dict[str, Any]
) -> str:
    from slimgraph import checkpoint
    from slimgraph.module import prune_module, tolerance
    from slimgraph.plan import Plan, resolve
    from slimgraph.surgery import prune_graph

    plan = Plan(cuts)
    resolved = resolve(structure, plan)
    graph_module = prune_graph(resolved)
    pruned = prune_module(model, resolved, graph_module)
    if folder is not None:
        row["attributes"] = sorted({a for values in pruned.attributes.values() for a in values})
        row["cache"] = _cache_cell(pruned.module, model, _ids(structure))
        checkpoint.save(pruned.module, folder, pruned.manifest(plan, {}))
        _store_logits(pruned.module, structure, folder)
    limit = EXACT if tolerance(graph_module) <= EXACT else 1e-5
    if pruned.difference > limit:
        return f"off by {pruned.difference:.1e}"
    return "exact"


def _cache_cell(module: Any, dense: Any, ids: torch.Tensor) -> str:
    """Whether generation agrees; not applicable where the dense model's own does not."""
    cell = _cell(lambda: _cache(module, ids))
    if cell == "exact":
        return cell
    return cell if _cell(lambda: _cache(dense, ids)) == "exact" else "-"


def _cache(module: Any, ids: torch.Tensor) -> str:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        without = module.generate(ids, use_cache=False, **options)
        cached = module.generate(ids, use_cache=True, **options)
    return "exact" if torch.equal(without, cached) else "differs"


def _store_logits(module: Any, structure: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    with torch.no_grad():
        logits = module(input_ids=_ids(structure), use_cache=False).logits
    save_file({"logits": logits.contiguous()}, folder / "expected.safetensors")


RELOAD = """
import json, logging, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
import torch, slimgraph
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from family_configs import reloaded
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
for folder in sys.argv[1:]:
    try:
        expected = load_file(Path(folder) / "expected.safetensors")["logits"]
        (Path(folder) / "expected.safetensors").unlink()
        model = reloaded(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False).logits
        off = float((found - expected).abs().max() / expected.abs().max())
        cell = "exact" if off <= 1e-9 else f"off by {off:.1e}"
    except Exception as error:
        cell = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    print(json.dumps([Path(folder).name, cell]), flush=True)
"""


def _reload(folders: list[Path]) -> dict[str, str]:
    """Load every checkpoint in one new process."""
    if not folders:
        return {}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *map(str, folders)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)},
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    missing = {f.name: f"the process ended: {done.stderr.strip()[-200:]}" for f in folders}
    return {**missing, **dict(lines)}


def run(names: list[str], workers: int) -> list[dict[str, Any]]:
    """The rows of the matrix, in the order of the names."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(workers) as pool:
            jobs = {pool.submit(check_family, name, folder): name for name in names}
            for job in as_completed(jobs):
                name = jobs[job]
                rows[name] = job.result()
                print(f"[{len(rows)}/{len(names)}] {_one_line(rows[name])}", file=sys.stderr, flush=True)
        saved = [p for p in Path(folder).iterdir() if (p / "expected.safetensors").exists()]
        for name, cell in _reload(saved).items():
            rows[name]["reload"] = cell
    return [rows[name] for name in names]


def _one_line(row: dict[str, Any]) -> str:
    if "fails" in row:
        return f"{row['family']}: fails: {row['fails'][:300]}"
    cells = {c: row.get(c) for c in ("sdpa = eager", *CLAIMS, "module", "residual module", "cache", METHOD)}
    odd = {c: v for c, v in cells.items() if v not in (*HOLDS, None)}
    return f"{row['family']}: {odd or 'all exact'} refusals {row['refusals']}"


def is_exact(row: dict[str, Any]) -> bool:
    """Whether every applicable cell holds."""
    cells = [row.get(c, "-") for c in ("sdpa = eager", *CLAIMS, *AFTER, "residual module", METHOD)]
    return "fails" not in row and all(c in HOLDS for c in cells) and "exact" in cells


def markdown(rows: list[dict[str, Any]], command: str, seconds: float) -> str:
    """The document."""
    columns = ("sdpa = eager", *CLAIMS, "module", "residual module", "reload", "cache", METHOD)
    exact = sum(is_exact(r) for r in rows)
    failing = [r for r in rows if "fails" in r]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("slimgraph", "torch", "transformers"))
    lines = [
        "# Families",
        "",
        f"Made by `{command}` in {seconds:.0f} s with {versions}, Python {platform.python_version()}.",
        "",
        f"{len(rows)} families; **{exact} exact in every applicable cell**; {len(failing)} not traced or failing. "
        "Models are tiny and random, in float64. `-`: the family has nothing of the kind, or all of it is frozen.",
        "",
        "- *sdpa = eager*: the groups found with both attention implementations are the same.",
        "- *channels ... residual*: the pruned graph equals the dense graph with the removed units masked, to 1e-9.",
        "- *module*: the pruned `transformers` module equals the pruned graph (all claims but residual at once; to "
        "1e-9, or 1e-5 where the model itself computes in float32); *residual module*: the same for the residual "
        "stream.",
        "- *reload*: saved, loaded in a new process, same logits to 1e-9. "
        "*cache*: generation with and without cache agree; `-` where that of the dense model does not.",
        f"- *{METHOD}*: that of `slimgraph prune`, with {SAMPLES} given and {SAMPLES} written windows of 16 tokens, "
        f"prunes it ({RATIO:.0%} of all parameters, as far as whole heads allow), module and graph agree; `-` where "
        "no site is cut of its own accord.",
        "",
        "| family | trace s | analyse s | " + " | ".join(columns) + " | operators refused |",
        "|" + "---|" * (len(columns) + 4),
    ]
    notes: list[str] = []
    for row in rows:
        if "fails" in row:
            continue
        cells = []
        for column in columns:
            cell = row.get(column, "-")
            if cell not in HOLDS:
                notes.append(f"{row['family']}, {column}: {cell}")
                cell = f"no ({len(notes)})"
            cells.append(cell)
        refused = ", ".join(f"`{o}`" for o in row["refusals"]) or ""
        lines.append(
            f"| {row['family']} | {row['trace s']} | {row['analyse s']} | " + " | ".join(cells) + f" | {refused} |"
        )
    if notes:
        lines += ["", "Cells that do not hold, with the message:", ""]
        lines += [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    if failing:
        lines += ["", "Families that fail as a whole, with the message:", ""]
        lines += [f"- {r['family']}: {r['fails']}" for r in failing]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated families; nothing is written")
    parser.add_argument("--quick", action="store_true", help="the subset of the quick tests; nothing is written")
    parser.add_argument("--slow", action="store_true", help="also the families that take minutes each")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write all cells as JSON")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(QUICK) if args.quick else list(FAMILIES)
    names += list(SLOW) if args.slow else []
    start = time.perf_counter()
    rows = run(names, args.workers)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    text = markdown(rows, f"python benchmarks/families.py{' --slow' if args.slow else ''}", time.perf_counter() - start)
    if args.only or args.quick:
        print(text)
        sys.exit(0 if all(is_exact(r) for r in rows) else 1)
    Path(__file__).resolve().parent.parent.joinpath("docs", "families.md").write_text(text)


if __name__ == "__main__":
    main()
