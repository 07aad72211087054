"""Counts against published totals, and FLOPs against the paper's own throughput figure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skymoe.base.dtype import DType
from skymoe.base.errors import ConfigError
from skymoe.spec.flops import (
    AttentionCount,
    count_parameters,
    flops_per_token,
    kv_bytes_per_token,
    mean_keys,
    mfu,
    parameter_bytes,
)
from skymoe.spec.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("olmoe-1b-7b", 6_919_161_856),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, total):
    assert count_parameters(PRESETS[name]).total == total


def test_skywork_moe_counts_as_in_the_report():
    count = count_parameters(PRESETS["skywork-moe"])
    attention, expert = 4 * 4608 * 4608, 3 * 4608 * 12288
    assert count.attention == 52 * attention
    assert count.experts == 52 * 16 * expert
    norms_and_router = (2 * 52 + 1) * 4608 + 52 * 16 * 4608
    assert count.total == 52 * (attention + 16 * expert) + norms_and_router + 2 * 65536 * 4608 == 146_356_167_168
    assert count.active == count.total - 52 * 14 * expert == 22_691_308_032
    assert count.active_without_embedding == count.active - 65536 * 4608
    assert round(count.total / 1e9, 2) == 146.36
    assert round(count.active / 1e9, 2) == 22.69
    assert parameter_bytes(PRESETS["skywork-moe"], DType.FLOAT8_E4M3) == count.total
    assert kv_bytes_per_token(PRESETS["skywork-moe"], DType.BFLOAT16) == 958_464


def test_690_tokens_per_second_on_an_a800_is_not_38_percent():
    """690 tokens/s/GPU of 312 TFLOP/s: 32.3 % (causal) or 34.9 % (full attention), not the 38 % the paper states."""
    spec = PRESETS["skywork-moe"]
    causal = flops_per_token(spec, 8192, attention="causal", backward=True)
    full = flops_per_token(spec, 8192, attention="full", backward=True)
    assert 100 * mfu(690, causal, 312e12) == pytest.approx(32.3, abs=0.05)
    assert 100 * mfu(690, full, 312e12) == pytest.approx(34.9, abs=0.05)


def test_forward_flops_are_two_per_multiplied_parameter_plus_attention():
    spec = replace(PRESETS["mixtral-8x7b"], num_layers=3)
    count = count_parameters(spec)
    flops = flops_per_token(spec, 100, attention="full")
    assert flops.total == 2 * (count.active_without_embedding - count.norms) + 3 * 4 * 4096 * 100
    assert flops.total == pytest.approx(sum(flops.layers) + flops.head)
    assert flops_per_token(spec, 100, attention="full", backward=True).total == 3 * flops.total
    parts = flops.attention_projections + flops.attention_scores + flops.dense_ffn + flops.experts
    assert flops.total == pytest.approx(parts + flops.shared + flops.router + flops.head)


def test_mixed_layers_are_priced_separately():
    spec = replace(PRESETS["mixtral-8x7b"], num_layers=3, moe_layers=(1,))
    dense, moe, also_dense = flops_per_token(spec, 64).layers
    assert dense == also_dense
    assert moe - dense == 6 * 4096 * 14336 + 2 * 4096 * 8
    assert count_parameters(spec).dense_ffn == 2 * 3 * 4096 * 14336


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 99), (5, 1)])
def test_mean_keys_is_the_average_over_positions(length, window):
    seen = [min(position + 1, window or length) for position in range(length)]
    assert mean_keys(length, window, AttentionCount.CAUSAL) == pytest.approx(sum(seen) / length)
    assert mean_keys(length, window, AttentionCount.FULL) == min(length, window or length)


def test_bad_arguments_are_told():
    with pytest.raises(ConfigError, match="sequence_length"):
        flops_per_token(PRESETS["demo-dense"], 0)
    with pytest.raises(ConfigError, match=r"no preset 'skywork'[\s\S]*skywork-moe"):
        preset("skywork")
