"""Explanations: every step is a node of the graph, and leads from the one slice to the other."""

import pytest

from slimgraph.errors import PlanError
from slimgraph.explain import explain
from slimgraph.groups import infer
from slimgraph.trace import trace


@pytest.fixture(scope="module")
def structure():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101,
        hidden_size=60,
        intermediate_size=76,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=14,
    )
    return infer(trace(LlamaForCausalLM(config)))


def test_feed_forward_channels_are_coupled_by_the_product_of_gate_and_up(structure):
    (explanation,) = explain(structure, "model.layers.1.mlp.down_proj.weight[1]")
    found = {c.occurrence.source: [s.operator for s in c.steps] for c in explanation.couplings}
    assert set(found) == {"model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert found["model.layers.1.mlp.gate_proj.weight"] == ["aten.linear.default", "aten.mul.Tensor"]
    assert found["model.layers.1.mlp.up_proj.weight"] == ["aten.linear.default"]


def test_heads_are_coupled_by_attention(structure):
    explanations = explain(structure, "model.layers.0.self_attn.o_proj.weight[1]")
    assert [e.group.units for e in explanations] == [3, 2, 14]
    steps = {s.operator for c in explanations[0].couplings for s in c.steps}
    assert "aten.scaled_dot_product_attention.default" in steps


def test_a_factor_can_be_picked(structure):
    (explanation,) = explain(structure, "model.layers.0.self_attn.o_proj.weight[1].1")
    assert explanation.group.units == 2


def test_every_coupling_of_the_residual_stream_has_a_way(structure):
    (explanation,) = explain(structure, "model.embed_tokens.weight[1]")
    assert explanation.group.kind == "residual"
    assert len(explanation.couplings) == len(explanation.group.occurrences) - 1
    assert all(c.steps for c in explanation.couplings)


def test_a_frozen_axis_says_why_and_where(structure):
    (vocabulary,) = explain(structure, "model.embed_tokens.weight[0]")
    assert "looked up by token" in vocabulary.group.frozen
    assert "frozen" in str(vocabulary)
    (output,) = explain(structure, "lm_head.weight[0]")
    assert output.group.frozen == "the model's output"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("model.embed_tokens.weight", "names no dimension"),
        ("nothing.weight[0]", "no parameter is called 'nothing.weight'"),
        ("model.norm.weight[1]", "has 1 dimensions"),
    ],
)
def test_a_wrong_question_is_an_error(structure, what, message):
    with pytest.raises(PlanError, match=message):
        explain(structure, what)
