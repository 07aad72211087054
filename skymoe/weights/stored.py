"""Whole tensors out of the pieces in which a generation holds them: by box, reading no more than the box needs. No torch.

A generation that one process wrote holds each tensor in one piece; one that many ranks wrote holds boxes of it in many
files. Here both look the same: `catalogue` says of every whole tensor which pieces there are, `StoredTensor.read_into`
fills memory with any box of it, whatever layout wrote the pieces. Where a box is a range of rows only those bytes are
read; where it is a range of columns, blocks of rows are read and the columns cut out of them, or, where they are long,
read one by one.

Elements are moved, not looked at: they are numpy words of the element's size.
"""

from __future__ import annotations

from skymoe.weights.slices import Box


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor of `shape`."""
    return tuple((0, size) for size in shape)
