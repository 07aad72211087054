"""Where every parameter lies in the flat buffers of ZeRO, and who has which part of it: arithmetic only, no torch.

    flat        parameters of one stage, one after the other in one buffer; two per stage: those that all dp ranks have
                (their optimizer state is divided), and those that no other dp rank has (experts under ep and etp)
    bucket      a range of a flat, what travels in one collective; parameters may lie across its ends
    shard       a bucket divided by dp: what one rank updates
    portion     what a shard has of one parameter: a range of its elements in row-major order

Parameters begin at multiples of 64 elements: kernels want aligned pointers, and since shards begin at such multiples
too, the vectorized update treats an element alike in every division (the bits do not depend on dp). Parameters whose
gradient is partial over tp come first, so that their sum is one all-reduce of one range. A table of tied embeddings is
a flat of its own: cut alike at both ends of the pipeline, its shards can be added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from skymoe.spec.layout import Coordinate, Layout
from skymoe.weights.slices import Box, Slice, flat_boxes, intersect, shifted, to_whole, volume

ALIGNMENT = 64
"""Elements; parameters and shards begin at multiples of it."""

SHARD_BYTES = 8 << 20
"""Gradients of a rank's shard of a bucket, at most: large for a message, small enough that buckets overlap well."""

UNDIVIDED = 32
"""Shards in a bucket that does not travel: it only bounds what an update needs beside the buffers."""


class Bucket(NamedTuple):
    """Elements [start, stop) of a flat; this rank's shard of them; where that lies in the rank's state of the flat."""

    start: int
    stop: int
    own: slice
    state: slice


class Portion(NamedTuple):
    """Elements of one parameter in one shard.

    Attributes:
        parameter: its place in the flat.
        bucket: index of the bucket.
        start: the first element, counted in the rank's tensor in row-major order.
        state: where the elements lie in the rank's state of the flat.
    """

    parameter: int
    bucket: int
    start: int
    state: slice

    @property
    def size(self) -> int:
        """How many there are."""
        return self.state.stop - self.state.start


class PortionBox(NamedTuple):
    """A box of the whole tensor that lies in a portion.

    Attributes:
        whole: the box.
        elements: the range of the portion that `within` is a part of.
        shape: in which to view that range.
        within: the part of the view that holds the box.
    """

    whole: Box
    elements: slice
    shape: tuple[int, ...]
    within: tuple[slice, ...]


@dataclass(frozen=True)
class FlatPlan:
    """One flat buffer.

    Attributes:
        stages: own stages that have these parameters; two only for a tied table whose stages are on one rank.
        slices: of the parameters, in the order of the buffer.
        offsets: the first element of each.
        size: elements of the buffer, padding included.
        num_partial: elements at its beginning that must be summed over tp.
        num_shards, shard: the division over dp, and this rank's part; 1 and 0 where no other dp rank has them.
        shared_by_ends: a tied table whose other stage is on another rank.
        is_counted: False for the second copy of a tied table.
        counts_replicated: whether this rank counts and saves what all tp ranks have.
        buckets: in the order in which they travel.
    """

    stages: tuple[int, ...]
    slices: tuple[Slice, ...]
    offsets: tuple[int, ...]
    size: int
    num_partial: int
    num_shards: int
    shard: int
    shared_by_ends: bool
    is_counted: bool
    counts_replicated: bool
    buckets: tuple[Bucket, ...]

    @property
    def state_size(self) -> int:
        """Elements of this rank's shards."""
        return self.size // self.num_shards

    def counts(self, portion: Portion) -> bool:
        """Whether this rank counts the portion in sums over all ranks, and saves it."""
        return self.is_counted and (self.counts_replicated or not self.slices[portion.parameter].replicated)

    def place(self, portion: Portion) -> slice:
        """Where the portion lies in the whole buffer."""
        start = self.offsets[portion.parameter] + portion.start
        return slice(start, start + portion.size)

    def portions(self) -> tuple[Portion, ...]:
        """What this rank updates, bucket by bucket."""
        ends = [offset + item.num_elements for offset, item in zip(self.offsets, self.slices, strict=True)]
        found = []
        for number, bucket in enumerate(self.buckets):
            for index, (begin, end) in enumerate(zip(self.offsets, ends, strict=True)):
                start, stop = max(begin, bucket.own.start), min(end, bucket.own.stop)
                if start < stop:
                    at = bucket.state.start + start - bucket.own.start
                    found.append(Portion(index, number, start - begin, slice(at, at + stop - start)))
        return tuple(found)

    def counted(self) -> list[slice]:
        """Ranges of the buffer that this rank counts; neighbours are one, as the padding between them is zero."""
        runs: list[slice] = []
        before: tuple[int, int] | None = None
        for portion in self.portions():
            key = (portion.bucket, portion.parameter)
            place = self.place(portion)
            if not self.counts(portion):
                before = None
                continue
            if before == (key[0], key[1] - 1):  # of another bucket, other ranks' shards would lie between
                place = slice(runs.pop().start, place.stop)
            runs.append(place)
            before = key
        return runs

    def boxes(self, portion: Portion) -> Iterator[PortionBox]:
        """The portion as boxes of the whole tensor."""
        item = self.slices[portion.parameter]
        at = 0
        for local in flat_boxes(item.shape, portion.start, portion.start + portion.size):
            size, shape = volume(local), tuple(end - start for start, end in local)
            for piece in item.pieces:
                shared = intersect(piece.local, local)
                if shared is not None:
                    within = shifted(shared, tuple(-start for start, _ in local))
                    yield PortionBox(
                        to_whole(piece, shared), slice(at, at + size), shape, tuple(slice(*edge) for edge in within)
                    )
            at += size


