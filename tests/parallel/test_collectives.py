"""Collectives against the same arithmetic on all ranks' tensors in one process: values, gradients, bits, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel.ranks import run_ranks
from torch import Tensor

from skymoe.parallel.collectives import (
    arrived,
    exchange_rows,
    gather_counts,
    gather_rows,
    scatter_rows,
    start_exchange_rows,
    start_gather_rows,
    sum_backward,
    sum_forward,
)  # fmt: skip
from skymoe.parallel.mesh import Group
from skymoe.parallel.traffic import Direction, Kind, Traffic
from skymoe.spec.split import Split

ALONE = Group((0,), 0, None)
D = 3


def everybody() -> Group:
    return Group(tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def counts_between(num_ranks: int) -> list[list[int]]:
    """Rows from rank i to rank j; some pairs exchange nothing, and rank 1 sends nothing at all."""
    return [[0 if i == 1 else (2 * i + j) % 3 for j in range(num_ranks)] for i in range(num_ranks)]


def rows_and_gradients(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Each collective on known rows, and the gradient of its product with known weights."""
    group, split = everybody(), Split(sizes)
    rank, found = group.rank, {}

    def record(name: str, x: Tensor, y: Tensor) -> None:
        y.backward(values(100 + rank, *y.shape))
        found[name] = (y.detach(), x.grad)

    part = values(rank, sizes[rank], D).requires_grad_()
    record("gather", part, gather_rows(part, split, group))
    whole = values(rank, split.num_units, D).requires_grad_()
    record("scatter", whole, scatter_rows(whole, split, group))
    between = counts_between(group.size)
    rows = values(rank, sum(between[rank]), D).requires_grad_()
    record("exchange", rows, exchange_rows(rows, between[rank], [row[rank] for row in between], group))
    for name, function in (("sum_forward", sum_forward), ("sum_backward", sum_backward)):
        x = values(rank, 2, D).requires_grad_()
        record(name, x, function(x, group))
    found["counts"] = gather_counts(torch.tensor([rank, 7 * rank]), group)
    return found


