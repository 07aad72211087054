"""FP8 weights: fp32 to e4m3 and back, with scales.

e4m3fn is one byte `s eeee mmm`: value (-1)^s 2^(e-7) (1 + m/8), for e = 0 (-1)^s 2^-6 m/8; largest 448 (0x7E); no
infinity; 0x7F and 0xFF are not a number. `decode_table` is that definition.

- **Encoding** is torch's cast of fp32, which rounds to nearest, ties to even; on a CPU it is fast (docs/quantization.md
  has the figures). Beyond 448 it would make NaN, so numbers are first held to +-448.
- **Decoding** by torch's cast is slow on a CPU. An e4m3 number shifted left by 7 is the fp16 number 2^-8 times as
  large, subnormals included, so `(b << 7) & 0xBF80`, times 256, is exact. The 256 is folded into the scale.

Everything goes through a cache-sized fp32 buffer, some rows at a time: besides source and result, memory is that.

Policy: NaN and infinity are refused, by `encode_e4m3` (NaN) and `quantize` on the way in and by `dequantize` on the way
out. Scales are fp32 and multiplied with: W = Q * scale. Each is the largest |W| of its group over 448; a group of
zeros has scale 1. Blocks at the right and lower edge may be smaller.

Shapes: O rows (outputs), I columns (inputs), R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.spec.quantization import DEFAULT_BLOCK, Fp8Scheme, scale_shape

E4M3_MAX = 448.0
MAX_SCALE = 2.0**119  # above it, 448 times the scale is no fp32 number

_CHUNK = 2**18  # elements: their fp32 copy fits into a second-level cache, and torch can divide them over threads
_MIN_SCALE = 2.0**-126  # the smallest normal number, so that the division of tiny groups stays sound
_FP16_TO_E4M3 = 256.0


def decode_table() -> Tensor:
    """The 256 values of e4m3fn in fp32, by the definition: the reference of this file."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 0xF, code & 7
        value = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
        values.append(sign * (float("nan") if code & 0x7F == 0x7F else value))
    return torch.tensor(values, dtype=torch.float32)


def encode_e4m3(x: Tensor) -> Tensor:
    """`x` (fp32 or narrower, any shape) as float8_e4m3fn: to nearest, ties to even, saturating at 448; keeps -0.

    Raises:
        ValueError: `x` holds NaN.
    """
    if x.numel() and bool(x.amax().isnan()):
        raise ValueError("NaN has no place in FP8 weights")
    out = torch.empty(x.numel(), dtype=torch.float8_e4m3fn)
    encoder = _Encoder(1)
    for piece, out_piece in zip(x.reshape(-1).split(_CHUNK), out.split(_CHUNK), strict=True):
        encoder.encode(piece, None, out_piece)
    return out.view(x.shape)


