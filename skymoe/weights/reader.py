"""WeightsReader: tensors out of a model directory, one at a time.

A tensor is read straight into the memory it will live in, so resident memory is bounded by the tensors you hold, not by
the file. There is no mapping: a file that shrinks under a mapping kills the process, a short read is an error message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from torch import Tensor

from skymoe.weights.buffers import bytes_of, empty
from skymoe.weights.header import CHUNK_BYTES, TensorInfo
from skymoe.weights.index import ModelFiles


class WeightsReader:
    """Read access to the safetensors weights in `directory`. A context manager.

    Raises:
        FormatError: anything missing, broken or hostile; the message names the file and the tensor.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._files = ModelFiles(self.directory)

    def names(self) -> dict[str, TensorInfo]:
        """Every tensor's dtype and shape, in the order of the files."""
        return dict(self._files.tensors)

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` on the CPU, in the dtype of the file. Raises FormatError when there is none."""
        file = self._files.file(name)
        tensor = empty(self._files.tensors[name])
        file.read_into(name, bytes_of(tensor))
        return tensor

    def slice(self, name: str, *parts: range) -> Tensor:
        """A part of tensor `name`: one range of step 1 per leading dimension, the dimensions after them whole.

        `reader.slice("w", split.part(rank))` reads only those rows; a part of a later dimension is cut out of blocks of
        rows, so that no more than the part and one block are in memory.

        Raises:
            FormatError: no such tensor.
            IndexError: more ranges than dimensions, or a range outside the tensor.
        """
        file = self._files.file(name)
        info = self._files.tensors[name]
        _check_parts(name, info, parts)
        if not parts:
            return self.tensor(name)
        first_row, lead = 0, 0
        while lead + 1 < len(parts) and len(parts[lead]) == 1:  # one expert of a stack: its rows lie together
            first_row, lead = (first_row + parts[lead].start) * info.shape[lead + 1], lead + 1
        rows, inner = parts[lead], tuple(slice(part.start, part.stop) for part in parts[lead + 1 :])
        row = TensorInfo(info.dtype, info.shape[lead + 1 :])
        out = empty(
            TensorInfo(info.dtype, (len(rows), *(len(p) for p in parts[lead + 1 :]), *info.shape[len(parts) :]))
        )
        step = max(len(rows), 1) if not inner else max(CHUNK_BYTES // max(row.num_bytes, 1), 1)
        for first in range(0, len(rows), step):
            count = min(step, len(rows) - first)
            block = empty(TensorInfo(info.dtype, (count, *row.shape))) if inner else out
            file.read_into(name, bytes_of(block), start=(first_row + rows.start + first) * row.num_bytes)
            if inner:
                out[first : first + count] = block[(slice(None), *inner)]
        return out[(None,) * lead]

    def close(self) -> None:
        """Close the files; harmless twice."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_parts(name: str, info: TensorInfo, parts: tuple[range, ...]) -> None:
    if len(parts) > len(info.shape):
        raise IndexError(f"tensor {name} has {len(info.shape)} dimensions, {len(parts)} ranges were given")
    for part, size in zip(parts, info.shape, strict=False):
        if part.step != 1 or not 0 <= part.start <= max(part.stop, part.start) <= size:
            raise IndexError(f"{part} is not within a dimension of {size} (tensor {name})")
