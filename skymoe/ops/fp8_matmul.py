"""Linear layers on FP8 weights: y_NO = x_NI (codes * scale)^T, the weight never whole in a wider format.

Only weights are FP8; activations stay fp32 or bf16.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skymoe.ops.fp8 import dequantize
from skymoe.ops.invariant import invariant_linear
from skymoe.spec.quantization import DEFAULT_BLOCK, Fp8Scheme


def fp8_linear(
    x_NI: Tensor, codes_OI: Tensor, scale: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int] = DEFAULT_BLOCK,
    bias_O: Tensor | None = None, *, first: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """`invariant_linear` on the weight codes * scale, which is rounded once to the dtype of `x_NI`.

    Args:
        x_NI: fp32 or bf16 activations.
        codes_OI: float8_e4m3fn, contiguous: a whole weight or a rank's part of it. No NaN (`checked_codes`).
        scale: of the whole weight, of `spec.quantization.scale_shape`; or only its part for these rows and columns.
        scheme, block_size: how the scales lie.
        bias_O: in the dtype of `x_NI`.
        first: row and column of the weight that `scale` is of, at which `codes_OI` begins.
    """
    return invariant_linear(x_NI, dequantize(codes_OI, scale, scheme, x_NI.dtype, block_size, first=first), bias_O)


def checked_codes(codes: Tensor) -> Tensor:
    """`codes`, in which there is no NaN: to be asked once, when weights are loaded.

    Raises:
        ValueError: a code is NaN.
    """
    for piece in codes.view(torch.int8).reshape(-1).split(1 << 20):
        if int((piece & 0x7F).amax()) == 0x7F:
            raise ValueError("a weight is NaN")
    return codes
