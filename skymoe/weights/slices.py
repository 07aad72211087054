"""Which part of each tensor a rank owns, by Splits. The one table that the modules, the optimizer, the checkpoints and
the dry run read; no torch.

A rank's tensor is made of *pieces*, boxes of the whole tensor laid side by side. Nearly always there is one; where
experts are cut by tensor parallelism (etp), `gate_up` has two, because its rows are the gate's and then the up's.

    name in the module            cut over tp                          replicated over tp
    embed, head                   rows (vocabulary)
    attention.{q,k,v}             rows (key/value groups)
    attention.o                   columns; its bias lives on tp 0
    attention.{q,k}_norm          over all heads: rows                 per head: as it is
    mlp, moe.shared               gate, up: rows; down: columns, its bias on tp 0
    moe.experts                   by the expert axis; etp: the inner width too
    norms, router, shared_gate                                         as they are

A replicated parameter sees only a part of the tokens, or of the heads, on each tp rank in some layouts; then its
gradient is *partial* over tp and must be summed before anything else (research: the router gradient that TP + EP
forgets). In mode R routers and norms see everything and must not be summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from skymoe.spec.layout import Coordinate, ExpertAxis, Layout
from skymoe.spec.model import ModelSpec, QkNorm
from skymoe.spec.split import Split
from skymoe.weights.names import parameter_shapes

Box = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A box of the whole tensor, and where it lies in the rank's tensor. Both have the same extents."""

    whole: Box
    local: Box


