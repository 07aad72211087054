"""The kernel for few rows has the bits of the way through memory: the choice between them cannot be seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymoe.ops import fp8_decode, fp8_matmul
from skymoe.ops.fp8 import dequantize, quantize
from skymoe.ops.fp8_decode import block_of, can_decode, kernel
from skymoe.ops.fp8_matmul import fp8_linear
from skymoe.ops.invariant import invariant_linear
from skymoe.spec.quantization import Fp8Scheme

needs_kernel = pytest.mark.skipif(kernel() is None, reason="needs numba and AVX512-BF16")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cancelling(outputs: int, inputs: int, rows: int) -> tuple[Tensor, Tensor]:
    """A weight and bf16 rows whose products cancel: what is left is rounding, and shows the order of additions."""
    half = inputs // 2
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    weight[:, half:], x[:, half:] = -weight[:, :half], x[:, :half]
    return weight, x.bfloat16()


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    scheme=st.sampled_from(list(Fp8Scheme)),
    outputs=st.integers(16, 150),
    pairs=st.one_of(st.integers(1, 12), st.sampled_from([32, 33, 44, 88])),
    rows=st.integers(1, 70),
    block=st.sampled_from([(128, 128), (16, 32), (5, 96)]),
    seed=st.integers(0, 2**31),
)
def test_it_has_the_bits_of_the_decoded_weight(
    scheme: Fp8Scheme, outputs: int, pairs: int, rows: int, block: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = cancelling(outputs, 32 * pairs, rows)
    codes, scale = quantize(weight * 0.02, scheme, block)
    y = fp8_linear(x, codes, scale, scheme, block)
    assert torch.equal(y, invariant_linear(x, dequantize(codes, scale, scheme, torch.bfloat16, block)))


@needs_kernel
@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_a_rank_s_part(scheme: Fp8Scheme) -> None:
    torch.manual_seed(1)
    codes, scale = quantize(torch.randn(300, 512), scheme)
    x = torch.randn(3, 224).bfloat16()
    part = codes[70:201, 96:320].contiguous()
    assert can_decode(x, part, scheme, (128, 128), (70, 96))
    whole = dequantize(codes, scale, scheme)
    y = fp8_linear(x, part, scale, scheme, first=(70, 96))
    assert torch.equal(y, invariant_linear(x, whole[70:201, 96:320].contiguous()))


@needs_kernel
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_change_nothing(num_threads: int, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_decode, "_PER_TASK", 1000)
    torch.manual_seed(2)
    weight, x = cancelling(173, 1088, 9)
    codes, scale = quantize(weight, Fp8Scheme.BLOCK)
    wanted = invariant_linear(x, dequantize(codes, scale, Fp8Scheme.BLOCK))
    torch.set_num_threads(num_threads)
    assert torch.equal(fp8_linear(x, codes, scale, Fp8Scheme.BLOCK), wanted)


@needs_kernel
def test_every_code_and_scales_of_any_size() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F].repeat(32)[: 32 * 252].view(252, 32).view(torch.float8_e4m3fn)
    for size in (2.0**-60, 1.0, 3.0, 2.0**60):
        scale = torch.tensor(size)
        y = fp8_linear(torch.eye(32).bfloat16(), codes, scale, Fp8Scheme.TENSOR)
        assert torch.equal(y.T, dequantize(codes, scale, Fp8Scheme.TENSOR))


def test_what_it_does_not_take() -> None:
    x, codes = torch.zeros(4, 64).bfloat16(), torch.zeros(32, 64, dtype=torch.uint8).view(torch.float8_e4m3fn)
    block = (128, 128)
    assert can_decode(x, codes, Fp8Scheme.BLOCK, block, (0, 0)) == (block_of(64) is not None)
    assert not can_decode(x.float(), codes, Fp8Scheme.BLOCK, block, (0, 0))
    assert not can_decode(x, codes, Fp8Scheme.BLOCK, block, (0, 5))
    assert not can_decode(x, codes, Fp8Scheme.BLOCK, (128, 48), (0, 0))
    assert not can_decode(x, codes[:15], Fp8Scheme.BLOCK, block, (0, 0))
    assert not can_decode(x[:, :50], codes[:, :50].contiguous(), Fp8Scheme.BLOCK, block, (0, 0))
    assert not can_decode(torch.zeros(80, 64).bfloat16(), codes, Fp8Scheme.BLOCK, block, (0, 0))


@needs_kernel
def test_without_the_kernel_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    weight, x = cancelling(200, 1536, 5)
    codes, scale = quantize(weight, Fp8Scheme.CHANNEL)
    y = fp8_linear(x, codes, scale, Fp8Scheme.CHANNEL)
    monkeypatch.setattr(fp8_matmul, "can_decode", lambda *_: False)
    assert torch.equal(fp8_linear(x, codes, scale, Fp8Scheme.CHANNEL), y)


def test_a_library_that_adds_in_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(x_MI: Tensor, weight_OI: Tensor) -> Tensor:
        half = x_MI.shape[1] // 3
        parts = ((x_MI[:, some] @ weight_OI[:, some].T).float() for some in (slice(0, half), slice(half, None)))
        return sum(parts, torch.zeros(())).bfloat16()

    monkeypatch.setattr(fp8_decode, "padded_matmul", other)
    block_of.cache_clear()
    try:
        assert block_of(960) is None
        x, codes = torch.zeros(4, 960).bfloat16(), torch.zeros(32, 960, dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert not can_decode(x, codes, Fp8Scheme.TENSOR, (128, 128), (0, 0))
    finally:
        block_of.cache_clear()
