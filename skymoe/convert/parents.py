"""The models that a conversion starts from, opened and checked.

A parent's tensors are known by their *place* in the model (`weights.names`), so that a plan need not care whether the
experts lie one by one or fused, whether the weights are FP8, or what the family calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from skymoe.base.dtype import DType
from skymoe.convert.plan import Source
from skymoe.model.load import check_spare_head
from skymoe.spec.hf import spec_from_directory
from skymoe.spec.model import ModelSpec
from skymoe.weights.decoded import DecodedReader
from skymoe.weights.header import TensorInfo
from skymoe.weights.match import Match, match_tensors
from skymoe.weights.names import Layout, Place, file_names, tensor_table


@dataclass(frozen=True)
class Parent:
    """One model, open for reading.

    Attributes:
        directory: where it is.
        number: 0 for the first parent.
        spec: what it is.
        reader: its tensors, quantized ones decoded.
        match: proof that the tensors are those of the spec.
        sources: the place of every tensor, as in hub files, to where its values are read.
    """

    directory: Path
    number: int
    spec: ModelSpec
    reader: DecodedReader
    match: Match
    sources: Mapping[Place, Source]

    def by_parameter(self) -> dict[str, Source]:
        """Module name to source, for everything that is no expert."""
        return {place.parameter: source for place, source in self.sources.items() if place.expert is None}


@contextmanager
def open_parent(directory: Path, number: int = 0, *, decode_to: DType = DType.BFLOAT16) -> Iterator[Parent]:
    """Open the model in `directory`.

    Args:
        directory: a model directory.
        number: of the parent in the plan.
        decode_to: the type that FP8 weights are given out in.

    Raises:
        FormatError: missing, broken, hostile, not supported, or its tensors are not those of its config.
    """
    spec = spec_from_directory(directory)
    with DecodedReader(directory, decode_to=decode_to) as reader:
        tensors = reader.names()
        match = match_tensors(spec, tensors, where=directory)
        check_spare_head(reader, match)
        sources = find_sources(spec, tensors, match.layout, number)
        yield Parent(directory, number, spec, reader, match, sources)


def find_sources(
    spec: ModelSpec, tensors: Mapping[str, TensorInfo], layout: Layout, number: int
) -> dict[Place, Source]:
    """Where the values of each place of the hub layout are, whatever the layout of the files."""
    if layout is Layout.HUB:
        return {place: Source(number, name, tensors[name]) for name, place in tensor_table(spec).items()}
    fused = {place.parameter: name for place, name in file_names(spec, layout).items()}
    sources = {}
    for place in tensor_table(spec).values():
        name = fused[place.parameter]
        parts: tuple[range, ...] = ()
        if place.expert is not None:
            rows = () if place.rows is None else (range(*place.rows),)
            parts = (range(place.expert, place.expert + 1), *rows)
        sources[place] = Source(number, name, tensors[name], parts)
    return sources
