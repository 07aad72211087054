"""Linear layers whose rows do not depend on the batch: y_NO = x_NI W^T, row i the same to the bit whatever N is.

A matrix library picks its inner loop by the number of rows, and with it the order in which the products of a row are
added up. The answer to a request then depends on what else is in the batch: greedy decoding flips where two tokens are
nearly as likely. Here rows are padded with zeros to a multiple of `TILE`, which takes every row through the same loop.

Shapes: N, R rows, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 8


def invariant_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` whose row i depends on row i of `x_NI` only, to the bit. N may be 0."""
    num_rows = len(x_NI)
    rest = -num_rows % TILE
    if rest:
        x_NI = F.pad(x_NI, (0, 0, 0, rest))
    return F.linear(x_NI, weight_OI, bias_O)[:num_rows]


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
