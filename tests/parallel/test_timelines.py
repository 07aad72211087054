"""Clocks that start at different times are laid on one axis."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from parallel.ranks import run_ranks

from skymoe.parallel.clock import Clock
from skymoe.parallel.mesh import build_mesh
from skymoe.parallel.timelines import whole_timeline
from skymoe.plan.timeline import Timeline
from skymoe.spec.layout import Layout
from skymoe.spec.split import Split


def one_after_the_other() -> Timeline | None:
    """Rank 0 works for a while and calls rank 1, which starts its clock only then. Both meet."""
    mesh = build_mesh(Layout(pp=2, stages=Split((2, 2))), torch.device("cpu"))
    clock, call = Clock(mesh.rank, mesh.device), torch.zeros(1)
    if mesh.rank == 1:
        dist.recv(call, 0)
    clock.begin()
    start = clock.mark()
    time.sleep(0.3)
    clock.add(mesh.rank, "F", 0, start)
    if mesh.rank == 0:
        dist.send(call, 1)
    clock.end()
    dist.all_reduce(call)
    clock.meet()
    return whole_timeline(clock, mesh)


def test_a_rank_that_starts_later_is_drawn_later():
    timeline, nothing = run_ranks(2, one_after_the_other)
    assert nothing is None
    first, second = timeline.spans
    assert (first.rank, second.rank) == (0, 1)
    assert first.start_s < 0.15 < second.start_s  # 0.3 s apart, less what the sum takes
    assert timeline.span_s >= second.end_s > first.end_s
