"""Collectives that autograd understands. Each is linear, so its gradient is the adjoint movement:

    sum_forward     all-reduce           <->  identity          partial outputs -> whole output
    sum_backward    identity             <->  all-reduce        whole input -> partial uses of it
    gather_rows     all-gather           <->  reduce-scatter
    scatter_rows    reduce-scatter       <->  all-gather
    exchange_rows   all-to-all           <->  the all-to-all back

`sum_forward` and `sum_backward` are Megatron's g and f. What their gradients mean depends on who computes what: a loss
that every rank computes alike from the output of `sum_forward` is *one* loss, so its gradient passes unchanged; a
tensor that all ranks hold alike and each uses for its own part needs its gradients summed.

Nothing is saved for the backward pass but sizes. Parts may be uneven and empty, any dtype that is summed exactly once
per element (parallel/transport.py); a group of one rank is the identity. Gradients of gradients are not offered.

A collective can be split in two, so that something else happens in between: `start_..` returns a `Coming`, and
`arrived(coming)` the tensor. In the backward pass the roles are exchanged: `arrived` starts the adjoint movement and
`start_..` waits for it. So what lies between the two in the forward pass also hides the way back.

Shapes: N rows of a rank or of all, R rows sent or received, D columns (any trailing dims).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skymoe.parallel.mesh import Group
from skymoe.parallel.traffic import Direction, Kind, Traffic
from skymoe.parallel.transport import Pending, start_all_reduce, start_exchange, start_gather, start_reduce
from skymoe.spec.split import Split

_Start = Callable[[Tensor, Direction], Pending]


def sum_forward(x: Tensor, group: Group, traffic: Traffic | None = None) -> Tensor:
    """The sum over the ranks of the group; the gradient passes unchanged."""
    return arrived(start_sum_forward(x, group, traffic))


def sum_backward(x: Tensor, group: Group, traffic: Traffic | None = None) -> Tensor:
    """The same values; their gradient is summed over the ranks of the group."""
    return arrived(start_sum_backward(x, group, traffic))


def gather_rows(
    x_ND: Tensor, split: Split, group: Group, traffic: Traffic | None = None, kind: Kind = Kind.ALL_GATHER
) -> Tensor:
    """The rows of all ranks, of which rank r has `split.sizes[r]`; the gradient is reduce-scattered."""
    return arrived(start_gather_rows(x_ND, split, group, traffic, kind))


def scatter_rows(
    x_ND: Tensor, split: Split, group: Group, traffic: Traffic | None = None, kind: Kind = Kind.REDUCE_SCATTER
) -> Tensor:
    """The sum over the ranks of their rows `split.part(group.rank)`; the gradient is all-gathered."""
    return arrived(start_scatter_rows(x_ND, split, group, traffic, kind))


def exchange_rows(
    x_RD: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: Group,
    traffic: Traffic | None = None,
    kind: Kind = Kind.ALL_TO_ALL,
) -> Tensor:
    """Send the next `send_counts[r]` rows to rank r and get `receive_counts[r]` of each, in the order of the ranks."""
    return arrived(start_exchange_rows(x_RD, send_counts, receive_counts, group, traffic, kind))


def gather_counts(counts: Tensor, group: Group, traffic: Traffic | None = None) -> Tensor:
    """Whole numbers of every rank, (C,) -> (ranks, C); every rank gives equally many. No gradient."""
    split = Split((1,) * group.size)
    return start_gather(counts.detach()[None], split, group, kind=Kind.METADATA, traffic=traffic).wait()


@dataclass
class _Movement:
    """A collective and its adjoint; `pending` is the one under way."""

    forward: _Start
    backward: _Start
    pending: Pending | None = None

    def wait(self) -> Tensor:
        assert self.pending is not None, "a gradient arrived before its movement was started"
        pending, self.pending = self.pending, None
        return pending.wait()


@dataclass(frozen=True)
class Coming:
    """Rows on their way; `arrived` gives them, exactly once."""

    ticket: Tensor
    movement: _Movement | None

    def advance(self) -> None:
        """Let the second half of an all-reduce begin."""
        if self.movement is not None and self.movement.pending is not None:
            self.movement.pending.advance()

    def settle(self) -> None:
        """Wait now, take later."""
        if self.movement is not None and self.movement.pending is not None:
            self.movement.pending.wait()


class _Begin(torch.autograd.Function):
    """Starts the forward movement; waits for the backward one. Between the two ends only an empty ticket passes."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, movement: _Movement) -> Tensor:
        ctx.movement = movement
        movement.pending = movement.forward(x_ND, Direction.FORWARD)
        return x_ND.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.movement.wait(), None