def expected(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    n, split = len(sizes), Split(sizes)
    parts = [values(rank, sizes[rank], D) for rank in range(n)]
    wholes = [values(rank, split.num_units, D) for rank in range(n)]
    whole_grad = sum(values(100 + rank, split.num_units, D) for rank in range(n))
    part_grad = torch.cat([values(100 + rank, sizes[rank], D) for rank in range(n)])
    between = counts_between(n)
    rows = [values(rank, sum(between[rank]), D) for rank in range(n)]
    came = [sum(row[rank] for row in between) for rank in range(n)]
    back = [values(100 + rank, came[rank], D) for rank in range(n)]
    total, total_grad = (sum(values(seed + rank, 2, D) for rank in range(n)) for seed in (0, 100))
    pieces = [rows[i].split(between[i]) for i in range(n)]
    pieces_back = [back[j].split([between[i][j] for i in range(n)]) for j in range(n)]
    return [
        {
            "gather": (torch.cat(parts), whole_grad[split.part(rank)]),
            "scatter": (sum(wholes)[split.part(rank)], part_grad),
            "exchange": (
                torch.cat([pieces[i][rank] for i in range(n)]), torch.cat([pieces_back[j][rank] for j in range(n)])
            ),
            "sum_forward": (total, values(100 + rank, 2, D)),
            "sum_backward": (values(rank, 2, D), total_grad),
            "counts": torch.tensor([[r, 7 * r] for r in range(n)]),
        }
        for rank in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [(3, 3), (4, 1), (2, 0, 3), (0, 0, 0), (1, 2, 1, 4)])
def test_values_and_gradients(sizes: tuple[int, ...]) -> None:
    for found, wanted in zip(run_ranks(len(sizes), rows_and_gradients, sizes), expected(sizes), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_alone_everything_is_the_identity() -> None:
    x = values(0, 4, D).requires_grad_()
    split = Split((4,))
    for y in (
        sum_forward(x, ALONE), sum_backward(x, ALONE), gather_rows(x, split, ALONE), scatter_rows(x, split, ALONE),
        exchange_rows(x, [4], [4], ALONE),
    ):  # fmt: skip
        assert torch.equal(y, x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, torch.ones_like(x))
    assert torch.equal(gather_counts(torch.tensor([3, 5]), ALONE), torch.tensor([[3, 5]]))


def sums_in(dtype: torch.dtype) -> list[Tensor]:
    """An all-reduce and a reduce-scatter of the same numbers, two times."""
    group, found = everybody(), []
    x = values(group.rank, 5, 7, dtype=dtype)
    for _ in range(2):
        found += [sum_forward(x, group), scatter_rows(x, Split((2, 0, 3)), group)]
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_are_the_same_bits_everywhere_and_rounded_once(dtype: torch.dtype) -> None:
    found = run_ranks(3, sums_in, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    parts = [values(rank, 5, 7, dtype=dtype).to(wide) for rank in range(3)]
    total = (parts[0] + parts[1] + parts[2]).to(dtype)
    for (reduced, scattered, *again), rows in zip(found, Split((2, 0, 3)), strict=True):
        assert torch.equal(reduced, total)
        assert torch.equal(scattered, total[rows.start : rows.stop])
        assert torch.equal(again[0], reduced) and torch.equal(again[1], scattered)


def sent_bytes() -> dict[tuple[Kind, Direction], int]:
    """Of every collective forward and backward, fp32 rows of 12 bytes, ranks with 4, 1 and 2 of 7 rows."""
    group, split, traffic = everybody(), Split((4, 1, 2)), Traffic()
    part = torch.zeros(split.sizes[group.rank], D, requires_grad=True)
    gather_rows(part, split, group, traffic).sum().backward()
    whole = torch.zeros(7, D, requires_grad=True)
    sum_forward(whole, group, traffic).sum().backward()
    between = counts_between(3)
    rows = torch.zeros(sum(between[group.rank]), D, requires_grad=True)
    exchange_rows(rows, between[group.rank], [row[group.rank] for row in between], group, traffic).sum().backward()
    gather_counts(torch.zeros(5, dtype=torch.int64), group, traffic)
    return traffic.sent


def test_bytes() -> None:
    row, between, forward, backward = 12, counts_between(3), Direction.FORWARD, Direction.BACKWARD
    for rank, found in enumerate(run_ranks(3, sent_bytes)):
        size = (4, 1, 2)[rank]
        leaves = sum(between[rank]) - between[rank][rank]
        returns = sum(line[rank] for line in between) - between[rank][rank]
        assert found == {
            (Kind.ALL_GATHER, forward): 2 * size * row,
            (Kind.REDUCE_SCATTER, backward): (7 - size) * row,
            (Kind.ALL_REDUCE, forward): 4 * (21 - 7 + 2 * 7),  # 21 numbers, 7 of them summed here
            (Kind.ALL_TO_ALL, forward): leaves * row,
            (Kind.ALL_TO_ALL, backward): returns * row,
            (Kind.METADATA, forward): 2 * 5 * 8,
        }


def begun_apart() -> tuple[Tensor, Tensor, Tensor]:
    """Two movements under way at once, taken in the other order; and the gradient through both."""
    group, split = everybody(), Split((3, 1, 2))
    x = values(group.rank, split.sizes[group.rank], D).requires_grad_()
    first = start_gather_rows(x, split, group)
    second = start_exchange_rows(2 * x, *rotation(split, group.rank), group)
    second.settle()
    moved, whole = arrived(second), arrived(first)
    gradient = torch.autograd.grad(whole.sum() * (1 + group.rank) + (moved * values(9, *moved.shape)).sum(), x)[0]
    return whole.detach(), moved.detach(), gradient


def rotation(split: Split, rank: int) -> tuple[list[int], list[int]]:
    """Everybody sends all its rows to the next rank."""
    send, receive = [0, 0, 0], [0, 0, 0]
    send[(rank + 1) % 3] = split.sizes[rank]
    receive[(rank - 1) % 3] = split.sizes[(rank - 1) % 3]
    return send, receive


def test_two_at_once() -> None:
    sizes = (3, 1, 2)
    parts = [values(rank, sizes[rank], D) for rank in range(3)]
    for rank, (whole, moved, gradient) in enumerate(run_ranks(3, begun_apart)):
        assert torch.equal(whole, torch.cat(parts))
        assert torch.equal(moved, 2 * parts[(rank - 1) % 3])
        torch.testing.assert_close(gradient, 1 + 2 + 3 + 2 * values(9, sizes[rank], D))
