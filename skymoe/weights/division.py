"""Which rank of a layout saves which boxes of each parameter, so that together they save everything once. No torch.

A tensor that several ranks have alike is saved by one of them (tp 0), or divided among them: what all dp ranks have is
cut into runs of equal numbers of elements of the local tensor, one for each, which spreads the work of a save as ZeRO-1
spreads the optimizer's. Reading is by box, so any other division would do as well; `parallel.zero` has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from skymoe.spec.layout import Coordinate, Layout
from skymoe.spec.model import ModelSpec
from skymoe.spec.split import Split
from skymoe.weights.slices import Box, Slice, flat_boxes, intersect, owned_slices, to_whole


class Share(NamedTuple):
    """A box of a whole tensor, and the rank that saves it."""

    rank: int
    box: Box


def divide(spec: ModelSpec, layout: Layout, *, zero_shards: bool = True) -> dict[str, list[Share]]:
    """The shares of every parameter and buffer, by module name; they cover each exactly once.

    Args:
        spec: the model.
        layout: the ranks.
        zero_shards: divide what all dp ranks have among them; otherwise dp 0 saves it.
    """
    found: dict[str, list[Share]] = {}
    for rank in range(layout.world_size):
        coordinate = layout.coordinate(rank)
        for stage in layout.stages_of(coordinate.pp):
            for name, owned in owned_slices(spec, layout, coordinate, stage).items():
                if _is_saved_here(owned, coordinate, stage):
                    boxes = _boxes(owned, coordinate.dp, layout.dp if owned.reduced else 1, zero_shards)
                    found.setdefault(name, []).extend(Share(rank, box) for box in boxes)
    return found


def layout_document(layout: Layout) -> dict[str, Any]:
    """The layout for a manifest, to be read by people: a generation can be read without it."""
    return {
        "world_size": layout.world_size,
        "pp": layout.pp,
        "dp": layout.dp,
        "tp": layout.tp,
        "expert": layout.expert.value,
        "dispatch": layout.dispatch.value,
        "schedule": layout.schedule.value,
        "stages": [size / 2 for size in layout.stages.sizes],
        "recompute": list(layout.recompute),
    }


def _is_saved_here(owned: Slice, coordinate: Coordinate, stage: int) -> bool:
    if owned.name == "embed.weight" and stage != 0:
        return False  # the tied head's copy
    return coordinate.tp == 0 or not owned.replicated


def _boxes(owned: Slice, part: int, parts: int, zero_shards: bool) -> Iterator[Box]:
    """Boxes of the whole tensor: this dp rank's part of the rank's tensor."""
    if parts == 1 or not zero_shards:
        yield from (piece.whole for piece in owned.pieces if part == 0 or parts == 1)
        return
    mine = Split.remainder_first(owned.num_elements, parts).part(part)
    for local in flat_boxes(owned.shape, mine.start, mine.stop):
        for piece in owned.pieces:
            shared = intersect(local, piece.local)
            if shared is not None:
                yield to_whole(piece, shared)