@dataclass(frozen=True)
class Slice:
    """What a rank has of one parameter or buffer.

    Attributes:
        name: in the module of the whole model.
        whole_shape: of the whole tensor.
        shape: of the rank's tensor.
        pieces: they fill the rank's tensor exactly, without overlap.
        replicated: every tp rank has the same values; tp 0 counts and saves them.
        partial: the gradient must be summed over tp.
        reduced: the gradient must be summed over dp (and the optimizer state may be divided over it); False where the
            expert axis covers dp, so that no other rank has these experts.
        is_buffer: no gradient, no optimizer state.
    """

    name: str
    whole_shape: tuple[int, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replicated: bool = False
    partial: bool = False
    reduced: bool = True
    is_buffer: bool = False

    @property
    def num_elements(self) -> int:
        """Elements of the rank's tensor."""
        return volume(tuple((0, size) for size in self.shape))


def owned_slices(spec: ModelSpec, layout: Layout, coordinate: Coordinate, stage: int) -> dict[str, Slice]:
    """Every parameter and buffer that the rank has in `stage`, by module name, in model order.

    With tied embeddings `embed.weight` is in the first stage and in the last.
    """
    layout.check(spec)
    found = {}
    for name, shape in parameter_shapes(spec).items():
        if _is_in_stage(name, spec, layout, stage):
            slice_ = _slice(name, shape, spec, layout, coordinate)
            if slice_ is not None:
                found[name] = slice_
    return found


def volume(box: Box) -> int:
    """Elements in a box; 1 for a scalar."""
    count = 1
    for start, stop in box:
        count *= stop - start
    return count


def intersect(one: Box, other: Box) -> Box | None:
    """What two boxes share, or None."""
    box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return box if all(start < stop for start, stop in box) else None


def shifted(box: Box, offsets: tuple[int, ...]) -> Box:
    """The box moved by `offsets`."""
    return tuple((start + by, stop + by) for (start, stop), by in zip(box, offsets, strict=True))


def to_whole(piece: Piece, local: Box) -> Box:
    """A box within `piece.local`, in the coordinates of the whole tensor."""
    return shifted(local, tuple(w[0] - own[0] for w, own in zip(piece.whole, piece.local, strict=True)))


def to_local(piece: Piece, whole: Box) -> Box:
    """A box within `piece.whole`, in the coordinates of the rank's tensor."""
    return shifted(whole, tuple(own[0] - w[0] for w, own in zip(piece.whole, piece.local, strict=True)))


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a row-major tensor as boxes, in order: at most two per dimension, less one."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = volume(tuple((0, size) for size in shape[1:]))
    first, last = start // inner, (stop - 1) // inner
    if first == last or len(shape) == 1:
        if len(shape) == 1:
            yield ((start, stop),)
        else:
            for box in flat_boxes(shape[1:], start - first * inner, stop - first * inner):
                yield ((first, first + 1), *box)
        return
    if start % inner:
        for box in flat_boxes(shape[1:], start - first * inner, inner):
            yield ((first, first + 1), *box)
        first += 1
    tail = stop % inner
    whole_end = last if tail else last + 1
    if first < whole_end:
        yield ((first, whole_end), *((0, size) for size in shape[1:]))
    if tail:
        for box in flat_boxes(shape[1:], 0, tail):
            yield ((last, last + 1), *box)


def _is_in_stage(name: str, spec: ModelSpec, layout: Layout, stage: int) -> bool:
    first, last = stage == 0, stage == layout.num_stages - 1
    parts = name.split(".")
    if parts[0] == "embed":
        return first or (last and spec.tie_embeddings)
    if parts[0] in ("norm", "head"):
        return last
    is_ffn = parts[2] in ("ffn_norm", "mlp", "moe")
    return 2 * int(parts[1]) + is_ffn in layout.stages.part(stage)


def _slice(name: str, shape: tuple[int, ...], spec: ModelSpec, layout: Layout, coordinate: Coordinate) -> Slice | None:
    """The rank's slice of one tensor; None where only tp 0 has it."""
    path = [part for part in name.split(".") if not part.isdigit() and part != "layers"]
    room, leaf = ".".join(path[:-1]), path[-1]
    if room == "moe.experts":
        return _expert_slice(name, shape, layout, coordinate)
    if room == "moe.router":
        partial = layout.sequence_parallel and leaf == "weight"
        return _replicated(name, shape, partial=partial, is_buffer=leaf == "expert_bias")
    split, axis = _cut(room, leaf, shape, spec, layout)
    if split is not None:
        return _cut_slice(name, shape, split, axis, coordinate.tp)
    if leaf == "bias":  # of a projection whose inputs are cut: the sum over tp must have it once
        return _cut_slice(name, shape, Split((shape[0],)), 0, 0) if coordinate.tp == 0 else None
    per_head = room.endswith(("q_norm", "k_norm"))
    return _replicated(name, shape, partial=layout.tp > 1 and (layout.sequence_parallel or per_head))


def _cut(room: str, leaf: str, shape: tuple[int, ...], spec: ModelSpec, layout: Layout) -> tuple[Split | None, int]:
    """How a tensor outside the experts is divided over tp, and along which axis; None where it is not."""
    if room in ("embed", "head"):
        return layout.vocabulary(spec), 0
    groups = layout.heads(spec)
    query = groups.scaled(spec.num_heads // spec.num_kv_heads * spec.head_dim)
    key = groups.scaled(spec.head_dim)
    match room.split("."):
        case ["attention", "q"]:
            return query, 0
        case ["attention", "k" | "v"]:
            return key, 0
        case ["attention", "o"]:
            return (query, 1) if leaf == "weight" else (None, 0)
        case ["attention", "q_norm" | "k_norm" as which] if spec.qk_norm is QkNorm.FULL:
            return (query if which == "q_norm" else key), 0
        case ["mlp", "gate" | "up"] | ["moe", "shared", "gate" | "up"]:
            return layout.ffn(shape[0]), 0
        case ["mlp", "down"] | ["moe", "shared", "down"]:
            return (layout.ffn(shape[1]), 1) if leaf == "weight" else (None, 0)
    return None, 0


def _cut_slice(name: str, shape: tuple[int, ...], split: Split, axis: int, rank: int) -> Slice:
    part = split.part(rank)
    whole = tuple((part.start, part.stop) if dim == axis else (0, size) for dim, size in enumerate(shape))
    return _from_boxes(name, shape, (whole,), axis)


def _replicated(name: str, shape: tuple[int, ...], *, partial: bool, is_buffer: bool = False) -> Slice:
    box = tuple((0, size) for size in shape)
    return Slice(name, shape, shape, (Piece(box, box),), replicated=True, partial=partial, is_buffer=is_buffer)


def _expert_slice(name: str, shape: tuple[int, ...], layout: Layout, coordinate: Coordinate) -> Slice:
    mine = layout.experts(shape[0]).part(layout.expert_rank(coordinate))
    experts = (mine.start, mine.stop)
    reduced = layout.expert is ExpertAxis.EDP
    if layout.expert is not ExpertAxis.ETP:
        return _from_boxes(name, shape, ((experts, (0, shape[1]), (0, shape[2])),), 0, reduced=reduced)
    if name.endswith("down"):
        columns = layout.ffn(shape[2]).part(coordinate.tp)
        return _from_boxes(name, shape, ((experts, (0, shape[1]), (columns.start, columns.stop)),), 2, reduced=reduced)
    size = shape[1] // 2
    rows = layout.ffn(size).part(coordinate.tp)
    boxes = tuple((experts, (base + rows.start, base + rows.stop), (0, shape[2])) for base in (0, size))
    return _from_boxes(name, shape, boxes, 1, reduced=reduced)


def _from_boxes(
    name: str, whole_shape: tuple[int, ...], boxes: tuple[Box, ...], axis: int, *, reduced: bool = True
) -> Slice:
    """Boxes of equal extents, side by side along `axis`."""
    pieces, offset = [], 0
    for box in boxes:
        extents = [stop - start for start, stop in box]
        local = tuple((offset, offset + size) if dim == axis else (0, size) for dim, size in enumerate(extents))
        offset += extents[axis]
        pieces.append(Piece(box, local))
    shape = tuple(offset if dim == axis else stop - start for dim, (start, stop) in enumerate(boxes[0]))
    return Slice(name, whole_shape, shape, tuple(pieces), reduced=reduced)
