"""Collectives and hops between ranks, as the runtime makes them (parallel/transport.py), at several sizes.

Always by the wall's clock: waiting is what they are about. All ranks begin together (a barrier), and a time is that of
the slowest: what a collective costs a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from skymoe.parallel.mesh import Group
from skymoe.parallel.transport import start_all_reduce, start_exchange, start_gather, start_reduce
from skymoe.plan.hardware.profile import LinkFit, LinkKind
from skymoe.profile.fits import fit_line
from skymoe.spec.split import Split

_SIZES = tuple(4**power for power in range(5, 12))  # floats: 4 KiB to 16 MiB
_WARM_UP = 2


def measure_links(group: Group, device: torch.device, rounds: int, told: Callable[[str], None]) -> dict[str, LinkFit]:
    """Of `group`; every rank gets the same."""
    calls = {kind: _call(kind, group) for kind in LinkKind}
    seconds: dict[tuple[LinkKind, int], list[float]] = {}
    for number in range(_WARM_UP + rounds):
        told("links")
        for kind, call in calls.items():
            for size in _SIZES:
                took = _slowest(call, torch.zeros(size // group.size * group.size, device=device), group)
                if number >= _WARM_UP:
                    seconds.setdefault((kind, size), []).append(took)
    return {kind.value: _fit(kind, group.size, seconds) for kind in LinkKind}


def factor(kind: LinkKind, ranks: int) -> float:
    """Of the bytes, those that a rank sends."""
    if kind is LinkKind.P2P:
        return 1.0
    share = (ranks - 1) / ranks
    return 2 * share if kind is LinkKind.ALL_REDUCE else share


def _fit(kind: LinkKind, ranks: int, seconds: Mapping[tuple[LinkKind, int], list[float]]) -> LinkFit:
    points = [(4.0 * (size // ranks * ranks), statistics.median(seconds[kind, size])) for size in _SIZES]
    sent = factor(kind, ranks)
    line = fit_line([(sent * size, t) for size, t in points])
    return LinkFit(latency_s=line.start, bandwidth=line.rate, points=tuple(points), error=line.error)


def _slowest(call: Callable[[Tensor], None], x: Tensor, group: Group) -> float:
    dist.barrier(group=group.handle)
    start = time.perf_counter()
    call(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    took = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=x.device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX, group=group.handle)
    return float(took)


def _call(kind: LinkKind, group: Group) -> Callable[[Tensor], None]:
    def run(x: Tensor) -> None:
        share = Split((x.numel() // group.size,) * group.size)
        match kind:
            case LinkKind.ALL_REDUCE:
                start_all_reduce(x, group).wait()
            case LinkKind.ALL_GATHER:
                start_gather(x[: share.sizes[0]], share, group).wait()
            case LinkKind.REDUCE_SCATTER:
                start_reduce(x, share, group).wait()
            case LinkKind.ALL_TO_ALL:
                start_exchange(x, share.sizes, share.sizes, group).wait()
            case LinkKind.P2P:
                _around(x, group)

    return run


def _around(x: Tensor, group: Group) -> None:
    """Every rank sends to the next one and receives from the one before: a hop, as in the middle of a pipeline."""
    here, there = torch.empty_like(x), (group.rank + 1) % group.size
    ops = [
        dist.P2POp(dist.isend, x, group.ranks[there], group=group.handle),
        dist.P2POp(dist.irecv, here, group.ranks[group.rank - 1], group=group.handle),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
