"""Collectives against the same arithmetic on all ranks' tensors in one process: values, gradients, bits, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel.ranks import run_ranks
from torch import Tensor

from skymoe.parallel.collectives import (
    arrived, exchange_rows, gather_counts, gather_rows, scatter_rows, start_exchange_rows, start_gather_rows,
    sum_backward, sum_forward,
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
