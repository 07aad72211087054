from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymoe.ops import fp8
from skymoe.ops.fp8 import decode_e4m3, decode_table, dequantize, encode_e4m3, quantize, rounding_error
from skymoe.spec.quantization import Fp8Scheme, scale_shape

ALL = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
NUMBERS = ALL.view(torch.uint8)[~torch.isnan(ALL.float())].view(torch.float8_e4m3fn)  # all but 0x7F and 0xFF


def bits(x: Tensor) -> list[int]:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]).tolist()


def test_the_table_is_the_format() -> None:
    assert torch.equal(decode_table().nan_to_num(999), ALL.float().nan_to_num(999))
    assert torch.isnan(decode_table()).nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert decode_table().nan_to_num(0).max() == 448
    assert decode_table()[0x80].signbit() and not decode_table()[0].signbit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_decodes_as_torch_casts(dtype: torch.dtype) -> None:
    assert bits(decode_e4m3(NUMBERS, dtype)) == bits(NUMBERS.to(dtype))
    table = decode_table()
    assert bits(decode_e4m3(NUMBERS, dtype)) == bits(table[~torch.isnan(table)].to(dtype))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused(code: int) -> None:
    codes = torch.zeros(3, 200, dtype=torch.uint8)
    codes[2, 130] = code
    with pytest.raises(ValueError, match="NaN"):
        decode_e4m3(codes.view(torch.float8_e4m3fn))


def nearest_even(x: float) -> int:
    """The specification: the code whose value is nearest; of two, the even one. By search."""
    table = [float(v) for v in decode_table()[:0x7F]]
    a = min(abs(x), 448.0)
    code = min(range(0x7F), key=lambda c: (abs(table[c] - a), c & 1))
    return code | (0x80 if torch.tensor(x).signbit() else 0)


def test_rounding_to_nearest_even_by_search() -> None:
    table = decode_table()[:0x7F]
    ties = (table[1:] + table[:-1]) / 2
    above, below = (torch.nextafter(ties, torch.tensor(limit)) for limit in (1e9, -1e9))
    beyond = torch.tensor([448.0, 449.0, 464.0, 465.0, 480.0, 1e30, float("inf"), 0.0, 1e-40, 2**-10, 2.1**-10])
    x = torch.cat([table, ties, above, below, beyond])
    x = torch.cat([x, -x])
    assert bits(encode_e4m3(x)) == [nearest_even(value) for value in x.tolist()]


def test_encoding_is_torchs_saturated_cast() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[~torch.isnan(x)]  # all bf16 numbers, both zeros and infinities, subnormals
    for y in (x, torch.nextafter(x, torch.tensor(1e38)), torch.nextafter(x, torch.tensor(-1e38))):
        assert torch.equal(
            encode_e4m3(y).view(torch.uint8), y.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        )


def test_encode_and_decode_keep_shapes_and_give_codes_back() -> None:
    assert bits(encode_e4m3(decode_e4m3(NUMBERS))) == bits(NUMBERS)
    for shape in [(), (0,), (1,), (3, 5, 7), (2, 0, 4)]:
        codes = encode_e4m3(torch.ones(shape))
        assert codes.shape == shape and codes.dtype == torch.float8_e4m3fn
        assert torch.equal(decode_e4m3(codes), torch.ones(shape))
    with pytest.raises(ValueError, match="NaN"):
        encode_e4m3(torch.tensor([1.0, float("nan")]))


