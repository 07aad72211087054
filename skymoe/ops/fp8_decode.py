"""FP8 linear layers for few rows on CPUs that multiply bf16 (AVX512-BF16), with the bits of `fp8_linear`'s own way.

`ops/fp8_matmul.py` decodes a weight into memory and multiplies from there: cheap for many rows, but for one or a few
the decoding is all the time. Here codes go through registers once: 16 outputs at a time are decoded, scaled, rounded to
bf16 and turned round in a buffer that stays in the first caches, and multiplied with four rows at a time.

The order of the additions is that of oneDNN, found by experiment: one sum per output over pairs of columns, the odd
column first, begun anew after every block of columns, the blocks added one after the other. How wide the blocks are
oneDNN decides; `block_of` finds the width with sums that cancel, where any other order shows, and answers None where
none fits. Then, and where numba or the instructions are missing, everything goes the other way. So a row's bits never
depend on which way it went, and the choice may be by the number of rows.

Needs numba (extra `cpu`), which brings its own code generator; no compiler. The kernels are compiled in this process
(about two seconds) when the first layer asks. Threads are this module's own, as many as torch has.

Shapes: N rows, M rows of padding included, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from skymoe.ops.fp8 import encode_e4m3
from skymoe.ops.invariant import padded_matmul, padded_rows
from skymoe.spec.quantization import Fp8Scheme

MOST_ROWS = 64  # beyond, decoding into memory is as fast
_COLUMNS, _OUTPUTS = 32, 16  # that are decoded at a time
_PER_TASK = 1 << 18  # weights that are worth a thread
_WIDTHS = (1024, 512, 2048, 256, 768, 384, 4096, 128, 64)


@lru_cache(maxsize=1)
def kernel() -> Callable[..., None] | None:
    """The kernel of `ops/fp8_kernel.py`; None where numba or the instructions are missing."""
    try:
        from skymoe.ops import fp8_kernel  # imports numba, half a second
    except ImportError:
        return None
    return fp8_kernel.multiply if fp8_kernel.has_instructions() else None


def can_decode(
    x_NI: Tensor, codes_OI: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int], first: tuple[int, int]
) -> bool:
    """Whether `decode_linear` may be asked, and gives the bits that `fp8_linear` gives without it."""
    if x_NI.dtype != torch.bfloat16 or x_NI.device.type != "cpu" or len(x_NI) > MOST_ROWS:
        return False
    num_outputs, num_inputs = codes_OI.shape
    whole = scheme is not Fp8Scheme.BLOCK or (block_size[1] % _COLUMNS == 0 and first[1] % _COLUMNS == 0)
    whole = whole and num_outputs >= _OUTPUTS and num_inputs > 0 and num_inputs % _COLUMNS == 0
    return whole and codes_OI.is_contiguous() and block_of(num_inputs) is not None


def decode_linear(
    x_MI: Tensor, codes_OI: Tensor, scale: Tensor, scheme: Fp8Scheme, block_size: tuple[int, int],
    first: tuple[int, int], block: int | None = None,
) -> Tensor:  # fmt: skip
    """x (codes * scale)^T in bf16, for rows as `padded_rows` makes them, where `can_decode`.

    Args:
        x_MI: bf16 rows, contiguous, a multiple of 4.
        codes_OI, scale, scheme, block_size, first: as in `fp8_linear`.
        block: columns after which a sum begins anew; None: what `block_of` found.
    """
    num_outputs, num_inputs = codes_OI.shape
    height, width, top, left = _blocks(scheme, block_size, first, codes_OI.shape)
    table = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    y_MO = torch.empty(len(x_MI), num_outputs)
    multiply = kernel()
    assert multiply is not None
    step = block or block_of(num_inputs)
    assert step is not None
    strides = table.stride()
    fixed = (
        codes_OI.data_ptr(), num_outputs, num_inputs, table.data_ptr(), *strides, height, width, top, left,
        x_MI.data_ptr(), len(x_MI), step, y_MO.data_ptr(),
    )  # fmt: skip
    count = -(-num_outputs // _OUTPUTS)
    tasks = max(1, min(torch.get_num_threads(), codes_OI.numel() // _PER_TASK))
    ends = [count * task // tasks for task in range(tasks + 1)]
    others = [_pool(tasks - 1).submit(multiply, ends[i], ends[i + 1], *fixed) for i in range(1, tasks)]
    multiply(ends[0], ends[1], *fixed)
    for other in others:
        other.result()
    return y_MO.to(torch.bfloat16)


@lru_cache(maxsize=256)
def block_of(num_inputs: int) -> int | None:
    """After how many columns oneDNN begins a sum anew; None where no kernel is here, or none has its bits.

    The second half of the columns is the first with the other sign, so that every sum is nothing but rounding.
    """
    if kernel() is None:
        return None
    half, outputs = num_inputs // 2, 64
    random = torch.Generator().manual_seed(num_inputs)
    w_OI, x_MI = (torch.randn(size, num_inputs, generator=random) for size in (outputs, 8))
    w_OI[:, half:], x_MI[:, half:] = -w_OI[:, :half], x_MI[:, :half]
    codes_OI, x_MI = encode_e4m3(w_OI * 8), padded_rows(x_MI.bfloat16())
    wanted = padded_matmul(x_MI, (w_OI * 8).to(torch.float8_e4m3fn).to(torch.bfloat16))
    scale = torch.ones(())
    for block in (num_inputs, *(width for width in _WIDTHS if width < num_inputs)):
        if torch.equal(decode_linear(x_MI, codes_OI, scale, Fp8Scheme.TENSOR, (1, 1), (0, 0), block), wanted):
            return block
    return None


def _blocks(
    scheme: Fp8Scheme, block_size: tuple[int, int], first: tuple[int, int], shape: torch.Size
) -> tuple[int, int, int, int]:
    """Rows and columns that share a scale, and at which row and column of the scales' weight ours begins."""
    match scheme:
        case Fp8Scheme.BLOCK:
            return (*block_size, *first)
        case Fp8Scheme.CHANNEL:
            return 1, shape[1], first[0], 0
        case Fp8Scheme.TENSOR:
            return shape[0], shape[1], 0, 0


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fp8")
