"""How far two tensors are apart: largest difference, relative RMS, cosine; summed up block by block.

Everything is computed in fp64 on blocks, so that tensors of any size cost the memory of a block, and the sums of an
expert's three matrices (or of a whole model) are the sum of theirs. Two NaN are equal, equal infinities are equal; a
NaN or an infinity against anything else is infinitely far away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """Sums over pairs (a, b) of elements; `one + other` is the distance of both parts together.

    Attributes:
        num_different: elements that differ in value.
        max_abs: largest |a - b|.
        largest: largest finite |a|.
        difference_sq, left_sq, right_sq, product: sums of (a - b)^2, and of the finite elements a^2, b^2 and a b.
    """

    num_different: int = 0
    max_abs: float = 0.0
    largest: float = 0.0
    difference_sq: float = 0.0
    left_sq: float = 0.0
    right_sq: float = 0.0
    product: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.num_different + other.num_different,
            max(self.max_abs, other.max_abs),
            max(self.largest, other.largest),
            self.difference_sq + other.difference_sq,
            self.left_sq + other.left_sq,
            self.right_sq + other.right_sq,
            self.product + other.product,
        )

    @property
    def relative_max(self) -> float:
        """Largest |a - b| / largest |a|; infinite when only b is not zero."""
        return _ratio(self.max_abs, self.largest)

    @property
    def relative_rms(self) -> float:
        """|a - b| / |a| in Euclidean norms; infinite when only b is not zero."""
        return _ratio(math.sqrt(self.difference_sq), math.sqrt(self.left_sq))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between a and b; 1 when both are zero, 0 when one is."""
        if self.left_sq == 0 or self.right_sq == 0:
            return 1.0 if self.left_sq == self.right_sq else 0.0
        return max(-1.0, min(1.0, self.product / math.sqrt(self.left_sq) / math.sqrt(self.right_sq)))


def distance(left: Tensor, right: Tensor) -> Distance:
    """The distance of two blocks of one shape, of any element types."""
    a, b = left.double().flatten(), right.double().flatten()
    if not a.numel():
        return Distance()
    equal = (a == b) | (a.isnan() & b.isnan())
    apart = (b - a).abs_().masked_fill_(equal, 0.0).nan_to_num_(nan=math.inf, posinf=math.inf)
    a, b = (side.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) for side in (a, b))
    return Distance(
        num_different=int((~equal).sum()),
        max_abs=float(apart.max()),
        largest=float(a.abs().max()),
        difference_sq=float(apart @ apart),
        left_sq=float(a @ a),
        right_sq=float(b @ b),
        product=float(a @ b),
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have one element type, one shape and the same bits (NaN included)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    a, b = (side.contiguous().reshape(-1).view(torch.uint8) for side in (left, right))
    return torch.equal(a, b)


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf
