"""What a rank contributes to a checkpoint: boxes of whole tensors, and the names they have in its file.

A tensor of the model is divided over ranks; each rank saves the boxes it owns, and over all ranks the boxes cover every
tensor exactly once. A rank's file is `<stem>-00003.safetensors`, the rank in its name; a single process writes
`<stem>.safetensors`. In the file a box is called `name`, or `name#2`, `name#3` where the rank has several of one
tensor. The manifest says for each where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from skymoe.weights.manifest import file_name, numbered
from skymoe.weights.slices import Box
from skymoe.weights.stored import whole_box


class SavedPiece(NamedTuple):
    """A box of a whole tensor, to be saved by this rank.

    Attributes:
        stem: of the file: "model", "optimizer", or another ("rng").
        name: of the whole tensor, on every rank the same (`layers.0.attention.q.weight/exp_avg`).
        whole_shape: of the whole tensor.
        box: [start, stop) per dimension; () for a scalar, which one rank saves.
        tensor: the values, of the box's extents; on any device.
    """

    stem: str
    name: str
    whole_shape: tuple[int, ...]
    box: Box
    tensor: Tensor


def whole_pieces(tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[SavedPiece]:
    """Whole tensors as pieces: file stem -> name -> tensor, of a process that has everything."""
    for stem, content in tensors.items():
        for name, tensor in content.items():
            shape = tuple(tensor.shape)
            yield SavedPiece(stem, name, shape, whole_box(shape), tensor.detach())


def by_file(pieces: Iterable[SavedPiece], rank: int | None) -> dict[str, dict[str, SavedPiece]]:
    """File name -> name in the file -> piece, in the order given."""
    files: dict[str, dict[str, SavedPiece]] = {}
    for piece in pieces:
        content = files.setdefault(file_name(piece.stem, rank), {})
        count = 1
        while (name := numbered(piece.name, count)) in content:
            count += 1
        content[name] = piece
    return files
