"""The matrices of one rank, as they are multiplied with: plain, or FP8 codes with their scales.

FP8 stays FP8 in memory; `ops.fp8_matmul` widens it within the product. A part of a matrix has the part of its scales
that covers it: `first` says where in a block it begins, so that a cut may fall anywhere (heads of 64 channels in blocks
of 128) without a scale being changed.

Matrices that read the same activations (q, k and v; gate and up) are multiplied as one where that keeps every scale:
w1 and w3 of an expert have scales of their own, and keep them. Where blocks do not line up they stay two products.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from skymoe.ops.fp8_matmul import fp8_linear
from skymoe.ops.invariant import invariant_linear
from skymoe.spec.quantization import DEFAULT_BLOCK, Fp8Scheme


@dataclass(frozen=True)
class Plain:
    """A matrix in the type of the activations."""

    weight_OI: Tensor

    def __call__(self, x_NI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """The product x W^T (+ b); a row depends on its own inputs only."""
        return invariant_linear(x_NI, self.weight_OI, bias_O)

    @property
    def num_rows(self) -> int:
        """O."""
        return self.weight_OI.shape[0]

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self.weight_OI.nbytes


@dataclass(frozen=True)
class Fp8:
    """codes * scale; the arguments of `ops.fp8_matmul.fp8_linear`."""

    codes_OI: Tensor
    scale: Tensor
    scheme: Fp8Scheme
    block_size: tuple[int, int] = DEFAULT_BLOCK
    first: tuple[int, int] = (0, 0)

    def __call__(self, x_NI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """The product x W^T (+ b)."""
        return fp8_linear(x_NI, self.codes_OI, self.scale, self.scheme, self.block_size, bias_O, first=self.first)

    @property
    def num_rows(self) -> int:
        """O."""
        return self.codes_OI.shape[0]

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self.codes_OI.nbytes + self.scale.nbytes

    def by_channel(self) -> Fp8:
        """The same with a scale per row, where there is one for all."""
        if self.scheme is not Fp8Scheme.TENSOR:
            return self
        return replace(self, scale=self.scale.expand(self.num_rows, 1).contiguous(), scheme=Fp8Scheme.CHANNEL)


@dataclass(frozen=True)
class SideBySide:
    """Matrices with the same inputs; their outputs one after another."""

    parts: tuple[Plain | Fp8, ...]

    def __call__(self, x_NI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """The products x W^T (+ b)."""
        sizes = [part.num_rows for part in self.parts]
        biases = (None,) * len(sizes) if bias_O is None else bias_O.split(sizes)
        return torch.cat([part(x_NI, bias) for part, bias in zip(self.parts, biases, strict=True)], 1)

    @property
    def num_rows(self) -> int:
        """O."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return sum(part.num_bytes for part in self.parts)


Matrix: TypeAlias = Plain | Fp8 | SideBySide


def joined(parts: Sequence[Plain | Fp8]) -> Matrix:
    """One matrix with the rows of all `parts`; side by side where one cannot be."""
    plain = [part for part in parts if isinstance(part, Plain)]
    if len(plain) == len(parts):
        return Plain(torch.cat([part.weight_OI for part in plain]))
    narrow = [part.by_channel() for part in parts if isinstance(part, Fp8)]
    first = narrow[0]
    alike = len(narrow) == len(parts) and all(
        (part.scheme, part.block_size, part.first[1]) == (first.scheme, first.block_size, first.first[1])
        for part in narrow
    )
    if not alike or (first.scheme is Fp8Scheme.BLOCK and not _line_up(narrow)):
        return SideBySide(tuple(parts))
    codes = torch.cat([part.codes_OI.view(torch.uint8) for part in narrow]).view(torch.float8_e4m3fn)
    return replace(first, codes_OI=codes, scale=torch.cat([part.scale for part in narrow]))


def _line_up(parts: Sequence[Fp8]) -> bool:
    """Whether each part but the first begins where a row of blocks does, and the one before it ends there."""
    height, row = parts[0].block_size[0], parts[0].first[0]
    for part, following in zip(parts, parts[1:], strict=False):
        row += part.num_rows
        if row % height or following.first[0]:
            return False
    return True
