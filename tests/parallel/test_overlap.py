"""What is sent before what is multiplied: the order of events on a rank, forward and backward. No clock."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from parallel.dispatch_world import CPU, Case, layouts, own_tokens, replica, routing
from parallel.ranks import run_ranks
from torch import Tensor

from skymoe.parallel.dispatch import build_dispatcher, routed_experts
from skymoe.parallel.mesh import build_mesh
from skymoe.parallel.traffic import Direction, Kind, Traffic
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout

CHUNKS = 4
ORDER = {  # s: send, m: multiply; by whether rows go in two hops (etp in mode A), and by `overlap`
    (False, True): "ss m ss m ss m s m s",  # there and there; multiply; back and there; ..
    (False, False): "sms sms sms sms",
    (True, True): "sssss m sss m sss m ss m sss",
    (True, False): "ssmss ssmss ssmss ssmss",
}


@dataclass
class Diary(Traffic):
    """Notes when something is sent, and (`Multiply`) when something is multiplied."""

    events: list[str] = field(default_factory=list)

    def add(self, kind: Kind, direction: Direction, num_bytes: int) -> None:
        if kind is not Kind.METADATA:
            self.events.append("send")


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, diary: Diary) -> Tensor:
        ctx.diary = diary
        diary.events.append("multiply")
        return 2 * x_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        ctx.diary.events.append("multiply")
        return 2 * grad_RD, None


def events(pairs: list[tuple[Layout, bool]]) -> list[tuple[str, str]]:
    """Forward and backward, `s` and `m`."""
    mesh, found = build_mesh(pairs[0][0], CPU), []
    for layout, overlap in pairs:
        mesh, diary, case = replace(mesh, layout=layout), Diary(), Case(tokens=16, num_experts=4)
        tokens = own_tokens(mesh, case)
        inputs = replica(case, mesh.coordinate.dp)
        inputs = inputs._replace(**{name: value[tokens] for name, value in inputs._asdict().items()})
        x_TD = inputs.x_TD.requires_grad_()
        dispatcher = build_dispatcher(
            mesh, case.num_experts, case.tokens, overlap=overlap, chunks=CHUNKS, traffic=diary
        )
        out_TD = routed_experts(
            dispatcher, lambda x, ends, diary=diary: Multiply.apply(x, diary), x_TD, routing(inputs, case)
        )
        forward = len(diary.events)
        out_TD.sum().backward()
        letters = "".join(event[0] for event in diary.events)
        found.append((letters[:forward], letters[forward:]))
    return found


@pytest.mark.parametrize("dp", [1, 2])
def test_the_next_chunk_is_sent_before_this_one_is_multiplied(dp: int) -> None:
    kept = [layout for layout in layouts(dp, 2) if layout.dispatch is not DispatchMode.REPLICATED]
    kept = [layout for layout in kept if dp == 2 or layout.expert is ExpertAxis.EDP]
    pairs = [(layout, overlap) for layout in kept for overlap in (True, False)]
    for (layout, overlap), both in zip(pairs, run_ranks(2 * dp, events, pairs)[0], strict=True):
        two_hops = layout.expert is ExpertAxis.ETP and layout.dispatch is DispatchMode.ALL_TO_ALL
        assert both == (ORDER[two_hops, overlap].replace(" ", ""),) * 2, (
            f"{layout.expert} {layout.dispatch} {overlap}: {both}"
        )
