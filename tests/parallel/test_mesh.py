"""Every rank finds the groups that the layout's arithmetic says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel.ranks import run_ranks

from skymoe.parallel.mesh import Group, build_mesh, single_mesh
from skymoe.spec.layout import ExpertAxis, Layout, ScheduleKind
from skymoe.spec.split import Split


def sums_of_groups(layout: Layout) -> dict[str, tuple[tuple[int, ...], int]]:
    """What each group says: its ranks, and the sum of their world ranks as all-reduce finds it."""
    mesh = build_mesh(layout, torch.device("cpu"))

    def told(group: Group) -> tuple[tuple[int, ...], int]:
        value = torch.tensor(dist.get_rank())
        if group.handle is not None:
            dist.all_reduce(value, group=group.handle)
        assert group.ranks[group.rank] == dist.get_rank()
        return group.ranks, int(value)

    names = ("world", "pp", "dp", "tp", "dp_tp", "ends", "expert")
    return {name: told(getattr(mesh, name)) for name in names}


@pytest.mark.parametrize("expert", list(ExpertAxis))
@pytest.mark.parametrize(
    ("sizes", "schedule"), [((2, 2, 2), ScheduleKind.ONE_F_ONE_B), ((3, 1, 2), ScheduleKind.ZERO_BUBBLE)]
)
def test_groups(sizes: tuple[int, int, int], schedule: ScheduleKind, expert: ExpertAxis) -> None:
    pp, dp, tp = sizes
    stages = Split.remainder_first(14, pp * (2 if schedule is ScheduleKind.ZERO_BUBBLE else 1))
    layout = Layout(pp=pp, dp=dp, tp=tp, schedule=schedule, stages=stages, expert=expert)
    found: list[dict[str, Any]] = run_ranks(layout.world_size, sums_of_groups, layout)
    for rank, groups in enumerate(found):
        own = layout.coordinate(rank)
        assert all(total == sum(ranks) for ranks, total in groups.values())
        assert groups["tp"][0] == tuple(range(rank - own.tp, rank - own.tp + tp))
        assert groups["pp"][0] == tuple(layout.rank(own._replace(pp=other)) for other in range(pp))
        assert groups["dp"][0] == tuple(layout.rank(own._replace(dp=other)) for other in range(dp))
        assert groups["dp_tp"][0] == tuple(range(own.pp * dp * tp, (own.pp + 1) * dp * tp))
        assert groups["expert"][0][layout.expert_rank(own)] == rank
        at_an_end = own.pp in (0, pp - 1) and schedule is ScheduleKind.ONE_F_ONE_B
        assert len(groups["ends"][0]) == (2 if at_an_end else 1)


def test_a_world_of_one_needs_no_process_group() -> None:
    mesh = single_mesh(Layout(stages=Split((4,))), torch.device("cpu"))
    assert mesh.rank == 0 and mesh.world.handle is None and mesh.expert.size == 1
