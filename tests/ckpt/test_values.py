"""Decoding without torch, against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skymoe.base.dtype import DType
from skymoe.ckpt.values import count_different, decode, max_abs_difference
from skymoe.weights.buffers import bytes_of, torch_dtype


@pytest.mark.parametrize("dtype", list(DType))
def test_every_bit_pattern_decodes_as_torch_does(dtype: DType) -> None:
    if dtype is DType.BOOL:
        tensor = torch.tensor([True, False])
    elif dtype.itemsize == 1:
        tensor = torch.arange(256, dtype=torch.uint8).view(torch_dtype(dtype))
    elif dtype.itemsize == 2:
        tensor = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch_dtype(dtype))
    else:
        generator = torch.Generator().manual_seed(0)
        raw = torch.randint(0, 256, (8000,), generator=generator, dtype=torch.uint8)
        tensor = raw.view(torch_dtype(dtype))
    np.testing.assert_array_equal(decode(bytes_of(tensor), dtype), tensor.double().numpy())


def test_distance() -> None:
    def distance(left: list[float], right: list[float]) -> float:
        return max_abs_difference(*(bytes_of(torch.tensor(side)) for side in (left, right)), DType.FLOAT32)

    assert distance([1.0, 2.0, -3.0], [1.0, 2.5, -3.0]) == 0.5
    assert distance([math.nan, math.inf], [math.nan, math.inf]) == 0
    assert distance([math.nan], [1.0]) == math.inf
    assert distance([math.inf], [-math.inf]) == math.inf
    assert distance([0.0], [-0.0]) == 0
    assert distance([], []) == 0


def test_bits_are_counted_per_element() -> None:
    left, right = torch.tensor([0.0, 1.0, math.nan]), torch.tensor([-0.0, 1.0, math.nan])
    assert count_different(bytes_of(left), bytes_of(right), DType.FLOAT32) == 1
