"""Distributed dispatch against `LocalDispatcher` on all tokens, against differences, against formulas."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel.dispatch_world import (
    CPU,
    Case,
    D,
    Inputs,
    Results,
    distributed,
    each,
    expert_weights,
    layouts,
    own_experts,
    own_tokens,
    random,
    reference,
    replica,
    routing,
    wanted,
)
from parallel.ranks import run_ranks
from torch import Tensor

from skymoe.ops.experts import ExpertsBackend, expert_swiglu
from skymoe.ops.routing import count_assignments
from skymoe.parallel.dispatch import build_dispatcher, routed_experts
from skymoe.parallel.mesh import Mesh
from skymoe.parallel.traffic import Direction, Kind, Traffic
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout
from skymoe.spec.traffic import DispatchShape, dispatch_bytes

CASES = [
    Case(),
    Case(choices="dropped", top_k=3),
    Case(choices="one", tokens=8, chunks=2),
    Case(choices="dropped", chunks=3, overlap=False),
    Case(choices="one", top_k=1, tokens=1),
    Case(choices="dropped", chunks=2, recompute=True),
    Case(choices="one", dtype=torch.float32),
    Case(tokens=5, chunks=3, dtype=torch.bfloat16),
    Case(num_experts=9, choices="dropped", chunks=2),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def all_of(pairs: list[tuple[Layout, Case]]) -> list[Results]:
    return [distributed(mesh, case) for mesh, case in each(pairs)]


SLOW = [pytest.param(2, 3, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), *SLOW])
def test_equals_one_process(dp: int, tp: int) -> None:
    """Every expert axis and mode, in one world; uneven experts and tokens, ranks that receive nothing."""
    pairs = [(one, case) for one in layouts(dp, tp) for case in CASES if one.expert_ranks <= case.num_experts]
    found = run_ranks(dp * tp, all_of, pairs)
    for number, (layout, case) in enumerate(pairs):
        whole = reference(case, dp)
        for rank in range(dp * tp):
            mine = found[rank][number]
            if layout.expert is ExpertAxis.EDP:  # each replica has all experts: their gradients are summed over dp
                ranks = [layout.rank(layout.coordinate(rank)._replace(dp=other)) for other in range(dp)]
                mine = mine._replace(
                    gate_up_EGD=sum(found[other][number].gate_up_EGD for other in ranks),
                    down_EDF=sum(found[other][number].down_EDF for other in ranks),
                )
            compare(mine, wanted(layout, case, whole, rank), case, f"{layout.expert} {layout.dispatch} rank {rank}")


def compare(mine: Results, right: Results, case: Case, told: str) -> None:
    tolerance = TOLERANCE[case.dtype]
    for name, a, b in zip(Results._fields, mine, right, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        error = float((a - b).abs().max()) / scale if b.numel() else 0.0
        assert error <= tolerance, f"{told}, {case}: {name} is wrong by {error:.1e}"


def slope(mesh: Mesh, case: Case, step: float) -> tuple[Tensor, Tensor]:
    """The derivative of the world's loss along a direction: by differences of outputs, and by gradients.

    The direction moves every token, router weight and expert weight; what several ranks have alike they move alike.
    """
    dispatcher = build_dispatcher(mesh, case.num_experts, case.tokens, chunks=case.chunks)
    tokens, dp = own_tokens(mesh, case), mesh.coordinate.dp
    inputs = Inputs(*(tensor[tokens] for tensor in replica(case, dp)))
    gate_up, down = expert_weights(case)
    moved = (random(50 + dp, case.tokens, D)[tokens], random(60 + dp, case.tokens, case.top_k)[tokens])
    moved += own_experts(mesh, random(70, *gate_up.shape), random(80, *down.shape))
    here = (inputs.x_TD, inputs.weights_TK, *own_experts(mesh, gate_up, down))

    def loss(x_TD: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        def experts(x_RD: Tensor, offsets_E: Tensor) -> Tensor:
            return expert_swiglu(x_RD, gate_up, down, offsets_E, ExpertsBackend.LOOP)

        routed = routing(inputs._replace(weights_TK=weights_TK), case)
        return (routed_experts(dispatcher, experts, x_TD, routed) * inputs.target_TD).sum()

    def at(distance: float) -> Tensor:
        with torch.no_grad():
            return loss(*(value + distance * way for value, way in zip(here, moved, strict=True)))

    counts_once = mesh.layout.dispatch is not DispatchMode.REPLICATED or mesh.coordinate.tp == 0
    by_difference = (at(step) - at(-step)) / (2 * step) * counts_once
    leaves = [value.clone().requires_grad_() for value in here]
    parts = [(g * v).sum() for g, v in zip(torch.autograd.grad(loss(*leaves), leaves), moved, strict=True)]
    by_gradient = (parts[0] + parts[1]) * counts_once + parts[2] + parts[3]
    both = torch.stack((by_difference, by_gradient))
    dist.all_reduce(both)
    return both[0], both[1]


def slopes(pairs: list[tuple[Layout, Case]]) -> list[tuple[Tensor, Tensor]]:
    return [slope(mesh, case, 1e-5) for mesh, case in each(pairs)]


@pytest.mark.parametrize(("dp", "tp"), [(1, 3), (2, 2)])
def test_gradients_are_derivatives(dp: int, tp: int) -> None:
    """fp64 gradient check of dispatch, experts and combine, the perturbation being the same act on all ranks."""
    cases = [Case(), Case(choices="dropped", chunks=2)]
    pairs = [(layout, case) for layout in layouts(dp, tp) for case in cases]
    for (layout, case), (difference, gradient) in zip(pairs, run_ranks(dp * tp, slopes, pairs)[0], strict=True):
        told = f"{layout.expert} {layout.dispatch} {case}"
        assert abs(difference - gradient) <= 1e-8 * max(1.0, abs(gradient)), f"{told}: {difference} {gradient}"


def measured(pairs: list[tuple[Layout, Case]]) -> list[tuple[int, int, int]]:
    """Bytes forward, backward, and of the forward's metadata."""
    found = []
    for mesh, case in each(pairs):
        traffic = Traffic()
        distributed(mesh, case, traffic)
        forward, backward = (traffic.activations(way) for way in (Direction.FORWARD, Direction.BACKWARD))
        found.append((forward, backward, traffic.bytes(Kind.METADATA, Direction.FORWARD)))
    return found


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (1, 3), (2, 2)])
def test_bytes_are_those_of_the_formula(dp: int, tp: int) -> None:
    """To the byte, and from the real choices of the tokens in mode A."""
    cases = [
        Case(), Case(choices="one"), Case(choices="dropped", top_k=3), Case(dtype=torch.bfloat16),
        Case(num_experts=12, tokens=12, chunks=2), Case(chunks=3, dtype=torch.float32),
    ]  # fmt: skip
    pairs = [(layout, case) for layout in layouts(dp, tp) for case in cases]
    found = run_ranks(dp * tp, measured, pairs)
    for number, (layout, case) in enumerate(pairs):
        if layout.dispatch is DispatchMode.REPLICATED and case.tokens % (tp * case.chunks):
            continue  # an all-reduce in chunks divides each chunk's numbers, not the sum of them
        shape = DispatchShape(
            num_tokens=case.tokens, hidden_size=D, itemsize=case.dtype.itemsize,
            num_experts=case.num_experts, top_k=case.top_k,
        )  # fmt: skip
        loads = [loads_of(layout, case, rank) for rank in range(dp * tp)]
        for rank in range(dp * tp):
            place = layout.coordinate(rank)
            formula = dispatch_bytes(layout, place, shape, loads)
            forward, backward, metadata = found[rank][number]
            told = f"{layout.expert} {layout.dispatch} rank {rank} {case}"
            assert (forward, backward) == (formula, formula), told
            assert metadata < 64 * case.num_experts * case.chunks + 16 * dp * tp * case.tokens * case.top_k, told