def plan_flats(
    stages: Mapping[int, Mapping[str, Slice]],
    layout: Layout,
    coordinate: Coordinate,
    *,
    tied: Collection[str],
    shard_elements: int,
) -> list[FlatPlan]:
    """The flat buffers of a rank, in the order of the stages.

    Args:
        stages: what the rank has of each parameter, by stage and name; buffers are left out.
        layout: the division.
        coordinate: of the rank.
        tied: names that the first and the last stage share.
        shard_elements: of a rank's shard of a bucket, at most (one alignment at least).
    """
    last = layout.num_stages - 1
    ends, names = ((0, last), frozenset(tied)) if last > 0 else ((), frozenset[str]())
    found = []
    for stage, slices in stages.items():
        parameters = [item for item in slices.values() if not item.is_buffer]
        twice = [item for item in parameters if stage in ends and item.name in names]
        owners = tuple(other for other in ends if other in stages)
        if twice and stage == owners[0]:
            found.append(_plan(twice, owners, layout, coordinate, shard_elements, is_tied=True))
        for reduced in (True, False):
            chosen = [item for item in parameters if item not in twice and item.reduced is reduced]
            if chosen:
                found.append(_plan(chosen, (stage,), layout, coordinate, shard_elements, is_tied=False))
    return found


def _plan(
    slices: Sequence[Slice],
    stages: tuple[int, ...],
    layout: Layout,
    coordinate: Coordinate,
    shard_elements: int,
    *,
    is_tied: bool,
) -> FlatPlan:
    ordered = tuple(sorted(slices, key=lambda item: not item.partial))
    edges = list(accumulate((_up(item.num_elements, ALIGNMENT) for item in ordered), initial=0))
    num_shards, shard = (layout.dp, coordinate.dp) if ordered[0].reduced else (1, 0)
    unit = ALIGNMENT * num_shards
    size, step = _up(edges[-1], unit), max(shard_elements // ALIGNMENT, 1) * unit
    step *= UNDIVIDED if num_shards == 1 else 1
    return FlatPlan(
        stages=stages,
        slices=ordered,
        offsets=tuple(edges[:-1]),
        size=size,
        num_partial=edges[sum(item.partial for item in ordered)],
        num_shards=num_shards,
        shard=shard,
        shared_by_ends=is_tied and len(stages) == 1,
        is_counted=not is_tied or 0 in stages,
        counts_replicated=coordinate.tp == 0,
        buckets=tuple(_bucket(start, min(start + step, size), num_shards, shard) for start in range(0, size, step)),
    )


def _bucket(start: int, stop: int, num_shards: int, shard: int) -> Bucket:
    share = (stop - start) // num_shards
    own, state = start + shard * share, start // num_shards
    return Bucket(start, stop, slice(own, own + share), slice(state, state + share))


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