def reference(weight: Tensor, scheme: Fp8Scheme, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Group by group with torch's own cast."""
    rows, columns = weight.shape
    height, width = {Fp8Scheme.BLOCK: block, Fp8Scheme.CHANNEL: (1, columns), Fp8Scheme.TENSOR: (rows, columns)}[scheme]
    codes, scales = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), []
    for top, left in itertools.product(range(0, rows, height), range(0, columns, width)):
        part = weight[top : top + height, left : left + width].float()
        scale = part.abs().max() / 448 if part.any() else torch.tensor(1.0)
        scales.append(scale)
        codes[top : top + height, left : left + width] = (part / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, torch.stack(scales).view(scale_shape(scheme, weight.shape, block))


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
@pytest.mark.parametrize("shape", [(128, 256), (129, 257), (1, 1), (300, 70), (5, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_is_the_reference(scheme: Fp8Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    weight = (torch.randn(shape) * 10.0 ** torch.randint(-3, 2, (shape[0], 1))).to(dtype)
    codes, scale = quantize(weight, scheme)
    expected_codes, expected_scale = reference(weight, scheme, (128, 128))
    assert torch.equal(scale, expected_scale) and scale.dtype == torch.float32
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


@pytest.mark.parametrize("chunk", [1, 1000, 2**18])
@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, chunk: int, scheme: Fp8Scheme) -> None:
    torch.manual_seed(4)
    weight, block = torch.randn(77, 45), (16, 32)
    expected_codes, expected_scale = reference(weight, scheme, block)
    monkeypatch.setattr(fp8, "_CHUNK", chunk)
    codes, scale = quantize(weight, scheme, block)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(dequantize(codes, scale, scheme, torch.float32, block), product(codes, scale, scheme, block))


def product(codes: Tensor, scale: Tensor, scheme: Fp8Scheme, block: tuple[int, int]) -> Tensor:
    if scheme is Fp8Scheme.BLOCK:
        scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: codes.shape[0], : codes.shape[1]]
    return codes.float() * scale


@given(
    top=st.integers(0, 40), height=st.integers(0, 37), left=st.integers(0, 30), width=st.integers(0, 15),
    scheme=st.sampled_from(list(Fp8Scheme)),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_part_is_a_part_of_the_whole(top: int, height: int, left: int, width: int, scheme: Fp8Scheme) -> None:
    generator = torch.Generator().manual_seed(5)
    codes, scale = quantize(torch.randn(77, 45, generator=generator), scheme, (16, 8))
    whole = dequantize(codes, scale, scheme, torch.float32, (16, 8))
    part = codes[top : top + height, left : left + width]
    assert torch.equal(
        dequantize(part, scale, scheme, torch.float32, (16, 8), first=(top, left)),
        whole[top : top + height, left : left + width],
    )


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_zeros_tiny_and_huge_weights(scheme: Fp8Scheme) -> None:
    zeros = torch.zeros(200, 130)
    codes, scale = quantize(zeros, scheme)
    assert not codes.view(torch.uint8).any() and torch.equal(scale, torch.ones_like(scale))
    assert rounding_error(zeros, codes, scale, scheme) == (0.0, 0.0)
    for size in (1e-30, 1e30, 3e38):
        weight = torch.full((200, 130), size)
        codes, scale = quantize(weight, scheme)
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert torch.allclose(dequantize(codes, scale, scheme, torch.float32), weight, rtol=1e-6)
        assert max(rounding_error(weight, codes, scale, scheme)) < 1e-6
    codes, scale = quantize(torch.full((3, 3), 1e-44), scheme)  # below every normal number: lost, but sound
    assert (scale > 0).all() and torch.isfinite(dequantize(codes, scale, scheme)).all()
    assert rounding_error(torch.full((3, 3), 1e-44), codes, scale, scheme) == (1.0, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_nan_and_infinity_are_refused(bad: float, scheme: Fp8Scheme) -> None:
    weight = torch.randn(140, 130)
    weight[139, 129] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight, scheme)


@pytest.mark.parametrize("scheme", list(Fp8Scheme))
def test_rounding_error_is_the_error(scheme: Fp8Scheme) -> None:
    torch.manual_seed(6)
    weight = torch.randn(300, 200).bfloat16()
    codes, scale = quantize(weight, scheme)
    difference = product(codes, scale, scheme, (128, 128)) - weight.float()
    error = rounding_error(weight, codes, scale, scheme)
    assert error.rms == pytest.approx(float(difference.norm() / weight.float().norm()), rel=1e-4)
    assert error.max == pytest.approx(float(difference.abs().max() / weight.float().abs().max()), rel=1e-6)
    assert 0.02 < error.rms < 0.03  # 4 significant bits


def test_one_outlier_costs_only_its_own_group() -> None:
    torch.manual_seed(7)
    weight = torch.randn(256, 256) * 0.02
    weight[0, 0] = 20000.0
    rms = [
        rounding_error(weight[1:], *cut(weight, scheme), scheme).rms for scheme in (Fp8Scheme.CHANNEL, Fp8Scheme.TENSOR)
    ]
    assert rms[0] < 0.03 < 0.3 < rms[1]


def cut(weight: Tensor, scheme: Fp8Scheme) -> tuple[Tensor, Tensor]:
    codes, scale = quantize(weight, scheme)
    return codes[1:], scale[1:] if scheme is Fp8Scheme.CHANNEL else scale
