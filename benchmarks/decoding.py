"""Pruned against dense: prefill and decode tokens per second, as Markdown.

    python benchmarks/decoding.py                            # random, LLaMA-shaped, 1.1B: bfloat16 and float32
    python benchmarks/decoding.py --model DIR --dtypes float32
    python benchmarks/decoding.py --layers 4 --new-tokens 8  # a quick look
    python benchmarks/decoding.py --profile bfloat16         # operators of dense and pruned decoding

Speed depends on shapes alone, so a random model serves, pruned at random and alike in all layers, with the biases that
a refit adds. Every table is one process with all models in memory, whose repetitions take turns.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from machine import footer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from slimgraph.bench import Settings, bench
from slimgraph.pipeline import prune
from slimgraph.pretrained import load_model
from slimgraph.progress import Progress

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def random_model(layers: int, dtype: torch.dtype) -> nn.Module:
    """A LLaMA-shaped model with random weights, made in its dtype."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()
    finally:
        torch.set_default_dtype(before)


def pruned(model: nn.Module, ratio: float, heads: str, progress: Progress) -> nn.Module:
    """The model with random units removed and biases added."""
    ids = torch.arange(32).view(2, 16)
    result = prune(model, ids, ratio, recipe="random", recovery="bias_only", heads=heads, progress=progress)
    if result.model is None:
        raise SystemExit(result.module_failure)
    return result.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a checkpoint, instead of the random model")
    parser.add_argument("--layers", type=int, default=22, help="of the random model")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5], help="shares of all parameters that go")
    parser.add_argument("--heads", default="auto", help="auto, kv or balanced: what goes of attention")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--profile", metavar="DTYPE", help="print where decoding spends its time, and stop")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    progress = Progress(enabled=True)
    settings = Settings(given.prompt_tokens, given.new_tokens, given.batch, given.repetitions)
    for name in [given.profile] if given.profile else given.dtypes:
        models = _models(given, getattr(torch, name), progress)
        if given.profile:
            _profile(models, given.prompt_tokens, given.new_tokens)
            continue
        print(f"{bench(models, settings, progress=progress).to_markdown()}\n", flush=True)
    print(footer())


def _models(given: argparse.Namespace, dtype: torch.dtype, progress: Progress) -> dict[str, nn.Module]:
    made = load_model(given.model, dtype=dtype) if given.model else random_model(given.layers, dtype)
    dense = made.to(given.device)
    return {
        "dense": dense,
        **{f"{ratio:.0%} pruned": pruned(dense, ratio, given.heads, progress) for ratio in given.ratios},
    }


@torch.inference_mode()
def _profile(models: dict[str, nn.Module], prompt: int, new: int) -> None:
    """The operators that decoding spends most time in, for each model."""
    for name, model in models.items():
        token: Any = torch.zeros(1, prompt, dtype=torch.long, device=next(model.parameters()).device)
        cache = model(input_ids=token, use_cache=True).past_key_values
        token = token[:, :1]
        for _ in range(3):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(new):
                model(input_ids=token, past_key_values=cache, use_cache=True)
        print(f"{name}, {new} tokens\n{seen.key_averages().table(sort_by='self_cpu_time_total', row_limit=12)}\n")


if __name__ == "__main__":
    main()
