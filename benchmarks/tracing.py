"""Seconds and peak memory of trace and analysis alone, for models far larger than the machine, as Markdown.

    python benchmarks/tracing.py                        # 7B, 70B, a mixture of 1T, and growth with depth
    python benchmarks/tracing.py --only 7B,70B
    python benchmarks/tracing.py --profile llama-32     # where the analysis spends its time

Models are on the meta device: shapes, no weights. Each runs in a process of its own, whose peak resident memory is
given in whole, and beside it what the imports alone take.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import footer

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "7B": ("llama", {}),
    "70B": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    "1T mixture": (
        "deepseek_v3",
        {
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "n_routed_experts": 384,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "vocab_size": 163840,
        },
    ),
    **{f"llama-{n}": ("llama", {"num_hidden_layers": n}) for n in (8, 16, 32, 64, 128)},
    **{f"mixture-{n}": ("deepseek_v3", {"num_hidden_layers": n, "n_routed_experts": 384}) for n in (8, 16, 32)},
}
DEFAULT = ["7B", "70B", "1T mixture", "llama-8", "llama-16", "llama-32", "llama-64", "llama-128"]


def measure(name: str, *, profile: bool = False) -> dict[str, Any]:
    """Trace and analyse one shape, in this process."""
    import transformers

    from slimgraph.groups import infer
    from slimgraph.trace import trace

    model_type, changes = SHAPES[name]
    imports = _peak_mib()
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(model_type, **changes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    start = time.perf_counter()
    graph = trace(model)
    traced = time.perf_counter()
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    structure = infer(graph)
    profiler.disable()
    analysed = time.perf_counter()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return {
        "name": name,
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(structure.layers),
        "nodes": len(graph.graph.nodes),
        "sites": len(structure.sites),
        "trace": traced - start,
        "analyse": analysed - traced,
        "imports_mib": imports,
        "peak_mib": _peak_mib(),
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_a_process(name: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(DEFAULT), help=f"names of {', '.join(SHAPES)}, by commas")
    parser.add_argument("--profile", choices=SHAPES, help="profile the analysis of one shape")
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one or given.profile:
        print(json.dumps(measure(given.one or given.profile, profile=bool(given.profile))))
        return
    print("| model | parameters | layers | nodes | sites | trace s | analyse s | peak MiB | of these, imports |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in given.only.split(","):
        r = _in_a_process(name)
        print(
            f"| {name} ({r['model']}) | {r['parameters'] / 1e9:,.1f}B | {r['layers']} | {r['nodes']:,} | {r['sites']} "
            f"| {r['trace']:.1f} | {r['analyse']:.2f} | {r['peak_mib']:,.0f} | {r['imports_mib']:,.0f} |",
            flush=True,
        )
    print(f"\n{footer()}")


if __name__ == "__main__":
    main()
