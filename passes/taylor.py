"""LLM-Pruner's first-order score (Ma et al., arXiv 2305.11627): how much the loss changes without a weight.

To first order that is |w · ∂L/∂w|, for the next-token loss L on the calibration tokens, summed over everything that
goes with a unit: its columns of the output projection and its rows of the projections that produce it.

What it costs, beside the other scores: a backward pass over all calibration tokens, about twice the time of the forward
pass; the whole model in memory at once; a gradient as large as the weights of all prunable layers; and the activations
of `batch` samples through the whole model. None of it is kept afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from slimgraph import score
from slimgraph.errors import CalibrationError, ModelError, PlanError, RecipeError
from slimgraph.evidence import Evidence
from slimgraph.groups import Site, Structure
from slimgraph.passes.base import register
from slimgraph.passes.importance import _Importance
from slimgraph.plan import Cut
from slimgraph.state import State, structure_of
from slimgraph.trace import is_static, tensor_at
from slimgraph.units import origin_units

__all__ = ["Taylor"]

_Slices = Mapping[tuple[str, int], Tensor]
"""(parameter, dimension) -> |w · ∂L/∂w| summed over all other dimensions, float64."""


@register
@dataclass(frozen=True)
class Taylor(_Importance):
    """Heads and channels by |w · ∂L/∂w|, summed over their rows and columns (LLM-Pruner, element-wise first order).

    The gradients are those of the model before the sweep, whose decisions do not change them; each round of a recipe
    needs its own.

    Attributes:
        batch: samples per backward pass. The score does not depend on it, the memory does.
    """

    batch: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise RecipeError(f"{self.name}: batch is {self.batch}; expected at least 1")

    def run(self, graph_module: fx.GraphModule, state: State) -> None:
        """Take the gradients, and record what they say."""
        if not state.batches:
            raise CalibrationError("taylor needs calibration tokens for its gradients; found none in the state")
        structure = structure_of(graph_module)
        sites = structure.require_sites()
        with state.watch("gradients"):
            slices = _slices(graph_module, sites, state, self.batch)
        for kind in self.kinds():
            state.importance[kind] = _ByGradients(structure, state, slices, state.plan.cuts)


@dataclass(frozen=True)
class _ByGradients:
    """Chooses units by the sums over their slices."""

    structure: Structure
    state: State
    slices: _Slices
    cuts: Mapping[str, Cut]

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        return score.select_top(self.scores(evidence), evidence.blocks.cpu(), keep).to(evidence.blocks.device)

    def scores(self, evidence: Evidence) -> Tensor:
        """(units,) float64, on the CPU.

        Raises:
            PlanError: the model was cut since its gradients were taken.
        """
        if self.state.plan.cuts != self.cuts:
            raise PlanError(
                "the gradients of taylor are of a model that was cut since; expected those of the model as it is: put "
                "taylor before this allocation again"
            )
        units = next(u for u in self.state.units if u.site.name == evidence.name)
        site = units.site
        parts = [(units.members, self.slices[site.parameter, site.in_dim])]
        parts += [(origin_units(self.structure, units, o), self.slices[o.parameter, o.dim]) for o in site.origins]
        found = torch.zeros(len(units.blocks), dtype=torch.float64)
        for members, values in parts:
            mine = members >= 0
            found.index_add_(0, members[mine].cpu(), values[mine.cpu()])
        return found


def _slices(graph_module: fx.GraphModule, sites: Sequence[Site], state: State, batch: int) -> _Slices:
    wanted = [(s.parameter, s.in_dim) for s in sites] + [(o.parameter, o.dim) for s in sites for o in s.origins]
    names = {name for name, _ in wanted}
    if state.weights is not None or any(tensor_at(graph_module, name).is_meta for name in names):
        raise ModelError(
            "taylor needs gradients, and for these the whole model in memory; found weights that are fetched as "
            "needed: take a score without gradients, or load the model whole"
        )
    # Leaves of our own, so that neither the model's gradients nor its requires_grad are touched.
    leaves = {name: tensor_at(graph_module, name).detach().requires_grad_() for name in names}
    _backward(graph_module, leaves, state, batch)
    return {key: _worth(leaves[key[0]], key[1]) for key in dict.fromkeys(wanted)}


def _backward(graph_module: fx.GraphModule, leaves: Mapping[str, Tensor], state: State, batch: int) -> None:
    """Put the gradient of the mean loss over the predicted tokens of all processes in the leaves."""
    frozen = {name: p.detach() for name, p in graph_module.named_parameters()} | dict(leaves)
    samples = state.batches if is_static(graph_module) else [s for b in state.batches for s in torch.split(b, batch)]
    own = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in samples)
    predicted = int(state.combine(torch.tensor([own], dtype=torch.int64)))
    if not predicted:
        raise CalibrationError("taylor needs tokens that follow others, to predict them; found samples of 1 token each")
    with torch.enable_grad(), state.progress("gradients", total=len(samples)) as tick:
        for ids in samples:
            logits = torch.func.functional_call(graph_module, frozen, (ids,))
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            (loss / predicted).backward()  # type: ignore[no-untyped-call]
            tick()
    for _, leaf in sorted(leaves.items()):  # in an order that all processes share
        leaf.grad = state.combine(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


def _worth(leaf: Tensor, dim: int) -> Tensor:
    assert leaf.grad is not None
    others = [d for d in range(leaf.ndim) if d != dim]
    # The product in the weight's dtype: in float64 it would be the largest tensor of all.
    return (leaf.detach() * leaf.grad).abs().sum(others, dtype=torch.float64).cpu()
