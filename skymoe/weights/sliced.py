"""Boxes of whole tensors out of a generation, as torch tensors: what a rank of any layout needs, and no more.

    sliced = SlicedGeneration(generation)
    sliced.read("model", "layers.0.attention.q.weight", ((8, 16), (0, 32)))

Whatever layout wrote the generation, one process among them. Memory is the box and one block of a few megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from skymoe.base.errors import CheckpointError
from skymoe.weights.buffers import bytes_of, empty
from skymoe.weights.generation import Generation
from skymoe.weights.header import TensorInfo
from skymoe.weights.slices import Box
from skymoe.weights.stored import extents, whole_box


class SlicedGeneration:
    """Read access to a verified generation, by box."""

    def __init__(self, generation: Generation) -> None:
        self.path = generation.path
        self._stored = generation.stored

    def names(self, stem: str) -> Mapping[str, TensorInfo]:
        """Dtype and whole shape of every tensor of `stem`; empty when there is no such file."""
        return {name: tensor.info for name, tensor in self._stored.get(stem, {}).items()}

    def read(self, stem: str, name: str, box: Box | None = None) -> Tensor | None:
        """The elements of `box` (None: all), on the CPU, in the dtype of the file; None when there is no such tensor.

        Raises:
            CheckpointError: the box is not within the tensor, an element of it is in no file, or a file is damaged.
        """
        stored = self._stored.get(stem, {}).get(name)
        if stored is None:
            return None
        box = whole_box(stored.info.shape) if box is None else box
        if any(start > stop for start, stop in box):
            raise CheckpointError(f"tensor {name}: this is no box: {box}", where=self.path)
        tensor = empty(TensorInfo(stored.info.dtype, extents(box)))
        stored.read_into(box, bytes_of(tensor))
        return tensor
