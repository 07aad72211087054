"""The tensors of a save as hashed files: torch's side of `hashing`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from skymoe.weights.buffers import bytes_of, info_of
from skymoe.weights.hashing import Place, PlannedFile
from skymoe.weights.header import Header
from skymoe.weights.manifest import FileRecord
from skymoe.weights.pieces import SavedPiece
from skymoe.weights.stored import whole_box


class TensorsToSave:
    """The tensors of one safetensors file, and its header, which is known before the first byte is written.

    Raises:
        FormatError: a tensor of a type or name that cannot be stored.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], places: Mapping[str, Place] | None = None
    ) -> None:
        self._tensors = tensors
        self._file = PlannedFile(
            {name: info_of(name, tensor) for name, tensor in tensors.items()}, places or {}, metadata
        )

    @property
    def header(self) -> Header:
        """Of the file."""
        return self._file.header

    def write(self, path: Path) -> FileRecord:
        """Write the file and push it to the disk; what the manifest says of it."""
        return self._file.write(path, lambda name: [bytes_of(self._tensors[name])])


def pieces_to_save(content: Mapping[str, SavedPiece], metadata: Mapping[str, str], *, alone: bool) -> TensorsToSave:
    """A rank's file: name in the file -> piece. Whole tensors of a process that is `alone` need no place."""
    tensors, places = {}, {}
    for name, piece in content.items():
        assert tuple(piece.tensor.shape) == tuple(stop - start for start, stop in piece.box), piece.name
        tensors[name] = piece.tensor
        if not alone or piece.box != whole_box(piece.whole_shape) or f"{name}#2" in content:
            places[name] = Place(piece.box, piece.whole_shape)
    return TensorsToSave(tensors, metadata, places)
