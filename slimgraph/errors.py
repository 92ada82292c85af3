"""Errors of Slimgraph.

Every message says what was asked, where, what was found, what was expected, and what to do about it. The command line
prints the message as one line and exits with a non-zero code; a traceback means a defect of ours.
"""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "EvaluationError",
    "GraphError",
    "ModelError",
    "NumericsError",
    "PlanError",
    "RecipeError",
    "SlimgraphError",
]


class SlimgraphError(Exception):
    """Base of all errors raised on purpose: bad input or an unsupported request, never a defect."""


class ModelError(SlimgraphError):
    """The model cannot be found, loaded, traced, or is not a causal language model."""


class GraphError(SlimgraphError):
    """The traced graph holds something that the analysis or the surgery does not understand."""


class PlanError(SlimgraphError):
    """A plan asks for something impossible: an unknown or frozen group, units out of range, an unreachable ratio."""


class CalibrationError(SlimgraphError):
    """Calibration or evaluation text is missing, empty or too short."""


class NumericsError(SlimgraphError):
    """NaN or infinity in weights, activations or statistics, or a solve that is too badly conditioned."""


class CheckpointError(SlimgraphError):
    """A checkpoint cannot be read or written."""


class RecipeError(SlimgraphError):
    """A recipe names an unknown pass or gives a pass a wrong field."""


class EvaluationError(SlimgraphError):
    """A task is unknown or its data cannot be had, or an evaluation does not fit into memory."""
