"""A linear layer on FP8 codes has the bits of that on the decoded weight, whatever the scheme, the part, the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymoe.ops import fp8_matmul
from skymoe.ops.fp8 import decode_table, dequantize, quantize
from skymoe.ops.fp8_matmul import checked_codes, fp8_linear
from skymoe.ops.invariant import invariant_linear
from skymoe.spec.quantization import Fp8Scheme

DTYPES = [torch.float32, torch.bfloat16]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@settings(deadline=None, max_examples=150)
@given(
    scheme=st.sampled_from(list(Fp8Scheme)),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([(128, 128), (16, 16), (8, 24), (5, 3)]),
    outputs=st.integers(1, 200),
    inputs=st.integers(1, 200),
    rows=st.integers(0, 70),
    strip=st.sampled_from([1, 700, 1 << 17]),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_layer_on_the_decoded_weight(
    scheme: Fp8Scheme, dtype: torch.dtype, block: tuple[int, int], outputs: int, inputs: int, rows: int, strip: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    codes, scale = quantize(torch.randn(outputs, inputs) * 0.02, scheme, block)
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_matmul, "_STRIP", strip)
        y = fp8_linear(x, codes, scale, scheme, block, bias)
    wanted = invariant_linear(x, dequantize(codes, scale, scheme, dtype, block), bias)
    assert torch.equal(bits(y), bits(wanted))


@settings(deadline=None, max_examples=80)
@given(
    scheme=st.sampled_from(list(Fp8Scheme)),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([(128, 128), (16, 16), (8, 24)]),
    top=st.integers(0, 99),
    left=st.integers(0, 99),
    height=st.integers(1, 100),
    width=st.integers(1, 100),
    seed=st.integers(0, 2**31),
)
def test_a_part_of_a_weight(
    scheme: Fp8Scheme, dtype: torch.dtype, block: tuple[int, int], top: int, left: int, height: int, width: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    codes, scale = quantize(torch.randn(200, 200), scheme, block)
    rows, columns = slice(top, top + height), slice(left, left + width)
    x, part = torch.randn(3, width).to(dtype), codes[rows, columns].contiguous()
    y = fp8_linear(x, part, scale, scheme, block, first=(top, left))
    whole = dequantize(codes, scale, scheme, dtype, block)
    assert torch.equal(bits(y), bits(invariant_linear(x, whole[rows, columns].contiguous())))
    if scheme is Fp8Scheme.BLOCK:  # with the scales of its own blocks only
        near = scale[top // block[0] :, left // block[1] :]
        cut = fp8_linear(x, part, near, scheme, block, first=(top % block[0], left % block[1]))
        assert torch.equal(bits(y), bits(cut))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_counts_as_the_format_says(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode_table()
    good = ~values.isnan()
    y = fp8_linear(
        torch.ones(1, 1, dtype=dtype), codes[good].view(torch.float8_e4m3fn)[:, None], torch.ones(()), Fp8Scheme.TENSOR
    )
    assert torch.equal(y[0], values[good].to(dtype))


@settings(deadline=None, max_examples=60)
@given(
    scheme=st.sampled_from(list(Fp8Scheme)), dtype=st.sampled_from(DTYPES), outputs=st.integers(1, 150),
    inputs=st.sampled_from([1, 31, 64, 129, 1024, 1153, 2816]), rows=st.integers(1, 60), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_row_depends_on_itself_alone(
    scheme: Fp8Scheme, dtype: torch.dtype, outputs: int, inputs: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    codes, scale = quantize(torch.randn(outputs, inputs), scheme)
    x = torch.randn(rows, inputs).to(dtype)
    together = fp8_linear(x, codes, scale, scheme)
    for row in torch.randperm(rows)[:3].tolist():
        assert torch.equal(bits(fp8_linear(x[row : row + 1], codes, scale, scheme)), bits(together[row : row + 1]))


def test_large_and_tiny_scales() -> None:
    codes, _ = quantize(torch.randn(20, 30), Fp8Scheme.TENSOR)
    x = torch.eye(30)
    for value in (2.0**100, 2.0**-126, 1e-30):
        scale = torch.tensor(value)
        wanted = dequantize(codes, scale, Fp8Scheme.TENSOR, torch.float32)
        assert torch.equal(fp8_linear(x, codes, scale, Fp8Scheme.TENSOR).T, wanted)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_found_when_asked_for(code: int) -> None:
    codes = torch.zeros(700, 700, dtype=torch.uint8)
    assert checked_codes(codes.view(torch.float8_e4m3fn)) is not None
    codes[650, 3] = code
    with pytest.raises(ValueError, match="NaN"):
        checked_codes(codes.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
def test_a_rank_without_rows_or_columns(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    codes = torch.empty(shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for rows in (0, 3):
        y = fp8_linear(torch.randn(rows, shape[1]).to(dtype), codes, torch.ones(()), Fp8Scheme.TENSOR)
        assert y.dtype == dtype and torch.equal(y, torch.zeros(rows, shape[0], dtype=dtype))
        y = invariant_linear(torch.randn(rows, shape[1]).to(dtype), torch.empty(shape, dtype=dtype))
        assert torch.equal(y, torch.zeros(rows, shape[0], dtype=dtype))
