"""Passes: what can be put in a recipe.

Each pass is a small frozen dataclass whose fields are its recipe keys. It is a callable on a graph module and returns a
`torch.fx.passes.infra.pass_base.PassResult`, so that it runs in `torch.fx`'s own pass manager beside other passes.

Importance and recovery passes record a choice; an allocation pass turns a ratio into numbers of units; `Sweep` carries
all of it out in one go over the model. The usual order is calibration, importance, recovery, allocation, sweep,
verification.
"""

if __name__ != "slimgraph.passes":
    raise ImportError(f"the passes are imported as 'slimgraph.passes', not as {__name__!r}; install the project first")

from slimgraph.passes.allocation import CosineAllocation, UniformAllocation
from slimgraph.passes.base import Pass, pass_named, pass_names, register
from slimgraph.passes.calibration import SelfCalibration
from slimgraph.passes.elimination import Elimination
from slimgraph.passes.fluctuation import Fluctuation, FluctuationAllocation
from slimgraph.passes.harm import HarmAllocation
from slimgraph.passes.importance import FeatureSpace, Magnitude, Pearson, RandomImportance, WandaSp
from slimgraph.passes.pruning import ApplyPlan, Sweep
from slimgraph.passes.recovery import BiasOnly, LeastSquares, NoRecovery, Regression
from slimgraph.passes.taylor import Taylor
from slimgraph.passes.verification import Verify

__all__ = [
    "ApplyPlan",
    "BiasOnly",
    "CosineAllocation",
    "Elimination",
    "FeatureSpace",
    "Fluctuation",
    "FluctuationAllocation",
    "HarmAllocation",
    "LeastSquares",
    "Magnitude",
    "NoRecovery",
    "Pass",
    "Pearson",
    "RandomImportance",
    "Regression",
    "SelfCalibration",
    "Sweep",
    "Taylor",
    "UniformAllocation",
    "Verify",
    "WandaSp",
    "pass_named",
    "pass_names",
    "register",
]