class _End(torch.autograd.Function):
    """Waits for the forward movement; starts the backward one."""

    @staticmethod
    def forward(ctx, ticket: Tensor, movement: _Movement) -> Tensor:
        ctx.movement, ctx.ticket_shape = movement, ticket.shape
        return movement.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None]:
        ctx.movement.pending = ctx.movement.backward(grad_ND, Direction.BACKWARD)
        return grad_ND.new_empty(ctx.ticket_shape), None


def _begin(x_ND: Tensor, group: Group, movement: _Movement) -> Coming:
    return Coming(x_ND, None) if group.handle is None else Coming(_Begin.apply(x_ND, movement), movement)


def arrived(coming: Coming) -> Tensor:
    """The rows, once they are here."""
    return coming.ticket if coming.movement is None else _End.apply(coming.ticket, coming.movement)


def start_sum_forward(x: Tensor, group: Group, traffic: Traffic | None = None) -> Coming:
    """`sum_forward`, begun."""
    return _begin(x, group, _Movement(
        lambda x, way: start_all_reduce(x, group, direction=way, traffic=traffic),
        lambda x, way: Pending(None, lambda: x),
    ))  # fmt: skip


def start_sum_backward(x: Tensor, group: Group, traffic: Traffic | None = None, kind: Kind = Kind.ALL_REDUCE) -> Coming:
    """`sum_backward`; only its gradient is ever on its way."""
    return _begin(x, group, _Movement(
        lambda x, way: Pending(None, x.detach),
        lambda x, way: start_all_reduce(x, group, kind=kind, direction=way, traffic=traffic),
    ))  # fmt: skip


def start_gather_rows(
    x_ND: Tensor, split: Split, group: Group, traffic: Traffic | None = None, kind: Kind = Kind.ALL_GATHER
) -> Coming:
    """`gather_rows`, begun."""
    back = Kind.REDUCE_SCATTER if kind is Kind.ALL_GATHER else kind
    return _begin(x_ND, group, _Movement(
        lambda x, way: start_gather(x, split, group, kind=kind, direction=way, traffic=traffic),
        lambda x, way: start_reduce(x, split, group, kind=back, direction=way, traffic=traffic),
    ))  # fmt: skip


def start_scatter_rows(
    x_ND: Tensor, split: Split, group: Group, traffic: Traffic | None = None, kind: Kind = Kind.REDUCE_SCATTER
) -> Coming:
    """`scatter_rows`, begun."""
    back = Kind.ALL_GATHER if kind is Kind.REDUCE_SCATTER else kind
    return _begin(x_ND, group, _Movement(
        lambda x, way: start_reduce(x, split, group, kind=kind, direction=way, traffic=traffic),
        lambda x, way: start_gather(x, split, group, kind=back, direction=way, traffic=traffic),
    ))  # fmt: skip


def start_exchange_rows(
    x_RD: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: Group,
    traffic: Traffic | None = None,
    kind: Kind = Kind.ALL_TO_ALL,
) -> Coming:
    """`exchange_rows`, begun."""
    send, receive = tuple(send_counts), tuple(receive_counts)
    return _begin(x_RD, group, _Movement(
        lambda x, way: start_exchange(x, send, receive, group, kind=kind, direction=way, traffic=traffic),
        lambda x, way: start_exchange(x, receive, send, group, kind=kind, direction=way, traffic=traffic),
    ))  # fmt: skip
