"""Linear layers whose rows do not depend on the batch: y_NO = x_NI W^T, row i the same to the bit whatever N is.

A matrix library picks its inner loop by the shape, and with the loop the order in which the products of a row are
added up. The answer to a request then depends on what else is in the batch: greedy decoding goes another way where two
tokens are nearly as likely. Found by experiment (docs/serving_kernels.md; torch 2.13 with MKL and oneDNN, Zen 4):

- fp32: one row, two or three rows, and four or more take three different loops; a remainder of fewer than four rows
  of one thread's share takes the loop of one to three. Among outputs, the last O mod 16 take other loops where they
  stand alone, as in the share of a thread.
- bf16: one row takes a loop of its own; so do products of few numbers, N O I <= 4096, which torch computes without
  oneDNN; all else agrees.

So rows are padded with zeros to a multiple of `TILE` (more where I is below 65), and outputs come in multiples of
`WIDTH`: the last few together with their neighbours, once more; a weight of fewer outputs is padded. Nothing is copied
but narrow weights and small batches. Neither N, nor the place of a row, nor the number of threads changes a bit.
`tests/ops/test_invariant.py` says whether that holds on another machine.

`torch.sigmoid` and `F.silu` in fp32 have the same fault: what is left over behind the last whole vector of a thread's
share goes through another exponential function. `torch.exp` has not, and +, -, *, / have one result, so `sigmoid` and
`swiglu` here are made of these.

Nothing is done on other devices: libraries for GPUs choose by shape too, and batch invariance there needs kernels of
its own.

Shapes: N, R rows, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 4  # rows
WIDTH = 16  # outputs
_SMALL = 4096  # products of so many numbers or fewer torch does not hand to oneDNN


def invariant_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` whose row i depends on row i of `x_NI` only, to the bit. N may be 0. No gradient is meant."""
    if x_NI.device.type != "cpu":
        return F.linear(x_NI, weight_OI, bias_O)
    num_rows, num_outputs = len(x_NI), len(weight_OI)
    y_NO = padded_matmul(padded_rows(x_NI), weight_OI)[:num_rows, :num_outputs]
    return y_NO if bias_O is None else y_NO + bias_O


def padded_rows(x_NI: Tensor) -> Tensor:
    """`x_NI` with rows of zeros up to a multiple of `TILE`, at least `_SMALL` products per `WIDTH` outputs."""
    least = TILE if x_NI.dtype == torch.float32 else _SMALL // (WIDTH * max(x_NI.shape[1], 1)) + 1
    num_rows = max(len(x_NI), least)
    rest = num_rows + -num_rows % TILE - len(x_NI)
    return F.pad(x_NI, (0, 0, 0, rest)) if rest else x_NI.contiguous()


def padded_matmul(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T for N a multiple of `TILE`; the bits of an output are the same in whatever part of a weight it stands.

    Returns:
        (N, O), or (N, WIDTH) where O is less than that.
    """
    num_outputs = len(weight_OI)
    whole = num_outputs // WIDTH * WIDTH
    if not whole:
        return x_NI @ F.pad(weight_OI, (0, 0, 0, WIDTH - num_outputs)).T
    if whole == num_outputs:
        return x_NI @ weight_OI.T
    y_NO = x_NI.new_empty(len(x_NI), num_outputs)
    y_NO[:, :whole] = x_NI @ weight_OI[:whole].T
    y_NO[:, -WIDTH:] = x_NI @ weight_OI[-WIDTH:].T
    return y_NO


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), formed in fp32, in the dtype of `x`; each number by itself, to the bit."""
    return (1 / (1 + torch.exp(-x.float()))).to(x.dtype)


def swiglu(gate_up_NG: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold the gate in the first half: each number by itself, to the bit.

    silu is formed in fp32 and rounded to the dtype of the rows before the product, as `F.silu` does.
    """
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
    wide_NF = gate_NF.float()
    return (wide_NF / (1 + torch.exp(-wide_NF))).to(gate_up_NG.dtype) * up_NF


def by_expert(x_RI: Tensor, counts: Sequence[int], linear: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`linear(expert, rows)` of each expert's rows, one after another; experts without rows are passed over.

    Args:
        x_RI: rows grouped by expert; at least one row.
        counts: rows of each expert; their sum is R.
        linear: from an expert's number and its rows to as many rows: `invariant_linear` or `fp8_linear`, or a whole
            feed-forward of them.
    """
    parts = zip(range(len(counts)), x_RI.split(list(counts)), strict=True)
    return torch.cat([linear(expert, rows) for expert, rows in parts if len(rows)])