def loads_of(layout: Layout, case: Case, rank: int) -> list[int]:
    """Assignments of the rank's tokens to each expert."""
    mesh = Mesh(layout, layout.coordinate(rank), CPU, None, *([None] * 6))  # type: ignore[arg-type]
    ids_TK = replica(case, mesh.coordinate.dp).ids_TK[own_tokens(mesh, case)]
    counts: list[int] = count_assignments(ids_TK, case.num_experts).tolist()
    return counts


def twice(pairs: list[tuple[Layout, Case]]) -> list[tuple[Results, Results]]:
    return [(distributed(mesh, case), distributed(mesh, case)) for mesh, case in each(pairs)]


def test_runs_repeat_bit_for_bit() -> None:
    """And in mode R the ranks of a tp group end with the same bits."""
    pairs = [(layout, Case(tokens=9, chunks=2, dtype=torch.float32)) for layout in layouts(1, 3)]
    found = run_ranks(3, twice, pairs)
    for number, (layout, _) in enumerate(pairs):
        for first, second in (found[rank][number] for rank in range(3)):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            if layout.dispatch is DispatchMode.REPLICATED:
                assert torch.equal(first.out_TD, found[0][number][0].out_TD)
                assert torch.equal(first.x_TD, found[0][number][0].x_TD)
                assert torch.equal(first.weights_TK, found[0][number][0].weights_TK)
