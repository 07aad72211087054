"""A generation written again in the slices of another layout, offline. No torch.

Every whole tensor of the source is taken apart into the boxes of the target's ranks; each box is read from whatever
pieces the source has and written where it goes, a few megabytes at a time. Tensors of the optimizer are divided as
their parameter is (`division`), scalars go to the rank that has its first element, what is no parameter (the states of
generators) to rank 0, and JSON documents are copied byte for byte. Nothing is computed: all bits stay. The files depend
on the tensors and the target only, not on the division of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from skymoe.spec.layout import Layout
from skymoe.spec.model import ModelSpec
from skymoe.weights.division import Share, divide, layout_document
from skymoe.weights.hashing import Place, PlannedFile, write_texts
from skymoe.weights.header import TensorInfo
from skymoe.weights.manifest import FileRecord, Manifest, file_name, numbered
from skymoe.weights.names import parameter_shapes
from skymoe.weights.publish import save_errors
from skymoe.weights.slices import Box
from skymoe.weights.staged import estimate_bytes, open_staging, publish_staged
from skymoe.weights.stored import StoredTensor, catalogue, extents, whole_box


class _Cut(NamedTuple):
    """A box of a tensor of the source, which becomes a tensor of a file."""

    source: StoredTensor
    box: Box


def rewrite_generation(
    directory: Path, manifest: Manifest, root: Path, spec: ModelSpec, layout: Layout, *, zero_shards: bool = True
) -> Path:
    """The generation in `directory`, in the slices of `layout`, as the only one under `root`; returns its directory.

    It belongs to the same run. Memory is bounded by a few blocks of 8 MB, whatever the size of the tensors.

    Args:
        directory: of the source, which has been verified.
        manifest: of the source.
        root: directory of generations, without any.
        spec: the model.
        layout: of the target.
        zero_shards: divide what all dp ranks have alike among them; otherwise dp 0 has it.

    Raises:
        CheckpointError: the source is damaged or holds less than whole tensors.
        MachineError: no space, no permission.
    """
    stored = catalogue(directory, manifest.files)
    files = _plan(stored, spec, layout, zero_shards)
    metadata = {"format": "pt", "step": str(manifest.step)}
    planned = {name: _planned(cuts, metadata, alone=layout.world_size == 1) for name, cuts in files.items()}
    documents = {name: (directory / name).read_bytes() for name in manifest.files if name.endswith(".json")}
    data = sum(file.header.num_bytes for file in planned.values()) + sum(map(len, documents.values()))
    staging = open_staging(root, manifest.step, estimate_bytes(data, sum(map(len, files.values()))))
    records: dict[str, FileRecord] = {}
    with save_errors(root):
        for name, file in planned.items():
            records[name] = file.write(staging / name, _reader(files[name]), max_lag_bytes=0)
        records |= write_texts(staging, documents)
    return publish_staged(
        root, staging, records,
        step=manifest.step, layout=layout_document(layout), torch=manifest.torch, keep=1, run=manifest.run,
    )  # fmt: skip


def _plan(
    stored: Mapping[str, Mapping[str, StoredTensor]], spec: ModelSpec, layout: Layout, zero_shards: bool
) -> dict[str, dict[str, _Cut]]:
    """File name -> name in the file -> what goes there."""
    shares, shapes = divide(spec, layout, zero_shards=zero_shards), parameter_shapes(spec)
    alone = layout.world_size == 1
    order = {name: place for place, name in enumerate(shapes)}
    files: dict[str, dict[str, _Cut]] = {}
    for stem in sorted(stored):
        for name in sorted(stored[stem], key=lambda name: (order.get(name.partition("/")[0], len(order)), name)):
            tensor, parameter = stored[stem][name], name.partition("/")[0]
            for rank, box in _shares(tensor, shares.get(parameter, []), shapes.get(parameter), alone):
                content = files.setdefault(file_name(stem, None if alone else rank), {})
                count = 1
                while (own := numbered(name, count)) in content:
                    count += 1
                content[own] = _Cut(tensor, box)
    return files


def _shares(
    tensor: StoredTensor, shares: list[Share], shape: tuple[int, ...] | None, alone: bool
) -> Iterator[tuple[int, Box]]:
    """Which ranks get which boxes of a tensor."""
    if not alone and tensor.info.shape == shape:
        yield from shares
    else:
        first = next((rank for rank, box in shares if all(start == 0 for start, _ in box)), 0)
        yield first, whole_box(tensor.info.shape)


def _planned(cuts: Mapping[str, _Cut], metadata: Mapping[str, str], *, alone: bool) -> PlannedFile:
    infos = {name: TensorInfo(cut.source.info.dtype, extents(cut.box)) for name, cut in cuts.items()}
    places = {} if alone else {name: Place(cut.box, cut.source.info.shape) for name, cut in cuts.items()}
    return PlannedFile(infos, places, metadata)


def _reader(cuts: Mapping[str, _Cut]) -> Callable[[str], Iterator[memoryview]]:
    return lambda name: cuts[name].source.chunks(cuts[name].box)