def decode_e4m3(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of float8_e4m3fn `codes`; exact in fp32, bf16 and fp16.

    Raises:
        ValueError: a code is NaN.
    """
    return dequantize(codes.reshape(-1, 1), torch.ones(()), Fp8Scheme.TENSOR, dtype).view(codes.shape)


@torch.no_grad()
def quantize(
    weight_OI: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int] = DEFAULT_BLOCK
) -> tuple[Tensor, Tensor]:
    """`weight_OI` as e4m3 codes [O, I], and fp32 scales of `spec.quantization.scale_shape`.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    scale = scales(largest(weight_OI, scheme, block_size))
    return encode_scaled(weight_OI, scale, scheme, block_size), scale


def scales(largest: Tensor) -> Tensor:
    """The scales for groups whose largest |W| are given. Raises ValueError for NaN or infinity among them."""
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("the weight holds NaN or infinity")
    return torch.where(largest == 0, 1.0, (largest / E4M3_MAX).clamp(min=_MIN_SCALE))


def largest(weight_OI: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int] = DEFAULT_BLOCK) -> Tensor:
    """The largest |W| of each group, fp32, of `spec.quantization.scale_shape`; NaN where the group holds NaN."""
    num_rows, num_columns = weight_OI.shape
    height, width = block_size
    found = torch.zeros(scale_shape(scheme, weight_OI.shape, block_size))
    scratch = torch.empty(max(_CHUNK, num_columns))
    for rows in _strips(num_rows, scheme, block_size):
        of_column = torch.zeros(-(-num_columns // width) * width)  # whole blocks
        of_column_I = of_column[:num_columns]
        for part in _chunks(rows, num_columns):
            x_RI = scratch[: len(part) * num_columns].view(len(part), num_columns)
            x_RI.copy_(weight_OI[part.start : part.stop]).abs_()
            if scheme is Fp8Scheme.CHANNEL:
                found[part.start : part.stop] = x_RI.amax(1, keepdim=True)
            else:
                torch.maximum(of_column_I, x_RI.amax(0), out=of_column_I)
        if scheme is Fp8Scheme.BLOCK:
            found[rows.start // height] = of_column.view(-1, width).amax(1)
        elif scheme is Fp8Scheme.TENSOR:
            found = torch.maximum(found, of_column.amax())
    return found


@torch.no_grad()
def encode_scaled(
    weight_OI: Tensor, scale: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int] = DEFAULT_BLOCK
) -> Tensor:
    """The codes of weight / scale; `scale` as `quantize` makes it. The weight holds no NaN."""
    num_rows, num_columns = weight_OI.shape
    out_OI = torch.empty(weight_OI.shape, dtype=torch.float8_e4m3fn)
    encoder = _Encoder(num_columns)
    for rows in _strips(num_rows, scheme, block_size):
        by_column = _scale_of(scale, scheme, rows, range(num_columns), block_size)
        for part in _chunks(rows, num_columns):
            of_part = by_column[part.start : part.stop] if scheme is Fp8Scheme.CHANNEL else by_column
            encoder.encode(weight_OI[part.start : part.stop], of_part, out_OI[part.start : part.stop])
    return out_OI


@torch.no_grad()
def dequantize(
    codes_OI: Tensor, scale: Tensor, scheme: Fp8Scheme, dtype: torch.dtype = torch.bfloat16,
    block_size: tuple[int, int] = DEFAULT_BLOCK, *, first: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """codes * scale in `dtype`; the product is formed, and rounded once, in fp32.

    Args:
        codes_OI: a whole weight, or a part of its rows and columns.
        scale: of the whole weight, of `spec.quantization.scale_shape`, at most `MAX_SCALE`.
        scheme, block_size: how the scales lie.
        dtype: of the result.
        first: row and column of the whole weight at which `codes_OI` begins.

    Raises:
        ValueError: a code is NaN.
    """
    out_OI = torch.empty(codes_OI.shape, dtype=dtype)
    for rows, x_RI in _decoded(codes_OI, scale, scheme, block_size, first):
        out_OI[rows] = x_RI
    return out_OI


class RoundingError(NamedTuple):
    """What quantization changed.

    Attributes:
        rms: root mean square of the error over that of the weight; 0 where the weight is all zero.
        max: largest |error| over the largest |weight|.
    """

    rms: float
    max: float


@torch.no_grad()
def rounding_error(
    weight_OI: Tensor, codes_OI: Tensor, scale: Tensor, scheme: Fp8Scheme,
    block_size: tuple[int, int] = DEFAULT_BLOCK,
) -> RoundingError:  # fmt: skip
    """How far codes * scale is from `weight_OI`, in fp32. Raises ValueError where a code is NaN."""
    squares, highest = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    scratch, unit = torch.empty(max(_CHUNK, weight_OI.shape[1])), 1 / scale.max()  # keeps the squares in range
    for rows, x_RI in _decoded(codes_OI, scale, scheme, block_size, (0, 0)):
        weight_RI = scratch[: x_RI.numel()].view(x_RI.shape).copy_(weight_OI[rows])
        for i, y_RI in enumerate((x_RI.sub_(weight_RI), weight_RI)):
            low, high = y_RI.mul_(unit).aminmax()
            highest[i] = torch.maximum(highest[i], torch.maximum(high, -low))
            squares[i] += y_RI.square_().sum(-1).double().sum()  # by rows: the same for any number of threads
    if highest[1] == 0:
        return RoundingError(0.0, 0.0)
    return RoundingError(float((squares[0] / squares[1]).sqrt()), float(highest[0] / highest[1]))


def _decoded(
    codes_OI: Tensor, scale: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int], first: tuple[int, int]
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time: which, and their values in fp32, in a buffer that the next ones take."""
    num_rows, num_columns = codes_OI.shape
    raw_OI = codes_OI.view(torch.int8)
    size = max(min(_CHUNK, num_rows * num_columns), num_columns)
    wide, x = torch.empty(size, dtype=torch.int16), torch.empty(size)
    columns = range(first[1], first[1] + num_columns)
    for rows in _strips(num_rows, scheme, block_size, first[0]):
        by_column = _scale_of(scale, scheme, rows, columns, block_size) * _FP16_TO_E4M3
        for part in _chunks(rows, num_columns):
            here = slice(part.start - first[0], part.stop - first[0])
            wide_RI, x_RI = (buffer[: len(part) * num_columns].view(len(part), num_columns) for buffer in (wide, x))
            wide_RI.copy_(raw_OI[here])
            if num_columns and int((raw_OI[here] & 0x7F).amax()) == 0x7F:
                raise ValueError("a weight is NaN")
            x_RI.copy_(wide_RI.bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16))
            x_RI.mul_(by_column[part.start - rows.start :][: len(part)] if scheme is Fp8Scheme.CHANNEL else by_column)
            yield here, x_RI


class _Encoder:
    """The working memory of encoding, and its one loop body."""

    def __init__(self, num_columns: int) -> None:
        self._x = torch.empty(max(_CHUNK, num_columns))

    def encode(self, x_RI: Tensor, scale: Tensor | None, out_RI: Tensor) -> None:
        """Codes of `x_RI` / `scale` into `out_RI`. `scale` is positive and broadcasts over the rows."""
        wide_RI = self._x[: x_RI.numel()].view(x_RI.shape).copy_(x_RI)
        if scale is not None:
            wide_RI.div_(scale)
        out_RI.copy_(wide_RI.clamp_(-E4M3_MAX, E4M3_MAX))


def _strips(num_rows: int, scheme: Fp8Scheme, block_size: tuple[int, int], first: int = 0) -> Iterator[range]:
    """The rows first, ..., first + num_rows - 1 in ranges of one row of blocks; all at once for the other schemes."""
    height = block_size[0] if scheme is Fp8Scheme.BLOCK else first + num_rows
    start, end = first, first + num_rows
    while start < end:
        stop = min(end, (start // height + 1) * height)
        yield range(start, stop)
        start = stop


def _chunks(rows: range, num_columns: int) -> Iterator[range]:
    """`rows` in ranges of at most `_CHUNK` elements (or one row)."""
    step = max(1, _CHUNK // max(num_columns, 1))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _scale_of(scale: Tensor, scheme: Fp8Scheme, rows: range, columns: range, block_size: tuple[int, int]) -> Tensor:
    """The scales of one strip: [1, I] for blocks, [rows, 1] for channels, a scalar."""
    match scheme:
        case Fp8Scheme.BLOCK:
            block_I = torch.arange(columns.start, columns.stop).div_(block_size[1], rounding_mode="floor")
            return scale[rows.start // block_size[0]].index_select(0, block_I)[None]
        case Fp8Scheme.CHANNEL:
            return scale.reshape(-1, 1)[rows.start : rows.stop]
        case Fp8Scheme.TENSOR:
            return scale.reshape(())
