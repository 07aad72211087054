"""The distance of two tensors: against plain fp64 arithmetic, block by block, and where numbers are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skymoe.ops.distance import Distance, distance, same_bits

INF, NAN = math.inf, math.nan


def test_against_the_formulas() -> None:
    a, b = torch.randn(7, 33, dtype=torch.float64), torch.randn(7, 33, dtype=torch.float64)
    found = distance(a, b)
    assert found.max_abs == pytest.approx((a - b).abs().max().item())
    assert found.relative_max == pytest.approx(((a - b).abs().max() / a.abs().max()).item())
    assert found.relative_rms == pytest.approx(((a - b).norm() / a.norm()).item())
    assert found.cosine == pytest.approx(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())
    assert found.num_different == a.numel()


def test_blocks_add_up() -> None:
    a, b = torch.randn(11, 5).bfloat16(), torch.randn(11, 5)
    parts = sum((distance(a[i : i + 3], b[i : i + 3]) for i in range(0, 11, 3)), Distance())
    whole = distance(a, b)
    assert parts.max_abs == whole.max_abs
    assert (parts.relative_rms, parts.cosine) == pytest.approx((whole.relative_rms, whole.cosine))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1.0, NAN, INF], [1.0, NAN, INF], (0, 0.0, 0.0, 1.0)),
        ([1.0, 2.0], [1.0, NAN], (1, INF, INF, 1 / math.sqrt(5))),
        ([1.0, INF], [1.0, -INF], (1, INF, INF, 1.0)),
        ([0.0, 0.0], [0.0, -0.0], (0, 0.0, 0.0, 1.0)),
        ([0.0, 0.0], [3.0, 4.0], (2, 4.0, INF, 0.0)),
        ([3.0, 4.0], [0.0, 0.0], (2, 4.0, 1.0, 0.0)),
        ([], [], (0, 0.0, 0.0, 1.0)),
    ],
)
def test_numbers_that_are_not(left: list[float], right: list[float], expected: tuple[float, ...]) -> None:
    found = distance(torch.tensor(left), torch.tensor(right))
    assert (found.num_different, found.max_abs, found.relative_rms, found.cosine) == pytest.approx(expected)


@given(st.lists(st.floats(width=32), min_size=1, max_size=9))
def test_a_tensor_is_no_distance_from_itself(values: list[float]) -> None:
    tensor = torch.tensor(values)
    found = distance(tensor, tensor.clone())
    assert (found.num_different, found.max_abs, found.relative_rms) == (0, 0.0, 0.0)
    assert same_bits(tensor, tensor.clone())


def test_bits() -> None:
    zero, number = torch.zeros(3), torch.tensor([NAN, 1.0])
    assert not same_bits(zero, -zero)
    assert same_bits(number, number.clone())
    assert not same_bits(zero, zero.half())
    assert not same_bits(zero, zero[:2])
    assert same_bits(torch.empty(0, 3), torch.empty(0, 3))
    assert same_bits(torch.tensor(1.5), torch.tensor(1.5))
    fp8 = torch.ones(3).to(torch.float8_e4m3fn)
    assert same_bits(fp8, fp8.clone()) and not same_bits(fp8, (-fp8.float()).to(torch.float8_e4m3fn))
