from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymoe.ops.permute import gather_tokens, group_by_expert, scatter_tokens
from skymoe.ops.routing import Routing, count_assignments, route


def random_routing(num_tokens: int, n: int, top_k: int, seed: int, *, pads: bool, capacity: int | None) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(num_tokens, n, generator=generator, dtype=torch.float64)
    valid = torch.rand(num_tokens, generator=generator) < 0.6 if pads else None
    return route(z, top_k=top_k, valid_T=valid, capacity=capacity)


def naive_rows(x_TD: Tensor, routing: Routing) -> tuple[list[Tensor], list[int]]:
    """Expert by expert, token by token in order; and where each expert ends."""
    rows, ends = [], []
    for expert in range(routing.counts_E.numel()):
        for t in range(x_TD.shape[0]):
            rows += [x_TD[t] for k in range(routing.expert_ids_TK.shape[1]) if routing.expert_ids_TK[t, k] == expert]
        ends.append(len(rows))
    return rows, ends


def naive_mixture(x_TD: Tensor, weights_TK: Tensor, routing: Routing, scale_E: Tensor) -> Tensor:
    """sum_k w x scale[expert], with experts that only scale; unsent assignments (id E) add nothing."""
    out = []
    for t in range(x_TD.shape[0]):
        total = 0 * (x_TD[t] + weights_TK.sum() + scale_E.sum())
        for k, expert in enumerate(routing.expert_ids_TK[t].tolist()):
            if expert < scale_E.numel():
                total = total + weights_TK[t, k] * scale_E[expert] * x_TD[t]
        out.append(total)
    return torch.stack(out)


def mixture(x_TD: Tensor, weights_TK: Tensor, routing: Routing, scale_E: Tensor, row_multiple: int = 1) -> Tensor:
    grouping = group_by_expert(routing, row_multiple)
    sizes = torch.diff(grouping.offsets_E, prepend=grouping.offsets_E.new_zeros(1))
    rows_RD = gather_tokens(x_TD, grouping) * scale_E.repeat_interleave(sizes.long())[:, None]
    return scatter_tokens(rows_RD, weights_TK, grouping)


CASES = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 13),
        "n": st.integers(2, 7),
        "top_k": st.integers(1, 2),
        "seed": st.integers(0, 9999),
        "pads": st.booleans(),
        "capacity": st.sampled_from([None, 0, 1, 3]),
    }
)


@settings(deadline=None, max_examples=80)
@given(CASES)
def test_rows_stand_in_expert_order(case: dict) -> None:
    routing = random_routing(**case)
    x_TD = torch.randn(case["num_tokens"], 3, dtype=torch.float64)
    grouping = group_by_expert(routing)
    rows, ends = naive_rows(x_TD, routing)
    assert grouping.offsets_E.tolist() == ends and grouping.offsets_E.dtype is torch.int32
    assert gather_tokens(x_TD, grouping).equal(torch.stack(rows) if rows else x_TD[:0])


@settings(deadline=None, max_examples=80)
@given(CASES)
def test_rows_are_rounded_up_with_zeros(case: dict) -> None:
    """Fillers stand behind each expert's own rows, and nothing else moves."""
    routing = random_routing(**case)
    x_TD = torch.randn(case["num_tokens"], 3, dtype=torch.float64)
    plain, padded = group_by_expert(routing), group_by_expert(routing, 4)
    sizes, padded_sizes = (
        torch.diff(grouping.offsets_E, prepend=grouping.offsets_E.new_zeros(1)).tolist() for grouping in (plain, padded)
    )
    assert padded_sizes == [-(-size // 4) * 4 for size in sizes]
    rows = gather_tokens(x_TD, plain).split(sizes)
    for own, filled in zip(rows, gather_tokens(x_TD, padded).split(padded_sizes), strict=True):
        assert filled[: len(own)].equal(own)
        assert not filled[len(own) :].any()


@settings(deadline=None, max_examples=80)
@given(CASES, st.sampled_from([1, 3, 8]))
def test_the_mixture_and_its_gradients_are_the_naive_ones(case: dict, row_multiple: int) -> None:
    routing = random_routing(**case)
    x_TD = torch.randn(case["num_tokens"], 3, dtype=torch.float64, requires_grad=True)
    weights_TK = routing.weights_TK.detach().requires_grad_()
    scale_E = torch.randn(case["n"], dtype=torch.float64, requires_grad=True)
    ours = mixture(x_TD, weights_TK, routing, scale_E, row_multiple)
    naive = naive_mixture(x_TD, weights_TK, routing, scale_E)
    torch.testing.assert_close(ours, naive)
    direction = torch.randn_like(ours)
    inputs = (x_TD, weights_TK, scale_E)
    found = torch.autograd.grad(ours, inputs, direction)
    expected = torch.autograd.grad(naive, inputs, direction)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("capacity", [None, 0, 2])
@pytest.mark.parametrize("row_multiple", [1, 3])
def test_gradcheck(row_multiple: int, capacity: int | None, pads: bool) -> None:
    """Few tokens on many experts: most experts are empty."""
    routing = random_routing(5, 9, 2, 1, pads=pads, capacity=capacity)
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights_TK = routing.weights_TK.detach().requires_grad_()
    scale_E = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert (count_assignments(routing.expert_ids_TK, 9) == 0).any()
    assert torch.autograd.gradcheck(
        lambda x, w, s: mixture(x, w, routing, s, row_multiple), (x_TD, weights_TK, scale_E)
    )


def test_nothing_is_sent() -> None:
    routing = route(torch.randn(4, 3), top_k=2, valid_T=torch.zeros(4, dtype=torch.bool))
    x_TD = torch.randn(4, 5, requires_grad=True)
    grouping = group_by_expert(routing)
    rows_RD = gather_tokens(x_TD, grouping)
    assert rows_RD.shape == (0, 5) and grouping.offsets_E.tolist() == [0, 0, 0]
    out_TD = scatter_tokens(rows_RD, routing.weights_TK, grouping)
    assert out_TD.equal(torch.zeros(4, 5))
    out_TD.sum().backward()
    assert x_TD.grad is not None and (x_TD.grad == 0).all()


def test_the_dtype_of_the_rows_is_kept() -> None:
    routing = route(torch.randn(6, 4), top_k=2)
    grouping = group_by_expert(routing)
    x_TD = torch.randn(6, 8).bfloat16()
    out_TD = scatter_tokens(gather_tokens(x_TD, grouping), routing.weights_TK, grouping)
    assert out_TD.dtype is torch.bfloat16
    torch.testing.assert_close(out_TD, x_TD, rtol=0.02, atol=0.02)  # weights sum to 1


def test_one_bad_row_stays_with_its_token() -> None:
    """An overflow in the first row must not reach tokens that were dropped, nor, backwards, their gradient."""
    routing = route(torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), top_k=1, capacity=1)
    grouping = group_by_expert(routing)
    x_TD = torch.ones(3, 2, requires_grad=True)
    rows_RD = gather_tokens(x_TD, grouping)
    out_TD = scatter_tokens(rows_RD * torch.tensor([[float("inf")], [1.0]]), routing.weights_TK, grouping)
    assert out_TD.tolist() == [[float("inf")] * 2, [0, 0], [1, 1]]
    out_TD[2].sum().backward()
    assert x_TD.grad is not None and x_TD.grad[1:].tolist() == [[0, 0], [1, 1]]
