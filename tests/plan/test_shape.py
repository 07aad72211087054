"""Shapes on paper count what spec/flops.py counts."""

import pytest

from skymoe.plan.cost.flops import core_flops, flops
from skymoe.plan.shape import AttentionShape, FfnShape, shape_of
from skymoe.spec.flops import count_parameters, flops_per_token
from skymoe.spec.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("convention", ["causal", "full"])
def test_flops_are_those_of_the_spec(name, convention):
    spec = PRESETS[name]
    counted = flops(shape_of(spec), 5000, causal=convention == "causal")
    expected = flops_per_token(spec, 5000, attention=convention)
    assert counted.halves[::2] == pytest.approx(expected.attention, rel=1e-12)
    assert counted.halves[1::2] == pytest.approx(expected.ffn, rel=1e-12)
    assert counted.total == pytest.approx(expected.total, rel=1e-12)
    scores = sum(core_flops(shape_of(spec), layer, 5000) for layer in range(spec.num_layers))
    if convention == "causal":
        assert scores == pytest.approx(expected.attention_scores, rel=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_spec(name):
    spec = PRESETS[name]
    assert shape_of(spec).parameters == pytest.approx(count_parameters(spec).total, rel=2e-3)  # norms, biases


def test_equal_layers_are_one_object():
    layers = shape_of(PRESETS["skywork-moe"]).layers
    assert len({id(layer) for layer in layers}) == 1


def test_latent_attention_has_the_parameters_of_deepseek_v3():
    """671 B in all, 37 B of them active (DeepSeek-V3 report, section 4.2): its attention is 187.1 M per layer."""
    attention = AttentionShape(
        num_heads=128, num_kv_heads=128, head_dim=192, value_dim=128, q_rank=1536, kv_rank=512, rope_dim=64
    )
    experts = FfnShape(inner=2048, num_experts=256, top_k=8, shared_inner=2048)
    dense = FfnShape(inner=18432)
    per_layer = attention.parameters(7168)
    total = 61 * per_layer + 3 * dense.other_parameters(7168) + 2 * 129280 * 7168
    total += 58 * (experts.expert_parameters(7168) + experts.other_parameters(7168))
    assert per_layer == 187_105_280
    assert total == pytest.approx(671e9, rel=0.001)
