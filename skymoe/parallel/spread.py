"""The one place where a model is divided: from a spec and a mesh to this rank's parts, and to their weights.

A rank makes only what it owns. Initial values depend on the seed, the tensor's name and the expert's number alone
(model/init.py), so a rank draws what a single process would have drawn there; from a model directory it reads the
tensors of its stages one at a time and keeps its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from skymoe.base.dtype import DType
from skymoe.model.init import initial_tensor
from skymoe.model.load import check_spare_head
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.part import Part
from skymoe.spec.model import ModelSpec
from skymoe.weights.decoded import DecodedReader
from skymoe.weights.match import match_tensors
from skymoe.weights.names import Place
from skymoe.weights.slices import Box, Slice, intersect, shifted, to_local


def build_parts(spec: ModelSpec, mesh: Mesh, options: PartOptions, *, dtype: torch.dtype) -> dict[int, Part]:
    """This rank's stages, uninitialised, on the mesh's device (`meta` for a dry run). Expert biases stay fp32.

    With tied embeddings and both ends of the pipeline here, the last stage uses the first one's table.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    mesh.layout.check(spec)
    with torch.device("meta"):
        parts = {stage: Part(spec, mesh, stage, options) for stage in mesh.layout.stages_of(mesh.coordinate.pp)}
    first, last = parts.get(0), parts.get(mesh.layout.num_stages - 1)
    for part in parts.values():
        part.to(dtype=dtype).to_empty(device=mesh.device)
        for router in part.routers().values():
            if router.expert_bias is not None:
                router.expert_bias = router.expert_bias.float()  # it moves in steps that bf16 would swallow
    if spec.tie_embeddings and first is not None and last is not None and first is not last:
        last.embed = first.embed
    return parts


@torch.no_grad()
def initialize_parts(parts: Mapping[int, Part], seed: int) -> None:
    """Draw every weight as `model.init.initialize` would for the whole model."""
    for part in parts.values():
        for name, own in named_tensors(part).items():
            slice_ = part.slices[name]
            if ".experts." in name:
                first, stop = slice_.pieces[0].whole[0]
                shape = (stop - first, *slice_.whole_shape[1:])
                drawn = initial_tensor(part.spec, name, shape, seed, first_expert=first)
                _put(own, slice_, drawn, ((first, stop), *((0, size) for size in shape[1:])))
            else:
                drawn = initial_tensor(part.spec, name, slice_.whole_shape, seed)
                _put(own, slice_, drawn, tuple((0, size) for size in slice_.whole_shape))


@torch.no_grad()
def load_parts(parts: Mapping[int, Part], directory: Path) -> None:
    """Read this rank's share of the model in `directory`; each tensor is held whole for a moment.

    Raises:
        FormatError: anything that is missing, left over, broken or hostile.
    """
    spec = next(iter(parts.values())).spec
    with DecodedReader(directory, decode_to=DType.FLOAT32) as reader:
        match = match_tensors(spec, reader.names(), where=directory)
        check_spare_head(reader, match)
        for part in parts.values():
            owned = named_tensors(part)
            for name, place in match.table.items():
                slice_ = part.slices.get(place.parameter)
                if slice_ is None:
                    continue
                box = _box_of(place, slice_.whole_shape)
                if any(intersect(piece.whole, box) for piece in slice_.pieces):
                    tensor = reader.tensor(name)
                    whole = tensor if place.expert is None else tensor[None]
                    _put(owned[place.parameter], slice_, whole, box)


def named_tensors(part: Part) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(chain(part.named_parameters(), part.named_buffers()))


def _box_of(place: Place, whole_shape: tuple[int, ...]) -> Box:
    """Where a file's tensor lies in the stacked parameter."""
    if place.expert is None:
        return tuple((0, size) for size in whole_shape)
    rows = place.rows or (0, whole_shape[1])
    return ((place.expert, place.expert + 1), rows, (0, whole_shape[2]))


def _put(own: Tensor, slice_: Slice, values: Tensor, box: Box) -> None:
    """Copy into the rank's tensor what it owns of `values`, which are those of `box` of the whole tensor."""
    starts = tuple(-start for start, _ in box)
    for piece in slice_.pieces:
        shared = intersect(piece.whole, box)
        if shared is not None:
            own[_index(to_local(piece, shared))] = values[_index(shifted(shared, starts))].to(own.device)


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
