"""Rows between the ranks of a group: started, then waited for; without autograd (that is parallel/collectives.py).

Three movements are enough, and all of them can be uneven and empty:

    exchange    all-to-all: part r of my rows goes to rank r
    gather      everybody gets everybody's rows
    reduce      everybody gets the sum of its own part of the rows: an exchange, then a local sum

The sum is formed here, in fp32 for narrower numbers and in the order of the ranks, rather than by the backend. So it
is the same bits in every run, on gloo and NCCL alike, a bf16 sum is rounded once, and no rank sends a byte more than
its rows (gloo's own reduce-scatter of uneven parts sends everything to everybody). An all-reduce is a reduce and a
gather, hence the same bits on every rank. What is given up: NCCL's reductions inside the switch.

A group of one rank moves nothing. Every rank of a group must make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from skymoe.ops.precision import wide_dtype
from skymoe.parallel.mesh import Group
from skymoe.parallel.traffic import Direction, Kind, Traffic
from skymoe.spec.split import Split


class Pending:
    """A result on its way. Until it is here, what was sent must not be changed."""

    def __init__(self, work: dist.Work | None, finish: Callable[[], Tensor | Pending]) -> None:
        self._work = work
        self._finish = finish
        self._result: Tensor | Pending | None = None

    def advance(self) -> None:
        """Where the way has two parts (an all-reduce): wait for the first and start the second."""
        if self._result is None:
            if self._work is not None:
                self._work.wait()
            self._result = self._finish()

    def wait(self) -> Tensor:
        """The result, here (on a GPU: before whatever this stream does next)."""
        self.advance()
        assert self._result is not None
        return self._result.wait() if isinstance(self._result, Pending) else self._result


def start_exchange(
    x_RD: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: Group,
    *,
    kind: Kind = Kind.ALL_TO_ALL,
    direction: Direction = Direction.FORWARD,
    traffic: Traffic | None = None,
) -> Pending:
    """Send the next `send_counts[r]` rows to each rank r; the result is what came, in the order of the ranks."""
    assert x_RD.shape[0] == sum(send_counts)
    if group.handle is None:
        return Pending(None, x_RD.detach)
    x_RD = x_RD.contiguous()
    if traffic is not None:
        traffic.add(kind, direction, (x_RD.shape[0] - send_counts[group.rank]) * _row_bytes(x_RD))
    out = x_RD.new_empty(sum(receive_counts), *x_RD.shape[1:])
    work = dist.all_to_all_single(out, x_RD, list(receive_counts), list(send_counts), group=group.handle, async_op=True)
    return Pending(work, lambda: out)


def start_gather(
    x_ND: Tensor,
    split: Split,
    group: Group,
    *,
    kind: Kind = Kind.ALL_GATHER,
    direction: Direction = Direction.FORWARD,
    traffic: Traffic | None = None,
) -> Pending:
    """All rows of all ranks; rank r has `split.sizes[r]` of them."""
    assert x_ND.shape[0] == split.sizes[group.rank] and split.num_ranks == group.size
    if group.handle is None or not split.num_units:
        return Pending(None, x_ND.detach)
    if not split.is_even:  # gloo's all-gather takes no uneven parts; its all-to-all does
        copies = x_ND.expand(group.size, *x_ND.shape).reshape(-1, *x_ND.shape[1:])
        counts = (x_ND.shape[0],) * group.size
        return start_exchange(copies, counts, split.sizes, group, kind=kind, direction=direction, traffic=traffic)
    if traffic is not None:
        traffic.add(kind, direction, (group.size - 1) * x_ND.shape[0] * _row_bytes(x_ND))
    out = x_ND.new_empty(split.num_units, *x_ND.shape[1:])
    work = dist.all_gather(list(out.split(x_ND.shape[0])), x_ND.contiguous(), group=group.handle, async_op=True)
    return Pending(work, lambda: out)


def start_reduce(
    x_ND: Tensor,
    split: Split,
    group: Group,
    *,
    kind: Kind = Kind.REDUCE_SCATTER,
    direction: Direction = Direction.FORWARD,
    traffic: Traffic | None = None,
) -> Pending:
    """The sum over the ranks of their rows `split.part(group.rank)`."""
    assert x_ND.shape[0] == split.num_units and split.num_ranks == group.size
    own = split.sizes[group.rank]
    coming = start_exchange(
        x_ND, split.sizes, (own,) * group.size, group, kind=kind, direction=direction, traffic=traffic
    )
    return Pending(None, lambda: _sum_in_order(coming.wait(), group.size))


def start_all_reduce(
    x: Tensor,
    group: Group,
    *,
    kind: Kind = Kind.ALL_REDUCE,
    direction: Direction = Direction.FORWARD,
    traffic: Traffic | None = None,
) -> Pending:
    """The sum over the ranks, the same bits on each: a reduce, and from `advance` or `wait` on a gather."""
    if group.handle is None:
        return Pending(None, x.detach)
    flat = x.reshape(-1)
    split = Split.remainder_first(flat.numel(), group.size)
    part = start_reduce(flat, split, group, kind=kind, direction=direction, traffic=traffic)

    def second_half() -> Pending:
        whole = start_gather(part.wait(), split, group, kind=kind, direction=direction, traffic=traffic)
        return Pending(None, lambda: whole.wait().view(x.shape))

    return Pending(None, second_half)


def _sum_in_order(x: Tensor, num_parts: int) -> Tensor:
    if num_parts == 1:
        return x
    first, *others = x.view(num_parts, x.shape[0] // num_parts, *x.shape[1:])
    total = first.to(wide_dtype(x.dtype), copy=True) if x.is_floating_point() else first.clone()
    for other in others:
        total += other
    return total.to(x.dtype)


def _row_bytes(x: Tensor) -> int:
    return torch.Size(x.shape[1:]).numel() * x.itemsize
