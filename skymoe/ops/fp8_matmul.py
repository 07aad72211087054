"""Linear layers on FP8 weights: y_NO = x_NI (codes * scale)^T, the weight never whole in a wider format.

Only weights are FP8; activations stay fp32 or bf16. Some outputs at a time are decoded into a buffer that fits a
core's cache, in the dtype of the activations, and multiplied from there (`ops/fp8.py` has the decoding: a shift and a
mask, never torch's own cast, which is slow on a CPU). The result has the bits of `invariant_linear` on the
weight of `ops.fp8.dequantize`: strips begin at multiples of `WIDTH`, and there an output's bits do not depend on
the strip it stands in. So rows do not depend on the batch either. A few rows of bf16 take the kernel of
`ops/fp8_decode.py` where there is one; the bits are the same.

Codes that are NaN are not looked for here, for that would cost as much again: `checked_codes` does, once, at loading.

Shapes: N rows, I inputs, O outputs, S outputs of a strip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from skymoe.ops.fp8_decode import can_decode, decode_linear
from skymoe.ops.invariant import WIDTH, padded_matmul, padded_rows
from skymoe.spec.quantization import DEFAULT_BLOCK, Fp8Scheme

_STRIP = 1 << 18  # weights: 512 KiB in bf16; with fewer, what a call of torch costs would show
_FP16_TO_E4M3 = 256.0


def fp8_linear(
    x_NI: Tensor, codes_OI: Tensor, scale: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int] = DEFAULT_BLOCK,
    bias_O: Tensor | None = None, *, first: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """`invariant_linear` on the weight codes * scale, which is rounded once to the dtype of `x_NI`.

    Args:
        x_NI: fp32 or bf16 activations.
        codes_OI: float8_e4m3fn, contiguous: a whole weight or a rank's part of it. No NaN (`checked_codes`).
        scale: of `spec.quantization.scale_shape`; of the whole weight, or of any part of it that covers this one.
        scheme, block_size: how the scales lie.
        bias_O: in the dtype of `x_NI`.
        first: row and column at which `codes_OI` begins, counted from where `scale` begins.
    """
    num_rows, num_outputs = len(x_NI), len(codes_OI)
    x_NI, scale = padded_rows(x_NI), scale.float()
    if can_decode(x_NI, codes_OI, scheme, block_size, first):
        y_NO = decode_linear(x_NI, codes_OI, scale, scheme, block_size, first)[:num_rows]
        return y_NO if bias_O is None else y_NO + bias_O
    y_NO = x_NI.new_empty(len(x_NI), num_outputs)
    for strip, weight_SI in _strips(codes_OI, scale, scheme, block_size, first, x_NI.dtype):
        y_NO[:, strip] = padded_matmul(x_NI, weight_SI)[:, : strip.stop - strip.start]
    y_NO = y_NO[:num_rows]
    return y_NO if bias_O is None else y_NO + bias_O


def checked_codes(codes: Tensor) -> Tensor:
    """`codes`, in which there is no NaN: to be asked once, when weights are loaded.

    Raises:
        ValueError: a code is NaN.
    """
    for piece in codes.view(torch.int8).reshape(-1).split(1 << 18):
        if piece.numel() and int((piece & 0x7F).amax()) == 0x7F:
            raise ValueError("a weight is NaN")
    return codes


def _strips(
    codes_OI: Tensor, scale: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int], first: tuple[int, int],
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Some outputs at a time: which, and their weights in `dtype`, in a buffer that the next ones take."""
    (num_outputs, num_inputs), device = codes_OI.shape, codes_OI.device
    raw_OI = codes_OI.view(torch.int8)
    step = max(WIDTH, _STRIP // max(num_inputs, 1) // WIDTH * WIDTH)
    ends = [*(row for row in range(step, num_outputs, step) if num_outputs - row >= WIDTH), num_outputs]
    size = min(step + WIDTH, num_outputs) * num_inputs
    wide, x = torch.empty(size, dtype=torch.int16, device=device), torch.empty(size, device=device)
    narrow = x if dtype == torch.float32 else torch.empty(size, dtype=dtype, device=device)
    groups = list(_scales(codes_OI.shape, scale * _FP16_TO_E4M3, scheme, block_size, first))
    start = 0
    for end in ends:
        wide_SI, x_SI, narrow_SI = (
            buffer[: (end - start) * num_inputs].view(end - start, num_inputs) for buffer in (wide, x, narrow)
        )
        wide_SI.copy_(raw_OI[start:end]).bitwise_left_shift_(7).bitwise_and_(-0x4080)
        x_SI.copy_(wide_SI.view(torch.float16))
        for rows, of_rows in groups:
            low, high = max(rows.start, start), min(rows.stop, end)
            if low < high:
                here = of_rows[low - rows.start : high - rows.start] if scheme is Fp8Scheme.CHANNEL else of_rows
                x_SI[low - start : high - start].mul_(here)
        yield slice(start, end), x_SI if narrow is x else narrow_SI.copy_(x_SI)
        start = end


def _scales(
    shape: torch.Size, scale: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int], first: tuple[int, int]
) -> Iterator[tuple[range, Tensor]]:
    """Ranges of rows with what they are multiplied with: [1, I] for a row of blocks, [rows, 1], or a scalar."""
    num_outputs, num_inputs = shape
    if scheme is Fp8Scheme.TENSOR:
        yield range(num_outputs), scale.reshape(())
    elif scheme is Fp8Scheme.CHANNEL:
        yield range(num_outputs), scale.reshape(-1, 1)[first[0] : first[0] + num_outputs]
    else:
        (height, width), start = block_size, 0
        block_I = torch.arange(first[1], first[1] + num_inputs, device=scale.device) // width
        while start < num_outputs:
            block = (first[0] + start) // height
            end = min(num_outputs, (block + 1) * height - first[0])
            yield range(start, end), scale[block].index_select(0, block_I)[None]
            start = end
