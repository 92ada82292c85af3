"""What pruning a model of LLaMA-7B's shape costs, beside one plain forward pass of the same tokens.

    python benchmarks/speed.py --work DIR            # 13 GB of random weights are written to DIR once

Both read bfloat16 weights from safetensors files layer by layer. Each runs in a process of its own, so that its peak
resident memory is its own. The result is printed as Markdown, for docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import footer
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from slimgraph import distributed
from slimgraph.allocator import keep_freed_memory
from slimgraph.execute import run
from slimgraph.groups import infer
from slimgraph.pipeline import micro_batches
from slimgraph.pretrained import load_skeleton
from slimgraph.progress import Progress, Stopwatch
from slimgraph.recipe import method
from slimgraph.store import Store
from slimgraph.streaming import prune_checkpoint
from slimgraph.trace import trace

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_hidden_layers": 16},
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_hidden_layers": 4},
}


def write_model(directory: Path, shape: str) -> None:
    """A checkpoint of random bfloat16 weights, written layer by layer."""
    if (directory / "model.safetensors.index.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**SHAPES[shape], vocab_size=32000, max_position_embeddings=2048, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[str]] = {}
    for name in model.state_dict():
        place = name.split(".")
        files.setdefault(f"layer-{place[2]}" if "layers" in place else "rest", []).append(name)
    index: dict[str, str] = {}
    for file, names in files.items():
        tensors = {}
        for name in names:
            wanted = model.get_parameter(name).shape
            tensors[name] = torch.ones(wanted, dtype=torch.bfloat16)
            if len(wanted) > 1:
                tensors[name] = torch.randn(wanted, generator=generator).mul_(0.02).bfloat16()
        save_file(tensors, directory / f"{file}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(names, f"{file}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def plain_forward(source: Path, ids: torch.Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Every layer once, weights streamed the same way; no logits, which the sweep does not compute either."""
    model, _ = load_skeleton(source, dtype=dtype, device=device)
    graph = trace(model)
    store = Store(source, model, dtype, device)
    ends = [after for _, after in infer(graph).boundaries()]
    batches = micro_batches(graph, ids, None, device)
    start = time.perf_counter()
    run(graph, batches, weights=store, cuts=dict.fromkeys(ends, lambda _: None), progress=Progress(enabled=True))
    _synchronize(device)
    seconds = time.perf_counter() - start
    store.close()
    return {"forward": seconds}


def prune(source: Path, out: Path, ids: torch.Tensor, ratio: float, dtype: torch.dtype, device: torch.device) -> Any:
    """The whole run, and its seconds by stage, each without the stages inside it."""
    watch = Stopwatch()
    start = time.perf_counter()
    with distributed.joined(device) as place:
        result = prune_checkpoint(
            source,
            out,
            ids,
            recipe=method("slimllm", ratio),
            dtype=dtype,
            device=place,
            progress=Progress(enabled=True),
            watch=watch,
        )
    whole = time.perf_counter() - start
    return {"stages": watch.own(), "sweep": watch.stages()["sweep"], "whole": whole, "removed": result.budget.removed}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _child(arguments: argparse.Namespace) -> None:
    """One measurement, printed as JSON."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32000, (arguments.samples, arguments.seq_len), generator=generator)
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    source = arguments.work / arguments.shape
    parts: dict[str, Callable[[], Any]] = {
        "forward": lambda: plain_forward(source, ids, dtype, device),
        "prune": lambda: prune(source, arguments.work / f"{arguments.shape}-out", ids, arguments.ratio, dtype, device),
    }
    keep_freed_memory()
    found = parts[arguments.part]()
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        found["device_peak"] = torch.cuda.max_memory_allocated(device) / 2**30
    print(json.dumps(found))


def _measure(arguments: argparse.Namespace, part: str) -> Any:
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Write the model if need be, measure both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and the result")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", choices=("forward", "prune"), help="measure this only, in this process")
    arguments = parser.parse_args()
    if arguments.part:
        _child(arguments)
        return
    write_model(arguments.work / arguments.shape, arguments.shape)
    forward = _measure(arguments, "forward")
    subprocess.run(["rm", "-rf", str(arguments.work / f"{arguments.shape}-out")], check=True)
    pruned = _measure(arguments, "prune")
    tokens = f"{arguments.samples} x {arguments.seq_len} tokens"
    print(f"\n{arguments.shape}, {tokens}, {arguments.dtype}, {pruned['removed']:.2%} removed\n")
    print("| what | seconds |\n|---|--:|")
    for stage, seconds in pruned["stages"].items():
        print(f"| {'forward, within the sweep' if stage == 'sweep' else stage} | {seconds:.1f} |")
    print(f"| **the whole run** | **{pruned['whole']:.1f}** |")
    print(f"| one plain forward pass, streamed the same way | {forward['forward']:.1f} |")
    print(f"| sweep over plain forward | {pruned['sweep'] / forward['forward']:.2f} x |")
    print(f"\npeak resident memory: {pruned['peak']:.2f} GiB pruning, {forward['peak']:.2f} GiB plain forward")
    if "device_peak" in pruned:
        print(f"peak device memory: {pruned['device_peak']:.2f} GiB, {forward['device_peak']:.2f} GiB")
    print(f"\n{footer()}")


if __name__ == "__main__":
    main()
