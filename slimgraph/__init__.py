"""Slimgraph: a compiler that makes decoder language models smaller.

Importing it also teaches `transformers` to load pruned checkpoints with `from_pretrained`.
"""

from slimgraph import hf as _hf  # noqa: F401  registers the checkpoint format with transformers
from slimgraph.checkpoint import load, load_manifest
from slimgraph.debug import Inspection, inspect
from slimgraph.errors import SlimgraphError
from slimgraph.groups import Structure, infer
from slimgraph.pipeline import Result, prune
from slimgraph.plan import Cut, Plan
from slimgraph.recipe import Recipe, method
from slimgraph.trace import trace

__all__ = [
    "Cut",
    "Inspection",
    "Plan",
    "Recipe",
    "Result",
    "SlimgraphError",
    "Structure",
    "infer",
    "inspect",
    "load",
    "load_manifest",
    "method",
    "prune",
    "trace",
]
