from __future__ import annotations

import pytest
import torch

from skymoe.model.dispatch import LocalDispatcher
from skymoe.ops.routing import route


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("pads", [False, True])
def test_dispatch_and_combine_are_a_round_trip(capacity: int | None, pads: bool) -> None:
    """Experts that do nothing give each token back, times the sum of its weights: 1, or 0 where all was lost."""
    valid = torch.tensor([True, False, True, True, True, False]) if pads else None
    routing = route(torch.randn(6, 3, dtype=torch.float64), top_k=2, valid_T=valid, capacity=capacity)
    x_TD = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    dispatcher = LocalDispatcher()
    received, receipt = dispatcher.dispatch(x_TD, routing)
    assert received.x_RD.shape[0] == int(received.offsets_E[-1]) == int(routing.sent_counts_E.sum())
    out_TD = dispatcher.combine(received.x_RD, receipt)
    reached = (routing.expert_ids_TK < 3).any(-1)
    torch.testing.assert_close(out_TD, x_TD * reached[:, None])
    out_TD.sum().backward()
    torch.testing.assert_close(x_TD.grad, reached[:, None].expand(6, 4).double())


def test_receipts_keep_dispatches_apart() -> None:
    """Two dispatches open at a time, combined in the other order."""
    dispatcher = LocalDispatcher()
    xs = [torch.randn(5, 4), torch.randn(7, 4)]
    opened = [dispatcher.dispatch(x, route(torch.randn(len(x), 3), top_k=2)) for x in xs]
    for x, (received, receipt) in reversed(list(zip(xs, opened, strict=True))):
        torch.testing.assert_close(dispatcher.combine(received.x_RD, receipt), x)


def test_each_expert_receives_the_tokens_that_chose_it() -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0], [9.0, 5.0, 0.0], [0.0, 5.0, 9.0]])
    x_TD = torch.tensor([[1.0], [2.0], [3.0]])
    received, _ = LocalDispatcher().dispatch(x_TD, route(logits, top_k=2))
    assert received.x_RD[:, 0].tolist() == [2, 1, 2, 3, 1, 3] and received.offsets_E.tolist() == [1, 4, 6]
