"""A mixture of experts over ranks and in one process, on the same known tokens: what the tests of dispatch compare.

Every rank has its experts' slices of the same weights. The loss is a product of the outputs with known numbers, so the
gradient of every token, router weight and expert weight is compared, not only sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skymoe.model.dispatch import LocalDispatcher
from skymoe.ops.experts import ExpertsBackend, expert_swiglu
from skymoe.ops.routing import Routing, count_assignments
from skymoe.parallel.dispatch import build_dispatcher, routed_experts
from skymoe.parallel.mesh import Mesh, build_mesh
from skymoe.parallel.traffic import Traffic
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout
from skymoe.spec.split import Split

D, F = 8, 16
CPU = torch.device("cpu")


class Case(NamedTuple):
    """A layer, its tokens and how they are routed.

    Attributes:
        tokens: of each replica.
        choices: `spread` (random), `one` (all choices on the last expert and its neighbours), `dropped` (random, some
            choices and whole tokens sent nowhere).
    """

    num_experts: int = 5
    tokens: int = 7
    top_k: int = 2
    choices: str = "spread"
    dtype: torch.dtype = torch.float64
    overlap: bool = True
    chunks: int = 1
    recompute: bool = False


class Inputs(NamedTuple):
    """Of one replica (or all of them)."""

    x_TD: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    target_TD: Tensor


class Results(NamedTuple):
    """Outputs, and the gradients of tokens, router weights and expert weights."""

    out_TD: Tensor
    x_TD: Tensor
    weights_TK: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def replica(case: Case, dp: int) -> Inputs:
    num, k, experts = case.tokens, case.top_k, case.num_experts
    ids_TK = random(10 * dp, num, experts).topk(k).indices
    if case.choices == "one":
        ids_TK = torch.arange(experts - 1, experts - 1 - k, -1).expand(num, k).contiguous()
    if case.choices == "dropped":
        ids_TK = ids_TK.masked_fill(random(10 * dp + 1, num, k) > 0.5, experts)
        ids_TK[: num // 3] = experts
    weights_TK = random(10 * dp + 2, num, k).abs() * (ids_TK < experts)
    x_TD, target_TD = random(10 * dp + 3, num, D), random(10 * dp + 4, num, D)
    return Inputs(x_TD.to(case.dtype), weights_TK.to(wide(case)), ids_TK, target_TD.to(case.dtype))


def wide(case: Case) -> torch.dtype:
    return torch.float64 if case.dtype is torch.float64 else torch.float32


def expert_weights(case: Case) -> tuple[Tensor, Tensor]:
    gate_up, down = random(1001, case.num_experts, 2 * F, D), random(1002, case.num_experts, D, F)
    return gate_up.to(case.dtype), down.to(case.dtype)


def routing(inputs: Inputs, case: Case) -> Routing:
    counts_E = count_assignments(inputs.ids_TK, case.num_experts)
    unknown = inputs.weights_TK.new_empty(0)
    is_full = case.choices != "dropped"
    return Routing(inputs.weights_TK, inputs.ids_TK, counts_E, unknown, unknown, is_full)


def reference(case: Case, num_replicas: int) -> Results:
    """One process with all experts and the tokens of all replicas."""
    parts = [replica(case, dp) for dp in range(num_replicas)]
    inputs = Inputs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    gate_up, down = (weight.requires_grad_() for weight in expert_weights(case))
    inputs = inputs._replace(x_TD=inputs.x_TD.requires_grad_(), weights_TK=inputs.weights_TK.requires_grad_())
    local = LocalDispatcher()
    received, receipt = local.dispatch(inputs.x_TD, routing(inputs, case))
    y_RD = expert_swiglu(received.x_RD, gate_up, down, received.offsets_E, ExpertsBackend.GROUPED)
    return results(local.combine(y_RD, receipt), inputs, gate_up, down)


def results(out_TD: Tensor, inputs: Inputs, gate_up: Tensor, down: Tensor) -> Results:
    sources = (inputs.x_TD, inputs.weights_TK, gate_up, down)
    gradients = torch.autograd.grad((out_TD * inputs.target_TD).sum(), sources)
    return Results(out_TD.detach(), *gradients)


def own_tokens(mesh: Mesh, case: Case) -> slice:
    """This rank's rows among those of its replica."""
    layout = mesh.layout
    part = layout.tokens(case.tokens).part(mesh.coordinate.tp) if layout.sequence_parallel else range(case.tokens)
    return slice(part.start, part.stop)


def own_experts(mesh: Mesh, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    layout = mesh.layout
    part = layout.experts(gate_up.shape[0]).part(layout.expert_rank(mesh.coordinate))
    gate_up, down = gate_up[part.start : part.stop], down[part.start : part.stop]
    if layout.expert is ExpertAxis.ETP:
        columns = layout.ffn(F).part(mesh.coordinate.tp)
        cut = slice(columns.start, columns.stop)
        gate_up, down = torch.cat((gate_up[:, :F][:, cut], gate_up[:, F:][:, cut]), 1), down[:, :, cut]
    return gate_up.contiguous(), down.contiguous()


def each(pairs: Sequence[tuple[Layout, Case]]) -> Iterator[tuple[Mesh, Case]]:
    """The mesh of each pair; the groups are made once, as all layouts are of the same sizes."""
    mesh = build_mesh(pairs[0][0], CPU)
    for layout, case in pairs:
        assert (layout.pp, layout.dp, layout.tp) == (mesh.layout.pp, mesh.layout.dp, mesh.layout.tp)
        yield replace(mesh, layout=layout), case


def distributed(mesh: Mesh, case: Case, traffic: Traffic | None = None) -> Results:
    """The same on this rank."""
    dispatcher = build_dispatcher(
        mesh, case.num_experts, case.tokens, overlap=case.overlap, chunks=case.chunks, traffic=traffic
    )
    tokens = own_tokens(mesh, case)
    inputs = Inputs(*(tensor[tokens] for tensor in replica(case, mesh.coordinate.dp)))
    inputs = inputs._replace(x_TD=inputs.x_TD.requires_grad_(), weights_TK=inputs.weights_TK.requires_grad_())
    gate_up, down = (weight.requires_grad_() for weight in own_experts(mesh, *expert_weights(case)))

    def experts(x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        return expert_swiglu(x_RD, gate_up, down, offsets_E, ExpertsBackend.GROUPED)

    def moe(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        routed = routing(inputs._replace(weights_TK=weights_TK), case)
        return routed_experts(dispatcher, experts, x_TD, routed)

    if case.recompute:
        out_TD = checkpoint(moe, inputs.x_TD, inputs.weights_TK, use_reentrant=False)
    else:
        out_TD = moe(inputs.x_TD, inputs.weights_TK)
    return results(out_TD, inputs, gate_up, down)


def wanted(layout: Layout, case: Case, whole: Results, rank: int) -> Results:
    """What `rank` should find, cut from the results of one process; edp's expert gradients are of its replica."""
    mesh = Mesh(layout, layout.coordinate(rank), CPU, None, *([None] * 6))  # type: ignore[list-item]
    own = own_tokens(mesh, case)
    start = mesh.coordinate.dp * case.tokens
    rows = slice(start + own.start, start + own.stop)
    experts = own_experts(mesh, whole.gate_up_EGD, whole.down_EDF)
    return Results(whole.out_TD[rows], whole.x_TD[rows], whole.weights_TK[rows], *experts)


def layouts(dp: int, tp: int) -> list[Layout]:
    return [
        Layout(dp=dp, tp=tp, expert=expert, dispatch=mode, stages=Split((2,)))
        for expert in ExpertAxis
        for mode in DispatchMode
    ]
