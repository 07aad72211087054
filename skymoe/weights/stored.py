"""Whole tensors out of the pieces in which a generation holds them, by box. No torch.

A generation that one process wrote holds each tensor in one piece; one that many ranks wrote holds boxes of it in many
files. Here both look the same: `catalogue` says of every whole tensor which pieces there are, `StoredTensor.read_into`
fills memory with any box of it, whatever layout wrote the pieces, and reads no more than that (`boxes`). A piece that
is read whole is compared with its hash on the way.

Elements are moved, not looked at: they are numpy words of the element's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from skymoe.base.errors import CheckpointError
from skymoe.weights.boxes import Source, Words, read_box, view_of
from skymoe.weights.header import CHUNK_BYTES, TensorInfo
from skymoe.weights.manifest import FileRecord, TensorRecord, stem_of, whole_name
from skymoe.weights.slices import Box, flat_boxes, intersect, shifted, volume

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor of `shape`."""
    return tuple((0, size) for size in shape)


def extents(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


class StoredPiece(NamedTuple):
    """A box of a whole tensor, and where its bytes are."""

    box: Box
    file: str
    record: TensorRecord


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a generation.

    Attributes:
        directory: of the generation.
        name: of the tensor.
        info: element type and whole shape.
        pieces: that it is stored in.
    """

    directory: Path
    name: str
    info: TensorInfo
    pieces: tuple[StoredPiece, ...]

    def read_into(self, box: Box, buffer: memoryview) -> None:
        """Fill `buffer` with the elements of `box`, row-major.

        Raises:
            CheckpointError: the box is not within the tensor, elements of it are in no piece, a piece is damaged.
        """
        if not _is_within(box, self.info.shape):
            shape = list(self.info.shape)
            raise CheckpointError(f"tensor {self.name} is {shape}, it has no {_show(box)}", where=self.directory)
        out: Words = np.frombuffer(buffer, _WORDS[self.info.dtype.itemsize]).reshape(extents(box))
        missing = volume(box)
        origin = tuple(-start for start, _ in box)
        for piece in self.pieces:
            shared = intersect(piece.box, box)
            if shared is not None:
                self._read_piece(piece, shared, view_of(out, shifted(shared, origin)))
                missing -= volume(shared)
        if missing:
            raise CheckpointError(
                f"tensor {self.name}: {abs(missing)} elements of {_show(box)} are in "
                + ("no file" if missing > 0 else "more than one file"),
                where=self.directory,
            )

    def chunks(self, box: Box | None = None, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes of `box` (None: of all), row-major, in parts of at most `size`; a part is valid until the next."""
        box = whole_box(self.info.shape) if box is None else box
        item, shape, origin = self.info.dtype.itemsize, extents(box), tuple(start for start, _ in box)
        total, step = volume(box), max(size // self.info.dtype.itemsize, 1)
        buffer = memoryview(bytearray(min(step, total) * item))
        for start in range(0, total, step):
            stop, end = min(start + step, total), 0
            for part in flat_boxes(shape, start, stop):
                begin, end = end, end + volume(part) * item
                self.read_into(shifted(part, origin), buffer[begin:end])
            yield buffer[:end]

    def sha256(self) -> str:
        """SHA-256 of the bytes of the whole tensor: equal for equal tensors, however they are divided."""
        digest = hashlib.sha256()
        for part in self.chunks():
            digest.update(part)
        return digest.hexdigest()

    def _read_piece(self, piece: StoredPiece, shared: Box, out: Words) -> None:
        path, record = self.directory / piece.file, piece.record
        digest = hashlib.sha256() if shared == piece.box else None
        local = shifted(shared, tuple(-start for start, _ in piece.box))
        try:
            with FileIO(path, "rb") as file:
                read_box(Source(file, digest), record.offset, record.shape, local, out)
        except OSError as error:
            raise CheckpointError(f"tensor {self.name} cannot be read: {error.strerror}", where=path) from error
        except EOFError:
            raise CheckpointError(f"damaged: the file ends within tensor {self.name}", where=path) from None
        if digest is not None and digest.hexdigest() != record.sha256:
            raise CheckpointError(f"damaged: tensor {self.name} does not match its hash", where=path)


def catalogue(directory: Path, files: Mapping[str, FileRecord]) -> dict[str, dict[str, StoredTensor]]:
    """Every whole tensor in the files of a generation: file stem ("model") -> name -> tensor.

    Raises:
        CheckpointError: the manifest contradicts itself about a tensor.
    """
    found: dict[str, dict[str, list[StoredPiece]]] = {}
    for file, record in files.items():
        if file.endswith(".safetensors"):
            stem = found.setdefault(stem_of(file, record), {})
            for name, tensor in record.tensors.items():
                whole = whole_name(name, tensor)
                box = whole_box(tensor.shape) if tensor.whole is None else tensor.slice
                stem.setdefault(whole, []).append(StoredPiece(box, file, tensor))
    return {
        stem: {name: _tensor(directory, name, pieces) for name, pieces in content.items()}
        for stem, content in found.items()
    }


def cover_problem(tensor: StoredTensor) -> str:
    """Empty when the pieces cover the tensor exactly once, else what is wrong."""
    active: list[Box] = []
    for box in sorted(piece.box for piece in tensor.pieces):
        active = [other for other in active if not box or other[0][1] > box[0][0]]
        if any(intersect(box, other) is not None for other in active):
            return f"{_show(box)} is stored twice"
        active.append(box)
    missing = tensor.info.num_elements - sum(volume(piece.box) for piece in tensor.pieces)
    return f"{missing} of {tensor.info.num_elements} elements are in no file" if missing else ""


def _tensor(directory: Path, name: str, pieces: list[StoredPiece]) -> StoredTensor:
    first = pieces[0].record
    shape = first.shape if first.whole is None else first.whole
    for piece in pieces:
        own = piece.record
        if own.dtype != first.dtype or (own.shape if own.whole is None else own.whole) != shape:
            raise CheckpointError(f"tensor {name}: its pieces are not of one tensor", where=directory / piece.file)
        if extents(piece.box) != own.shape or not _is_within(piece.box, shape):
            raise CheckpointError(f"tensor {name} has no {_show(piece.box)}", where=directory / piece.file)
    return StoredTensor(directory, name, TensorInfo(first.dtype, shape), tuple(pieces))


def _is_within(box: Box, shape: tuple[int, ...]) -> bool:
    return len(box) == len(shape) and all(0 <= a <= b <= size for (a, b), size in zip(box, shape, strict=True))


def _show(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
