"""The kernel of `ops/fp8_decode.py`, compiled by numba when it is first called. Importing this needs numba.

Shapes: M rows (a multiple of 4), I inputs (of 32), O outputs (at least 16).
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding
from numba import njit

from skymoe.ops.fp8_vectors import COLUMNS, LANES, ROWS, add_pairs, decode_pairs, load_float, store_float

_FP16_TO_E4M3 = np.float32(256.0)


def has_instructions() -> bool:
    """Whether this processor multiplies pairs of bf16 (VDPBF16PS)."""
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


@njit(nogil=True)
def multiply(
    begin, end, codes, num_outputs, num_inputs, scales, scale_row, scale_column, height, width, top, left, x, num_rows,
    block, y,
):  # fmt: skip
    """Groups of 16 outputs begin .. end - 1 of y_MO (fp32) = x_MI (bf16) times (codes_OI * scale)^T.

    `codes`, `scales`, `x` and `y` are addresses of contiguous arrays. The scale of row o and column i is at
    ((top + o) // height, (left + i) // width) of `scales`, whose strides are in numbers. The last group may begin
    earlier, so as to be whole.
    """
    memory = np.empty(num_inputs * 32 + 64 * (2 * ROWS + 2) + 64, np.int8)
    factors = (memory.ctypes.data + 63) // 64 * 64
    sums, totals, pairs = factors + 64, factors + 64 * (1 + ROWS), factors + 64 * (1 + 2 * ROWS)
    places = np.empty(LANES, np.int64)  # where the scales of the rows begin
    for group in range(begin, end):
        row = min(group * LANES, num_outputs - LANES)
        for lane in range(LANES):
            places[lane] = scales + 4 * ((top + row + lane) // height * scale_row)
        column = 0
        while column < num_inputs:
            at = (left + column) // width
            stop = min(num_inputs, (at + 1) * width - left)
            for lane in range(LANES):
                factor = load_float(places[lane] + 4 * at * scale_column) * _FP16_TO_E4M3
                store_float(factors + 4 * lane, factor)
            count = (stop - column) // COLUMNS
            decode_pairs(codes + row * num_inputs + column, num_inputs, factors, pairs + column * 32, count)
            column = stop
        for first in range(0, num_rows, ROWS):
            for start in range(0, num_inputs, block):
                count = min(block, num_inputs - start) // 2
                for lane in range(LANES * ROWS):
                    store_float(sums + 4 * lane, np.float32(0))
                at = x + 2 * (first * num_inputs + start)
                add_pairs(sums, pairs + start * 32, at, 2 * num_inputs, count)
                for lane in range(LANES * ROWS):
                    found = load_float(sums + 4 * lane)
                    before = load_float(totals + 4 * lane) if start else np.float32(0)
                    store_float(totals + 4 * lane, before + found if start else found)
            for lane in range(LANES * ROWS):
                place = (first + lane // LANES) * num_outputs + row + lane % LANES
                store_float(y + 4 * place, load_float(totals + 4 * lane))
