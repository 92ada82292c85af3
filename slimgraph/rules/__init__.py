"""One axis rule per ATen operator, by family. Importing the package registers all of them."""

from slimgraph.rules import contraction, creation, indexing, pointwise, reduction, shape
from slimgraph.rules.registry import (
    Choice,
    Context,
    Contraction,
    Dims,
    NotCoveredError,
    Resizing,
    Rule,
    find_rule,
    operator_name,
    rule,
    rules,
)

__all__ = [
    "Choice",
    "Context",
    "Contraction",
    "Dims",
    "NotCoveredError",
    "Resizing",
    "Rule",
    "contraction",
    "creation",
    "find_rule",
    "indexing",
    "operator_name",
    "pointwise",
    "reduction",
    "rule",
    "rules",
    "shape",
]
