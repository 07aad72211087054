"""Comparing the bytes of two tensors with numpy alone: how many elements differ, and by how much at most."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from skymoe.base.dtype import DType

_NUMPY: dict[DType, Any] = {
    DType.FLOAT32: np.float32, DType.FLOAT16: np.float16, DType.FLOAT64: np.float64, DType.INT8: np.int8,
    DType.UINT8: np.uint8, DType.INT16: np.int16, DType.INT32: np.int32, DType.INT64: np.int64, DType.BOOL: np.uint8,
}  # fmt: skip
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def count_different(left: memoryview, right: memoryview, dtype: DType) -> int:
    """How many elements differ in their bits."""
    word = _WORDS[dtype.itemsize]
    return int(np.count_nonzero(np.frombuffer(left, word) != np.frombuffer(right, word)))


def max_abs_difference(left: memoryview, right: memoryview, dtype: DType) -> float:
    """Largest |left - right|; two NaN are equal, one NaN is infinitely far from any number."""
    if not len(left):
        return 0.0
    a, b = decode(left, dtype), decode(right, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a - b)
    distance[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    return float(np.nan_to_num(distance, nan=np.inf, posinf=np.inf).max())


def decode(raw: memoryview, dtype: DType) -> NDArray[np.float64]:
    """The elements as fp64 (integers above 2**53 are rounded)."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return _decode(raw, dtype)


def _decode(raw: memoryview, dtype: DType) -> NDArray[np.float64]:
    if dtype is DType.BFLOAT16:  # the upper half of an fp32
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype is DType.FLOAT8_E5M2:  # the upper half of an fp16
        return (np.frombuffer(raw, np.uint8).astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    if dtype is DType.FLOAT8_E4M3:
        return _e4m3_table()[np.frombuffer(raw, np.uint8)]
    return np.frombuffer(raw, _NUMPY[dtype]).astype(np.float64)


def _e4m3_table() -> NDArray[np.float64]:
    """All 256 values: sign, 4 exponent bits (bias 7), 3 mantissa bits; no infinity, NaN is all ones."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[(bits & 127) == 127] = np.nan
    return np.where(bits > 127, -values, values)
