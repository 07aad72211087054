"""What ZeRO's shards are in a checkpoint: boxes of whole tensors, so that any other layout can read them.

model       <parameter>
optimizer   <parameter>/exp_avg, /exp_avg_sq; /step, a scalar, from the rank that has element 0;
            /master where the weights are narrower than fp32
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from skymoe.base.errors import CheckpointError
from skymoe.parallel.adamw import ShardState
from skymoe.parallel.flat import Flat
from skymoe.parallel.shards import Portion
from skymoe.weights.pieces import SavedPiece
from skymoe.weights.slices import Box

Read = Callable[[str, str, Box], Tensor | None]


def pieces(flat: Flat, state: ShardState) -> Iterator[SavedPiece]:
    """What this rank saves of a flat."""
    for number, portion in enumerate(state.portions):
        if not flat.plan.counts(portion):
            continue
        item = flat.plan.slices[portion.parameter]
        for stem, suffix, values in _tensors(flat, state, portion):
            for box, view in _views(flat, portion, values):
                yield SavedPiece(stem, item.name + suffix, item.whole_shape, box, view)
        if any(all(start == 0 for start, _ in found.whole) for found in flat.plan.boxes(portion)):
            yield SavedPiece("optimizer", f"{item.name}/step", (), (), state.steps[number])


def restore(flat: Flat, state: ShardState, read: Read) -> None:
    """Fill this rank's shards of a flat; what other ranks have is not touched.

    Raises:
        CheckpointError: weights are missing, or values are not what was asked for.
    """
    for number, portion in enumerate(state.portions):
        name = flat.plan.slices[portion.parameter].name
        tensors = {suffix: (stem, values) for stem, suffix, values in _tensors(flat, state, portion)}
        found = {
            suffix: _fill(flat, portion, read, stem, name + suffix, values)
            for suffix, (stem, values) in tensors.items()
        }
        if not found[""]:
            raise CheckpointError("the checkpoint has no such weights", where=name)
        step = read("optimizer", f"{name}/step", ())
        if step is not None and found["/exp_avg"] and found["/exp_avg_sq"]:
            _copy(state.steps[number], step, f"{name}/step")
        else:  # a parameter that is new
            for part in (state.steps[number], tensors["/exp_avg"][1], tensors["/exp_avg_sq"][1]):
                part.zero_()
        if not found.get("/master", True):
            tensors["/master"][1].copy_(tensors[""][1])


def _tensors(flat: Flat, state: ShardState, portion: Portion) -> list[tuple[str, str, Tensor]]:
    """File, suffix of the name, and values of a portion, flat."""
    found = [
        ("model", "", flat.weights[flat.plan.place(portion)]),
        ("optimizer", "/exp_avg", state.exp_avg[portion.state]),
        ("optimizer", "/exp_avg_sq", state.exp_avg_sq[portion.state]),
    ]
    return found + ([("optimizer", "/master", state.master[portion.state])] if state.master is not None else [])


def _views(flat: Flat, portion: Portion, values: Tensor) -> Iterator[tuple[Box, Tensor]]:
    for found in flat.plan.boxes(portion):
        yield found.whole, values[found.elements].view(found.shape)[found.within]


def _fill(flat: Flat, portion: Portion, read: Read, stem: str, name: str, values: Tensor) -> bool:
    """Whether the checkpoint has the tensor."""
    for box, view in _views(flat, portion, values):
        given = read(stem, name, box)
        if given is None:
            return False
        _copy(view, given, name)
    return True


def _copy(into: Tensor, given: Tensor, name: str) -> None:
    if given.shape != into.shape or given.dtype != into.dtype:
        raise CheckpointError(
            f"{name} is {given.dtype} {list(given.shape)}, expected {into.dtype} {list(into.shape)}",
            hint="resume with the precision.weights of the run that wrote it",
        )
    into.copy_(given)
