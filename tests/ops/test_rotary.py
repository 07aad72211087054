from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from skymoe.ops.rotary import apply_rotary, inverse_frequencies, rotary_tables
from skymoe.spec.model import RopeScaling, RopeSpec

MAX_POSITION = 256


def oracle(parameters: dict[str, Any], head_dim: int, length: int | None = None) -> tuple[torch.Tensor, float]:
    """What transformers computes for a Llama of this head width."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=3 * head_dim,
        num_attention_heads=3,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )
    if parameters["rope_type"] == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return rotary.inv_freq, rotary.attention_scaling
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
CASES: list[tuple[dict[str, Any], RopeSpec]] = [
    ({"rope_type": "default"}, RopeSpec()),
    ({"rope_type": "default", "rope_theta": 5e5}, RopeSpec(theta=5e5)),
    ({"rope_type": "linear", "factor": 3.0}, RopeSpec(scaling=RopeScaling.LINEAR, factor=3.0)),
    (
        {"rope_type": "llama3", **LLAMA3},
        RopeSpec(scaling=RopeScaling.LLAMA3, factor=8.0, original_max_position=64),
    ),
    (
        {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 0.7, "high_freq_factor": 9.0, "rope_theta": 700.0},
        RopeSpec(
            theta=700.0,
            scaling=RopeScaling.LLAMA3,
            factor=8.0,
            original_max_position=64,
            low_freq_factor=0.7,
            high_freq_factor=9.0,
        ),
    ),
    ({"rope_type": "yarn", **YARN}, RopeSpec(scaling=RopeScaling.YARN, factor=4.0, original_max_position=64)),
    (
        {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        RopeSpec(
            scaling=RopeScaling.YARN,
            factor=4.0,
            original_max_position=64,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    (
        {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.3},
        RopeSpec(scaling=RopeScaling.YARN, factor=4.0, original_max_position=64, mscale=0.707, mscale_all_dim=1.3),
    ),
    (
        {"rope_type": "yarn", **YARN, "mscale": 0.707},
        RopeSpec(scaling=RopeScaling.YARN, factor=4.0, original_max_position=64, mscale=0.707),
    ),
    (
        {"rope_type": "yarn", **YARN, "attention_factor": 0.9},
        RopeSpec(scaling=RopeScaling.YARN, factor=4.0, original_max_position=64, attention_factor=0.9),
    ),
    (
        {"rope_type": "yarn", **YARN, "original_max_position_embeddings": 4},
        RopeSpec(scaling=RopeScaling.YARN, factor=4.0, original_max_position=4),
    ),
]


@pytest.mark.parametrize(("parameters", "rope"), CASES, ids=lambda value: getattr(value, "scaling", ""))
@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any], rope: RopeSpec, head_dim: int) -> None:
    expected, factor = oracle(parameters, head_dim)
    ours, our_factor = inverse_frequencies(rope, head_dim, MAX_POSITION)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("length", [1, MAX_POSITION, MAX_POSITION + 1, 1000])
def test_dynamic_stretches_beyond_the_context_only(length: int) -> None:
    expected, _ = oracle({"rope_type": "dynamic", "factor": 2.0}, 64, length)
    rope = RopeSpec(scaling=RopeScaling.DYNAMIC, factor=2.0)
    ours, factor = inverse_frequencies(rope, 64, MAX_POSITION, length)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)
    assert factor == 1.0
    plain, _ = inverse_frequencies(RopeSpec(), 64, MAX_POSITION)
    assert ours.equal(plain) == (length <= MAX_POSITION)


def test_rotation_is_that_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    frequencies, factor = inverse_frequencies(CASES[5][1], 10, MAX_POSITION)
    positions = torch.tensor([[0, 1, 2, 3], [7, 0, 255, 1]])
    cos, sin = rotary_tables(frequencies, factor, positions)
    angles = positions[..., None].float() * frequencies
    table = torch.cat((angles, angles), -1)
    q, k = torch.randn(2, 6, 4, 10), torch.randn(2, 2, 4, 10)
    expected = modeling.apply_rotary_pos_emb(q, k, table.cos() * factor, table.sin() * factor)
    torch.testing.assert_close((apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)), expected)


def test_rotation_by_hand() -> None:
    """A quarter turn of the pair (c, c + C/2) takes (1, 0) to (0, 1)."""
    cos, sin = rotary_tables(torch.tensor([math.pi / 2]), 1.0, torch.tensor([[1]]))
    torch.testing.assert_close(apply_rotary(torch.tensor([[[[1.0, 0.0]]]]), cos, sin), torch.tensor([[[[0.0, 1.0]]]]))


def test_scores_depend_on_distance_alone() -> None:
    frequencies, _ = inverse_frequencies(RopeSpec(), 8, MAX_POSITION)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(query: int, key: int) -> torch.Tensor:
        turned = [
            apply_rotary(x, *rotary_tables(frequencies, 1.0, torch.tensor([[p]]))) for x, p in ((q, query), (k, key))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-5, atol=1e-6)


def test_the_input_keeps_its_dtype_and_has_a_gradient() -> None:
    frequencies, _ = inverse_frequencies(RopeSpec(), 6, MAX_POSITION)
    cos, sin = rotary_tables(frequencies, 1.0, torch.arange(5)[None])
    assert cos.dtype is torch.float32
    assert apply_rotary(torch.randn(2, 3, 5, 6).bfloat16(), cos, sin).dtype is torch.bfloat16
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x)
    before = x.detach().clone()
    apply_rotary(x, cos, sin)
    assert x.detach().equal(before)
