"""The groups of ranks that talk to each other.

One `DeviceMesh` (pp, dp, tp), and beside its axes the groups that are no axis: dp x tp (the expert axis of `ep`) and
the two ends of a pipeline (which share the table of tied embeddings). A group of one rank has no process group at
all, so that the same code runs where there are no other ranks, and none has been initialised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from skymoe.spec.layout import Coordinate, ExpertAxis, Layout


class Group(NamedTuple):
    """Ranks that exchange tensors.

    Attributes:
        ranks: global ranks, in the order of their place in the group.
        rank: this rank's place.
        handle: torch's group; None for a single rank.
    """

    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)


def alone(rank: int) -> Group:
    """The group that is just this rank: every collective is the identity."""
    return Group((rank,), 0, None)


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands, and its groups.

    Attributes:
        layout: the division.
        coordinate: of this rank.
        device: of its tensors.
        axes: torch's mesh; None in a world of one.
        world, pp, dp, tp: everybody, and the ranks that differ in one coordinate only.
        dp_tp: the ranks of the same pipeline rank, tp varying fastest.
        ends: the owners of the first and the last stage of this rank's pipeline; a single rank under zbv, for pp 1, and
            on ranks between the ends.
    """

    layout: Layout
    coordinate: Coordinate
    device: torch.device
    axes: DeviceMesh | None
    world: Group
    pp: Group
    dp: Group
    tp: Group
    dp_tp: Group
    ends: Group

    @property
    def rank(self) -> int:
        """This rank in the world."""
        return self.layout.rank(self.coordinate)

    @property
    def expert(self) -> Group:
        """The ranks over which the experts of a layer are divided (`Layout.expert_rank` is the place in it)."""
        return {ExpertAxis.EDP: self.tp, ExpertAxis.EP: self.dp_tp, ExpertAxis.ETP: self.dp}[self.layout.expert]


def single_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The mesh of a world of one rank."""
    group = alone(0)
    return Mesh(layout, Coordinate(0, 0, 0), device, None, group, group, group, group, group, group)


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The groups of this rank; every rank of the initialised world calls it with the same layout."""
    if layout.world_size == 1:
        return single_mesh(layout, device)
    rank, size = dist.get_rank(), dist.get_world_size()
    assert size == layout.world_size
    coordinate = layout.coordinate(rank)
    axes = init_device_mesh(device.type, (layout.pp, layout.dp, layout.tp), mesh_dim_names=("pp", "dp", "tp"))
    whole = [layout.coordinate(other) for other in range(size)]

    def axis(name: str) -> Group:
        fixed = [field for field in ("pp", "dp", "tp") if field != name]
        ranks = tuple(r for r, c in enumerate(whole) if all(getattr(c, f) == getattr(coordinate, f) for f in fixed))
        return Group(ranks, ranks.index(rank), axes.get_group(name) if len(ranks) > 1 else None)

    planes = [tuple(r for r, c in enumerate(whole) if c.pp == pp) for pp in range(layout.pp)]
    first, last = layout.stage_owner(0), layout.stage_owner(layout.num_stages - 1)
    ends = [
        tuple(layout.rank(Coordinate(pp, dp, tp)) for pp in (first, last))
        for dp in range(layout.dp) for tp in range(layout.tp) if first != last
    ]  # fmt: skip
    return Mesh(
        layout=layout,
        coordinate=coordinate,
        device=device,
        axes=axes,
        world=Group(tuple(range(size)), rank, dist.group.WORLD),
        pp=axis("pp"),
        dp=axis("dp"),
        tp=axis("tp"),
        dp_tp=_own(planes, rank),
        ends=_own(ends, rank),
    )


def _own(groups: list[tuple[int, ...]], rank: int) -> Group:
    """Create every group (a collective act of the world) and return this rank's; alone where it is in none."""
    own = alone(rank)
    for ranks in groups:
        if len(ranks) < 2:
            continue
        handle = dist.new_group(list(ranks))
        if rank in ranks:
            own = Group(ranks, ranks.index(rank), handle)
    return own
