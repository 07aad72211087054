"""A box of a row-major array in a file, into memory of any strides, with as few and as large reads as it takes.

Where the box is a range of rows its bytes lie together. Where it is a range of columns, blocks of whole rows are read
and the columns cut out of them; where the columns are long, each is read by itself.
"""

from __future__ import annotations

from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skymoe.weights.header import CHUNK_BYTES
from skymoe.weights.slices import Box, volume

LONG_RUN = 2**16  # bytes that lie together: worth a read of their own

Words = NDArray[Any]


def view_of(words: Words, box: Box) -> Words:
    """The elements of `box`, not copied; the box of a scalar gives an array too."""
    return words[(..., *slices_of(box))]  # type: ignore[arg-type]  # numpy's stubs do not know it


def slices_of(box: Box) -> tuple[slice, ...]:
    """A box as numpy takes it."""
    return tuple(slice(start, stop) for start, stop in box)


class Source:
    """A file that is read in parts; what is read also goes into the hash, if there is one.

    Raises:
        EOFError: the file ends too early.
    """

    def __init__(self, file: FileIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def fill(self, start: int, out: Words) -> None:
        """Fill contiguous `out` with the bytes from `start` on."""
        rest = out.reshape(-1).view(np.uint8).data
        while rest:
            self._file.seek(start)
            count = self._file.readinto(rest[:CHUNK_BYTES])
            if not count:
                raise EOFError
            if self._digest is not None:
                self._digest.update(rest[:count])
            rest, start = rest[count:], start + count


def read_box(source: Source, start: int, shape: tuple[int, ...], box: Box, out: Words) -> None:
    """Read `box` of the row-major array of `shape` that begins at byte `start` of the file, into `out`.

    Args:
        source: the file. A box that is the whole array is read from its first byte to its last, in order.
        start: byte of the first element.
        shape: of the array.
        box: within it.
        out: of the box's extents; any strides. Its elements have the size of the file's.

    Raises:
        EOFError, OSError: the bytes cannot be read.
    """
    cut = [dim for dim, size in enumerate(shape) if box[dim] != (0, size)]
    last = cut[-1] if cut else 0
    if not shape or last == 0:  # rows: they lie together
        row = out.itemsize * _product(shape[1:])
        _read_run(source, start + (box[0][0] * row if shape else 0), out)
        return
    row = out.itemsize * _product(shape[1:])
    run = out.itemsize * _product(shape[last + 1 :]) * (box[last][1] - box[last][0])
    rows = range(*box[0])
    if len(rows) == 1 or run >= LONG_RUN or row > CHUNK_BYTES:
        for index, first in enumerate(rows):
            read_box(source, start + first * row, shape[1:], box[1:], out[index])
        return
    step = max(CHUNK_BYTES // row, 1)
    buffer = np.empty((min(step, len(rows)), *shape[1:]), out.dtype)
    for index in range(0, len(rows), step):
        block = buffer[: min(step, len(rows) - index)]
        source.fill(start + (rows.start + index) * row, block)
        out[index : index + len(block)] = block[(slice(None), *slices_of(box[1:]))]


def _read_run(source: Source, start: int, out: Words) -> None:
    """Bytes that lie together in the file, into `out` of any strides."""
    if out.flags.c_contiguous:
        source.fill(start, out)
        return
    row = out.itemsize * _product(out.shape[1:])
    if out.ndim > 1 and row >= LONG_RUN:
        for index in range(len(out)):
            _read_run(source, start + index * row, out[index])
        return
    step = max(CHUNK_BYTES // row, 1)
    buffer = np.empty((min(step, len(out)), *out.shape[1:]), out.dtype)
    for index in range(0, len(out), step):
        block = buffer[: min(step, len(out) - index)]
        source.fill(start + index * row, block)
        out[index : index + len(block)] = block


def _product(sizes: tuple[int, ...]) -> int:
    return volume(tuple((0, size) for size in sizes))
