"""A rule from outside the package: without it the operator freezes what flows through, with it the axis can be cut."""

import pytest
import torch
from torch import nn

from slimgraph.errors import PlanError
from slimgraph.groups import infer
from slimgraph.masked import masked_logits
from slimgraph.plan import Cut, Plan, resolve
from slimgraph.rules import registry, rule
from slimgraph.surgery import prune_graph
from slimgraph.trace import trace


@torch.library.custom_op("slimgraph_tests::soft_gate", mutates_args=())
def soft_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(gate)


@soft_gate.register_fake
def _(x, gate):
    return torch.empty_like(x)


class Gated(nn.Module):
    """The smallest decoder-like model with the operator between two projections."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.up, self.gate, self.down = nn.Linear(12, 18), nn.Linear(12, 18), nn.Linear(18, 12)
        self.head = nn.Linear(12, 23)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(x + self.down(torch.ops.slimgraph_tests.soft_gate(self.up(x), self.gate(x))))


@pytest.fixture
def graph_module():
    torch.manual_seed(0)
    return trace(Gated().double())


@pytest.fixture
def registered():
    @rule("slimgraph_tests.soft_gate", golden="(* n), (* n) -> (* n)")
    def _(cx, x, gate):
        return cx.broadcast(x, gate)

    yield
    del registry._RULES["slimgraph_tests.soft_gate"]


PLAN = Plan({"down.weight[1]": Cut(18, (tuple(range(0, 18, 2)),))})


def test_without_a_rule_the_axes_are_frozen_and_it_is_said_where_and_why(graph_module):
    structure = infer(graph_module)
    (refusal,) = structure.refusals
    assert refusal.operator == "slimgraph_tests.soft_gate.default"
    frozen = [g for g in structure.groups.values() if g.units == 18]
    assert frozen
    assert all("has no axis rule" in g.frozen for g in frozen)
    name = next(g.name for g in frozen if "down.weight" in g.name)
    with pytest.raises(PlanError, match=r"frozen and cannot be cut.*soft_gate.*has no axis rule"):
        resolve(structure, Plan({name: Cut(18, ((0, 1),))}))


def test_with_a_rule_the_axis_is_a_group_and_can_be_cut(graph_module, registered):
    structure = infer(graph_module)
    assert structure.refusals == []
    group = structure.groups["down.weight[1]"]
    assert {o.source for o in group.occurrences} == {"up.weight", "up.bias", "gate.weight", "gate.bias", "down.weight"}
    resolved = resolve(structure, PLAN)
    ids = torch.arange(10).view(2, 5)
    torch.testing.assert_close(prune_graph(resolved)(ids), masked_logits(resolved, ids), rtol=0, atol=1e-12)
